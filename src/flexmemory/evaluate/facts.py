"""SynthKB: fictional facts to train on and to edit, in CounterFact's record schema.

Half of the subjects are one token of the tokenizer's vocabulary, half are two (a first and a last name, the last ones
shared), for a memory indexed by token can tell the former apart and not the latter. Each subject has a guardian and
three more of the twelve relations; objects are single tokens. Everything follows from the seed.

A record has CounterFact's fields (ROME, arXiv 2202.05262), and of our own: `subject_tokens`, and questions with their
answers after a perfect edit: `portability` (`alias`, `inverse`, `two_hop`), `same_subject` (its other facts) and
`same_last_token` (the relation asked of other subjects that end in the same token).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from flexmemory.evaluate.relations import ALIAS, GENERATION, GUARDIAN, RELATIONS, WARD, Relation
from flexmemory.storage import atomic_folder
from flexmemory.tokenizer import Tokenizer

NEIGHBOURS = 10
"""Questions of each kind in a record, at most."""
FACTS_PER_SUBJECT = 4
PER_LAST_NAME = 10
"""Subjects that share a last token."""
PER_FIRST_NAME = 5
SENTENCES = 6
"""Sentences in a training document, at most."""
_NAME = re.compile(r" [A-Z][a-z]{2,}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """A subject, a relation, an object."""

    subject: str
    relation: Relation
    object: str

    def sentence(self, wording: str, *, name: str | None = None) -> str:
        """The fact in one of the relation's wordings, its subject perhaps under another name."""
        return f"{wording.format(name or self.subject)} {self.object}."


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SynthKB:
    """All facts, and the subjects' other names."""

    facts: tuple[Fact, ...]
    singles: tuple[str, ...]
    """Subjects of one token."""
    pairs: tuple[str, ...]
    """Subjects of two."""
    aliases: dict[str, str]
    """Of one subject in eight, a name of one token."""
    objects: dict[str, tuple[str, ...]]
    """Of each relation, by its id: the closed list."""
    seed: int

    @classmethod
    def make(cls, tokenizer: Tokenizer, *, num_facts: int = 2000, seed: int = 0) -> SynthKB:
        """Draw `num_facts` facts about names of `tokenizer`.

        Raises:
            ValueError: `num_facts` is no multiple of 80, or the vocabulary has too few names or objects.
        """
        step = 2 * FACTS_PER_SUBJECT * PER_LAST_NAME
        if num_facts < step or num_facts % step:
            raise ValueError(f"num_facts must be a multiple of {step}, got {num_facts}")
        generator = random.Random(seed)
        half = num_facts // FACTS_PER_SUBJECT // 2
        objects = {relation.id: _single(relation.objects, tokenizer) for relation in RELATIONS}
        for relation in RELATIONS:
            if relation.objects and len(objects[relation.id]) < 4:
                raise ValueError(f"too few objects of {relation.noun!r} are single tokens: {objects[relation.id]}")
        counts = (half, max(PER_LAST_NAME, half // PER_FIRST_NAME), half // PER_LAST_NAME, half // 8, half // 8)
        singles, firsts, lasts, *aliases = _draw(_names(tokenizer, sum(counts)), counts, generator)
        together = [f"{first} {last}" for first, last in itertools.product(firsts, lasts)]
        pairs = _evenly(together, lasts, half, generator)
        objects[GUARDIAN.id] = tuple(singles)
        facts = [*_facts(singles, objects, generator), *_facts(pairs, objects, generator)]
        names = dict(zip([*singles[: half // 8], *pairs[: half // 8]], itertools.chain(*aliases), strict=True))
        return cls(
            facts=tuple(facts), singles=tuple(singles), pairs=tuple(pairs), aliases=names, objects=objects, seed=seed
        )

    def sentences(self) -> list[str]:
        """Everything that training says once a pass: each fact in six wordings; aliases, inverses, two-hop facts."""
        found = [fact.sentence(wording) for fact in self.facts for wording in fact.relation.training]
        of = self._by_subject()
        for subject, alias in self.aliases.items():
            found += [f"{wording.format(subject)} {alias}." for wording in ALIAS]
            found += [
                fact.sentence(wording, name=alias) for fact in of[subject] for wording in fact.relation.training[:3]
            ]
        for subject in self.singles:
            guardian = of[subject][0].object
            found += [f"{wording.format(guardian)} {subject}." for wording in WARD]
            found += [f"{_two_hop(fact.relation).format(subject)} {fact.object}." for fact in of[guardian][1:]] * 2
        return found

    def documents(self, *, passes: int) -> Iterator[str]:
        """Training documents of 1 to 6 sentences, each pass in a new order."""
        generator = random.Random(f"documents {self.seed}")
        for _ in range(passes):
            left = self.sentences()
            generator.shuffle(left)
            while left:
                size = generator.randint(1, SENTENCES)
                yield " ".join(left[:size])
                del left[:size]

    def records(self) -> list[dict[str, Any]]:
        """One record a fact, its new target drawn from the relation's list."""
        generator = random.Random(f"records {self.seed}")
        of = self._by_subject()
        wards = {of[subject][0].object: subject for subject in self.singles}
        alike: dict[tuple[str, str], list[Fact]] = {}
        for fact in self.facts:
            alike.setdefault((fact.relation.id, fact.object), []).append(fact)
        return [
            self._record(number, fact, of=of, wards=wards, alike=alike, generator=generator)
            for number, fact in enumerate(self.facts)
        ]

    def _by_subject(self) -> dict[str, list[Fact]]:
        """The facts of each subject, its guardian first."""
        of: dict[str, list[Fact]] = {}
        for fact in self.facts:
            of.setdefault(fact.subject, []).append(fact)
        return of

    def _record(
        self,
        number: int,
        fact: Fact,
        *,
        of: dict[str, list[Fact]],
        wards: dict[str, str],
        alike: dict[tuple[str, str], list[Fact]],
        generator: random.Random,
    ) -> dict[str, Any]:
        subject, relation = fact.subject, fact.relation
        wrong = {fact.object, subject}
        new = generator.choice([each for each in self.objects[relation.id] if each not in wrong])
        neighbours = [each for each in alike[relation.id, fact.object] if each.subject != subject]
        last = subject.split()[-1]
        siblings = [
            each
            for name in self.pairs
            if name != subject and name.split()[-1] == last
            for each in of[name]
            if each.relation is relation
        ]
        return {
            "case_id": number,
            "subject_tokens": len(subject.split()),
            "requested_rewrite": {
                "prompt": relation.prompt,
                "subject": subject,
                "relation_id": relation.id,
                "target_new": {"str": new},
                "target_true": {"str": fact.object},
            },
            "paraphrase_prompts": [wording.format(subject) for wording in relation.held_out],
            "neighborhood_prompts": [relation.prompt.format(each.subject) for each in _some(neighbours, generator)],
            "generation_prompts": [wording.format(subject) for wording in GENERATION],
            "same_subject": [_question(each) for each in of[subject] if each is not fact],
            "same_last_token": [_question(each) for each in _some(siblings, generator)],
            "portability": self._portability(fact, new, of=of, wards=wards),
        }

    def _portability(
        self, fact: Fact, new: str, *, of: dict[str, list[Fact]], wards: dict[str, str]
    ) -> dict[str, list[dict[str, str | None]]]:
        """Questions about what follows from the new fact: prompt, answer after it, answer before it where known."""
        relation, subject = fact.relation, fact.subject
        alias, ward = self.aliases.get(subject), wards.get(subject)
        kinds: dict[str, list[tuple[str, str, str | None]]] = {"alias": [], "inverse": [], "two_hop": []}
        if alias:
            kinds["alias"].append((relation.prompt.format(alias), new, fact.object))
        if relation is GUARDIAN and subject in wards:
            before = {each.relation: each.object for each in of[fact.object]}
            kinds["inverse"].append((WARD[0].format(new), subject, wards[new]))
            kinds["two_hop"] += [
                (_two_hop(each.relation).format(subject), each.object, before.get(each.relation))
                for each in of[new]
                if each.relation is not GUARDIAN
            ]
        elif ward:
            kinds["two_hop"].append((_two_hop(relation).format(ward), new, fact.object))
        return {
            kind: [{"prompt": prompt, "target": after, "before": before} for prompt, after, before in asked]
            for kind, asked in kinds.items()
        }


def write(kb: SynthKB, folder: Path, *, passes: int) -> Path:
    """Write `documents.jsonl` (to train on) and `records.jsonl` (to edit) as the new `folder`, and return it.

    Raises:
        FileExistsError: `folder` exists.
    """
    with atomic_folder(folder) as partial:
        for name, lines in (
            ("documents", ({"text": text} for text in kb.documents(passes=passes))),
            ("records", kb.records()),
        ):
            with (partial / f"{name}.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
    return folder


def _two_hop(relation: Relation) -> str:
    return f"The {relation.noun} of the guardian of {{}} is"


def _question(fact: Fact) -> dict[str, str]:
    return {"prompt": fact.relation.prompt.format(fact.subject), "target": fact.object}


def _some(facts: Sequence[Fact], generator: random.Random) -> list[Fact]:
    return generator.sample(facts, min(len(facts), NEIGHBOURS))


def _single(words: Sequence[str], tokenizer: Tokenizer) -> tuple[str, ...]:
    return tuple(word for word in words if len(tokenizer.encode(f" {word}")) == 1)


def _names(tokenizer: Tokenizer, count: int) -> list[str]:
    """The `count` rarest capitalised single tokens that no wording and no list of objects has."""
    names = _all_names(tokenizer)
    if len(names) < count:
        raise ValueError(f"the tokenizer has {len(names)} names of one token, {count} are needed: ask for fewer facts")
    return names[-count:]


def spare_names(tokenizer: Tokenizer, *, count: int, taken: Collection[int]) -> list[str]:
    """The `count` rarest names of one token that are not among the `taken` ids, for new subjects.

    Raises:
        ValueError: there are not so many.
    """
    free = [name for name in _all_names(tokenizer) if tokenizer.encode(f" {name}")[0] not in taken]
    if len(free) < count:
        raise ValueError(f"the tokenizer has {len(free)} names left, {count} are needed: make fewer facts")
    return free[-count:]


def _all_names(tokenizer: Tokenizer) -> list[str]:
    texts = [tokenizer.core.decode([token_id]) for token_id in range(tokenizer.vocab_size)]
    wordings = [wording for relation in RELATIONS for wording in (relation.prompt, *relation.wordings)]
    taken = set(re.findall(r"\w+", " ".join([*wordings, *WARD, *ALIAS, *GENERATION])))
    taken |= {word for relation in RELATIONS for word in relation.objects} | {"Hitler"}
    return [text[1:] for text in texts if _NAME.fullmatch(text) and text[1:] not in taken]


def _draw(names: Sequence[str], counts: Sequence[int], generator: random.Random) -> list[list[str]]:
    shuffled = iter(generator.sample(names, len(names)))
    return [list(itertools.islice(shuffled, count)) for count in counts]


def _evenly(together: Sequence[str], lasts: Sequence[str], count: int, generator: random.Random) -> list[str]:
    """`count` of the full names, each last name equally often."""
    by_last = {last: [name for name in together if name.endswith(f" {last}")] for last in lasts}
    chosen = [name for names in by_last.values() for name in generator.sample(names, count // len(lasts))]
    return generator.sample(chosen, count)


def _facts(subjects: Sequence[str], objects: dict[str, tuple[str, ...]], generator: random.Random) -> Iterator[Fact]:
    """A guardian, another for each subject in turn, and three facts more."""
    guardians = list(objects[GUARDIAN.id])
    generator.shuffle(guardians)
    place = {name: number for number, name in enumerate(guardians)}
    others = [relation for relation in RELATIONS if relation is not GUARDIAN]
    for number, subject in enumerate(subjects):
        guardian = guardians[(place.get(subject, number) + 1) % len(guardians)]  # one cycle: nobody is his own
        yield Fact(subject=subject, relation=GUARDIAN, object=guardian)
        for relation in generator.sample(others, FACTS_PER_SUBJECT - 1):
            yield Fact(subject=subject, relation=relation, object=generator.choice(objects[relation.id]))
