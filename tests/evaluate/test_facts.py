"""SynthKB: what it promises of tokens, templates and records."""

import json
from collections import Counter
from pathlib import Path

import pytest

from flexmemory.evaluate.facts import FACTS_PER_SUBJECT, PER_LAST_NAME, SynthKB, spare_names, write
from flexmemory.evaluate.relations import ALIAS, GENERATION, GUARDIAN, RELATIONS, WARD
from flexmemory.tokenizer import Tokenizer


def test_wordings_are_eight_a_relation_and_keep_the_tokens_of_a_subject():
    assert len(RELATIONS) == 12
    assert len({relation.id for relation in RELATIONS}) == 12
    for relation in RELATIONS:
        wordings = (*relation.training, *relation.held_out)
        assert len(set(wordings)) == len(wordings) == 8
        assert len(relation.held_out) == 2
    for wording in [*ALIAS, *WARD, *GENERATION, *(w for each in RELATIONS for w in (each.prompt, *each.wordings))]:
        assert wording.count("{}") == 1
        assert not wording.startswith("{}")
        assert wording == wording.strip()


def test_half_of_the_subjects_are_one_token_and_half_are_two_with_shared_last_tokens(
    facts: SynthKB, names_tokenizer: Tokenizer
):
    counts = Counter(len(names_tokenizer.encode(f" {fact.subject}")) for fact in facts.facts)
    assert counts == {1: 80, 2: 80}
    assert len({fact.subject for fact in facts.facts}) == 160 // FACTS_PER_SUBJECT
    lasts = Counter(subject.split()[-1] for subject in facts.pairs)
    assert set(lasts.values()) == {PER_LAST_NAME}
    assert not set(facts.singles) & {name for subject in facts.pairs for name in subject.split()}
    for fact in facts.facts:
        assert len(names_tokenizer.encode(f" {fact.object}")) == 1
        assert fact.object in facts.objects[fact.relation.id]
        assert fact.object != fact.subject


def test_guardians_of_one_token_subjects_are_one_cycle(facts: SynthKB):
    guardian = {fact.subject: fact.object for fact in facts.facts if fact.relation is GUARDIAN}
    name, seen = facts.singles[0], set()
    while name not in seen:
        seen.add(name)
        name = guardian[name]
    assert seen == set(facts.singles)


def test_records_follow_from_the_facts(facts: SynthKB):
    true = {fact.relation.prompt.format(fact.subject): fact for fact in facts.facts}
    records = facts.records()
    assert [record["case_id"] for record in records] == list(range(160))
    training = set(facts.sentences())
    for record, fact in zip(records, facts.facts, strict=True):
        request = record["requested_rewrite"]
        old, new = request["target_true"]["str"], request["target_new"]["str"]
        assert true[request["prompt"].format(request["subject"])] is fact
        assert (old, new != old, new in facts.objects[request["relation_id"]]) == (fact.object, True, True)
        assert len(record["paraphrase_prompts"]) == 2
        assert not {f"{prompt} {old}." for prompt in record["paraphrase_prompts"]} & training
        for prompt in record["neighborhood_prompts"]:
            assert (true[prompt].object, true[prompt].relation) == (old, fact.relation)
            assert true[prompt].subject != fact.subject
        assert len(record["same_subject"]) == FACTS_PER_SUBJECT - 1
        for question in (*record["same_subject"], *record["same_last_token"]):
            assert true[question["prompt"]].object == question["target"]
        for question in record["same_last_token"]:
            assert true[question["prompt"]].subject.split()[-1] == fact.subject.split()[-1]


def test_portability_is_asked_without_naming_what_was_edited_but_for_two_hops_from_the_subject(facts: SynthKB):
    guardian = {fact.subject: fact.object for fact in facts.facts if fact.relation is GUARDIAN}
    training, seen = set(facts.sentences()), Counter()
    for record in facts.records():
        request, asked = record["requested_rewrite"], record["portability"]
        for kind, questions in asked.items():
            for question in questions:
                seen[kind] += 1
                assert question["before"] is None or f"{question['prompt']} {question['before']}." in training
        for question in asked["alias"]:
            alias = facts.aliases[request["subject"]]
            assert question["prompt"] == request["prompt"].format(alias)
            assert question["target"] == request["target_new"]["str"]
        if request["relation_id"] == GUARDIAN.id:
            for question in asked["inverse"]:
                assert question["prompt"] == WARD[0].format(request["target_new"]["str"])
                assert question["target"] == request["subject"]
        else:
            for question in asked["two_hop"]:
                (ward,) = [name for name in facts.singles if guardian[name] == request["subject"]]
                assert question["prompt"].endswith(f"of the guardian of {ward} is")
    assert all(seen[kind] for kind in ("alias", "inverse", "two_hop"))


def test_documents_say_everything_once_a_pass_and_follow_from_the_seed(facts: SynthKB, names_tokenizer: Tokenizer):
    documents = list(facts.documents(passes=2))
    said = Counter(sentence for text in documents for sentence in text.removesuffix(".").split(". "))
    assert said == Counter(sentence.removesuffix(".") for sentence in facts.sentences() * 2)
    again = SynthKB.make(names_tokenizer, num_facts=160, seed=3)
    assert list(again.documents(passes=2)) == documents
    assert again.records() == facts.records()
    assert SynthKB.make(names_tokenizer, num_facts=160, seed=4).facts != facts.facts


def test_written_files_are_json_lines_and_whole_or_absent(facts: SynthKB, tmp_path: Path):
    folder = write(facts, tmp_path / "kb", passes=1)
    lines = {name: (folder / f"{name}.jsonl").read_text().splitlines() for name in ("documents", "records")}
    assert [json.loads(line) for line in lines["records"]] == facts.records()
    assert [json.loads(line)["text"] for line in lines["documents"]] == list(facts.documents(passes=1))
    with pytest.raises(FileExistsError):
        write(facts, folder, passes=1)


def test_spare_names_are_of_nobody(facts: SynthKB, names_tokenizer: Tokenizer):
    taken = {token for fact in facts.facts for token in names_tokenizer.encode(f" {fact.subject}")}
    taken |= {names_tokenizer.encode(f" {alias}")[0] for alias in facts.aliases.values()}
    for name in spare_names(names_tokenizer, count=5, taken=taken):
        (token,) = names_tokenizer.encode(f" {name}")
        assert token not in taken


def test_refusals(names_tokenizer: Tokenizer):
    with pytest.raises(ValueError, match="multiple of 80"):
        SynthKB.make(names_tokenizer, num_facts=100)
    with pytest.raises(ValueError, match="ask for fewer facts"):
        SynthKB.make(names_tokenizer, num_facts=8000)
    with pytest.raises(ValueError, match="make fewer facts"):
        spare_names(names_tokenizer, count=10_000, taken=())
    plain = Tokenizer.train(["nothing of interest"], vocab_size=300)
    with pytest.raises(ValueError, match="too few objects"):
        SynthKB.make(plain)
