"""Suppression of concepts, new tokens and disabled ones: the rest of what `benchmarks/editing.py` measures."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from editing_suite import WINDOW, Suite, summarised_by_kind

from flexmemory.evaluate.edit_locality import TextWindows, logits_of, text_effect
from flexmemory.evaluate.edit_search import Search, search_vectors
from flexmemory.evaluate.editing import make_case, score, summarise
from flexmemory.evaluate.facts import spare_names
from flexmemory.evaluate.questions import Questions
from flexmemory.evaluate.relations import RELATIONS
from flexmemory.evaluate.suppression import frequency_matched, measure, variants
from flexmemory.interpret.edit import Editor
from flexmemory.interpret.promotion import lowered_rows
from flexmemory.interpret.tkv import TokenMemory

CONCEPTS = {"months": "R05", "animals": "R06", "colours": "R03"}
"""Names, and the relations whose objects they are."""
VALUES = (64, 512)
"""Values set to zero, of all L * K."""
ROWS = (1024, 16_384)
"""Rows lowered, of all L * V."""
TOP = 64
"""Logits of a value or row that are looked at."""
PROMPTS = 40
NEW_TOKENS = 10


def suppression(suite: Suite) -> dict[str, Any]:
    """Every way to suppress each concept, and the ban."""
    if suite.is_dense:
        return {}
    memory = TokenMemory(suite.model)
    allowed = torch.tensor([
        suite.tokenizer.core.decode([token]).strip().isalpha() for token in range(suite.model.config.vocab_size)
    ])  # fmt: skip
    length = min(WINDOW, suite.model.config.max_seq_len)
    windows = TextWindows(suite.held_out, length=length, device=suite.device).windows[:256]
    results: dict[str, Any] = {}
    for concept, relation_id in CONCEPTS.items():
        relation = next(each for each in RELATIONS if each.id == relation_id)
        tokens = variants(relation.objects, suite.tokenizer)
        neighbours = frequency_matched(tokens, counts=suite.counts, allowed=allowed)
        asking = Questions.ask(_prompts_of(suite, relation_id), suite.tokenizer, device=suite.device)
        prompts = _before(suite, tokens)

        def figures(model: Any, *, ban: bool = False, about: tuple = (tokens, neighbours, asking, prompts)) -> dict:
            concept_ids, near, questions, beginnings = about
            return dataclasses.asdict(
                measure(
                    model,
                    concept=concept_ids,
                    neighbours=near,
                    asking=questions,
                    prompts=beginnings,
                    text=windows,
                    ban=ban,
                )
            )

        found = {"nothing": figures(suite.model), "ban while decoding": figures(suite.model, ban=True)}
        for level, counts in (("values", VALUES), ("rows", ROWS)):
            for count in counts:
                editor = Editor(memory)
                lowered = editor.suppress(tokens.to(suite.device), level=level, count=count, top=TOP)
                found[f"{level}, {len(lowered):,}"] = figures(editor.memory.model)
        editor, everyone = Editor(memory), torch.arange(memory.vocab_size)
        for layer in memory.layers:
            rows = lowered_rows(memory, memory.rows(everyone, layer=layer), tokens, strength=1.0)
            editor.set_rows(everyone, layer=layer, rows=rows)
        found["rows, all"] = figures(editor.memory.model)
        results[concept] = {
            "tokens": [suite.tokenizer.token(token) for token in tokens.tolist()],
            "neighbours": [suite.tokenizer.token(token) for token in neighbours.tolist()],
            "methods": found,
        }
    return results


def _prompts_of(suite: Suite, relation_id: str) -> list[str]:
    """Prompts whose answer the model knows."""
    requests = [case.record["requested_rewrite"] for kind in (1, 2) for case in suite.known[kind]]
    asked = [request for request in requests if request["relation_id"] == relation_id]
    return [request["prompt"].format(request["subject"]) for request in asked[:PROMPTS]]


def _before(suite: Suite, tokens: torch.Tensor) -> Questions:
    """Beginnings of held-out text that a token of the concept follows."""
    stream, length = suite.held_out, min(24, suite.model.config.max_seq_len // 2)
    places = torch.isin(stream, tokens).nonzero()[:, 0]
    places = places[places >= length]
    chosen = places[:: max(1, len(places) // PROMPTS)][:PROMPTS].tolist()
    return Questions.of(
        [stream[place - length : place].tolist() for place in chosen],
        boundary_id=suite.tokenizer.boundary_id,
        device=suite.device,
    )


def injection(suite: Suite) -> dict[str, Any]:
    """New tokens that know a fact by rows alone, and old ones that forget theirs with their rows."""
    if suite.is_dense:
        return {}
    return {"new": _new_tokens(suite), "disabled": _disabled(suite)}


def _new_tokens(suite: Suite) -> dict[str, Any]:
    """Tokens made new (an average name's embedding, no rows) get one fact each by their rows in all layers."""
    memory, layers = TokenMemory(suite.model), range(suite.model.config.num_layers)
    singles = sorted({case.token for case in suite.cases if len(case.subject) == 1})
    embedding = suite.model.embed(torch.tensor(singles, device=suite.device)).mean(dim=0)
    names = spare_names(suite.tokenizer, count=NEW_TOKENS, taken=_taken(suite))
    editor = Editor(memory)
    tokens = [suite.tokenizer.encode(f" {name}")[0] for name in names]
    for token in tokens:
        editor.inject(token, embedding=embedding.clone())
    blank = editor.patch.apply(suite.model)
    average = torch.stack([memory.rows(torch.tensor(singles), layer=layer).mean(dim=0) for layer in layers])  # (L, D)
    cases = []
    for name, case in zip(names, suite.dev + suite.test, strict=False):
        record = {**case.record, "subject_tokens": 1, "same_subject": [], "same_last_token": []}
        old = case.record["requested_rewrite"]["subject"]
        record["requested_rewrite"] = {**case.record["requested_rewrite"], "subject": name}
        record["paraphrase_prompts"] = [prompt.replace(old, name) for prompt in case.record["paraphrase_prompts"]]
        record["portability"] = {"alias": [], "inverse": [], "two_hop": []}
        cases.append(make_case(record, suite.tokenizer, device=suite.device))
    for token in tokens:
        editor.inject(token, rows=average)
    usual = editor.patch.apply(suite.model)
    vectors = search_vectors(
        usual, cases, layers=list(layers), contexts=suite.bench.contexts, tokenizer=suite.tokenizer, search=Search(),
    )  # fmt: skip
    for token, found in zip(tokens, vectors, strict=True):
        editor.inject(token, rows=average + found)
    states = {"no rows": blank, "rows of an average name": usual, "rows found by gradient": editor.memory.model}
    return {
        name: dataclasses.asdict(summarise([score(model, case) for case in cases])) for name, model in states.items()
    }


def _taken(suite: Suite) -> set[int]:
    return {token for case in suite.cases for token in (*case.subject, case.new, case.true)}


def _disabled(suite: Suite) -> dict[str, Any]:
    """Subjects whose rows are zero in all layers."""
    memory = TokenMemory(suite.model)
    length = min(WINDOW, suite.model.config.max_seq_len)
    windows = TextWindows(suite.held_out, length=length, device=suite.device)
    cases = suite.test
    scores = []
    for case in cases:
        editor = Editor(memory)
        for layer in memory.layers:
            editor.scale_row(case.token, layer=layer, factor=0.0)
        figures = score(editor.memory.model, case)
        found = windows.lacking(case.token, count=8)
        before, after = logits_of(suite.model, found), logits_of(editor.memory.model, found)
        figures["lacking_identical"] = float(text_effect(before, after, found, token_id=None).identical)
        scores.append(figures)
    return summarised_by_kind(cases, scores)
