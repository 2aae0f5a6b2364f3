"""How well an edit of a fact took, and what it did to other facts: CounterFact's figures, per record.

Efficacy (ES), paraphrase (PS) and neighbourhood success (NS) and their magnitudes (EM, PM, NM) as in ROME's evaluation
(arXiv 2202.05262): p(new) > p(true) in the prompt and its paraphrases, p(true) > p(new) for neighbours. Beyond that:
exact match by free generation; other facts of the subject; the same relation of subjects that end in the same token;
and portability. Everything of a record is asked in one batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from flexmemory.evaluate.questions import Questions, word_id
from flexmemory.model.transformer import Transformer
from flexmemory.tokenizer import Tokenizer

PORTABILITY = ("alias", "inverse", "two_hop")
RESAMPLES = 1000
"""Of the bootstrap that gives the standard error of a harmonic mean."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A record, tokenised."""

    record: Mapping[str, Any]
    subject: tuple[int, ...]
    """The subject's tokens; row edits change the last."""
    prompt: tuple[int, ...]
    """The prompt that the edit is requested in, with the subject in its place."""
    new: int
    true: int
    questions: Questions
    """All prompts of the record; first the rewrite, and again with the new object as its answer."""
    kinds: tuple[str, ...]
    """What each prompt is asked for."""
    after: tuple[int, ...]
    """The right answer to each after a perfect edit."""
    before: tuple[int | None, ...]
    """And before it, where there is one."""

    @property
    def token(self) -> int:
        """The token whose row is edited."""
        return self.subject[-1]


def make_case(record: Mapping[str, Any], tokenizer: Tokenizer, *, device: torch.device) -> Case:
    """Tokenise a record.

    Raises:
        ValueError: an object is not one token, or the subject has other tokens than the record says.
    """
    request = record["requested_rewrite"]
    subject = tuple(tokenizer.encode(f" {request['subject']}"))
    if len(subject) != record["subject_tokens"]:
        raise ValueError(f"{request['subject']!r} is {len(subject)} tokens, not {record['subject_tokens']}")
    new, true = (word_id(request[which]["str"], tokenizer) for which in ("target_new", "target_true"))
    rewrite = tokenizer.encode(request["prompt"].format(request["subject"]))
    stop = tokenizer.encode(".")[0]
    asked: list[tuple[str, list[int], int, int | None]] = [
        ("rewrite", rewrite, new, true),
        ("stop", [*rewrite, new], stop, None),
    ]
    asked += [("paraphrase", tokenizer.encode(prompt), new, true) for prompt in record["paraphrase_prompts"]]
    asked += [("neighbour", tokenizer.encode(prompt), true, true) for prompt in record["neighborhood_prompts"]]
    for kind in ("same_subject", "same_last_token"):
        for question in record[kind]:
            answer = word_id(question["target"], tokenizer)
            asked.append((kind, tokenizer.encode(question["prompt"]), answer, answer))
    for kind in PORTABILITY:
        for question in record["portability"][kind]:
            before = word_id(question["before"], tokenizer) if question["before"] else None
            asked.append((kind, tokenizer.encode(question["prompt"]), word_id(question["target"], tokenizer), before))
    kinds, prompts, after, before = zip(*asked, strict=True)
    questions = Questions.of(prompts, boundary_id=tokenizer.boundary_id, device=device)
    return Case(
        record=record, subject=subject, prompt=tuple(rewrite), new=new, true=true, questions=questions, kinds=kinds,
        after=after, before=before,
    )  # fmt: skip


Scores = dict[str, float]
"""Figures of one record; what it has no prompts for is left out."""


@torch.no_grad()
def score(model: Transformer, case: Case) -> Scores:
    """Ask `model`, edited or not, everything of a record."""
    log_probs = case.questions.log_probs(model).cpu()  # (N, V)
    best = log_probs.argmax(dim=1).tolist()
    probs = log_probs[:, [case.new, case.true]].exp()
    gains = probs[:, 0] - probs[:, 1]
    if case.new == case.true:
        raise ValueError("the new object is the true one; nothing to edit")

    def mean(kind: str, values: Sequence[float | bool]) -> dict[str, float]:
        chosen = [float(value) for at, value in zip(case.kinds, values, strict=True) if at == kind]
        return {kind: sum(chosen) / len(chosen)} if chosen else {}

    wins, losses = (gains > 0).tolist(), (gains < 0).tolist()
    figures = {
        "ES": mean("rewrite", wins)["rewrite"],
        "EM": float(gains[0]),
        "PS": mean("paraphrase", wins)["paraphrase"],
        "PM": mean("paraphrase", gains.tolist())["paraphrase"],
        "exact": float(best[0] == case.new and best[1] == case.after[1]),
        "known": float(best[0] == case.true),
    }
    if "neighbour" in case.kinds:
        figures |= {
            "NS": mean("neighbour", losses)["neighbour"],
            "NM": mean("neighbour", (-gains).tolist())["neighbour"],
        }
    right = [answer == wanted for answer, wanted in zip(best, case.after, strict=True)]
    for kind in ("paraphrase", "neighbour", "same_subject", "same_last_token", *PORTABILITY):
        figures |= {f"{kind}_right": value for value in mean(kind, right).values()}
    was = [answer == wanted for answer, wanted in zip(best, case.before, strict=True)]
    for kind in ("paraphrase", *PORTABILITY):
        asked = [value for at, value, wanted in zip(case.kinds, was, case.before, strict=True) if at == kind and wanted]
        figures |= {f"{kind}_before": sum(asked) / len(asked)} if asked else {}
    return figures


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Means over records and their standard errors."""

    count: int
    means: dict[str, float]
    stderrs: dict[str, float]
    """nan of a single record."""


def summarise(scores: Sequence[Scores], *, seed: int = 0) -> Summary:
    """Means over the records that have each figure; `score` is the harmonic mean of ES, PS and NS.

    Raises:
        ValueError: there are no records.
    """
    if not scores:
        raise ValueError("there are no records to summarise")
    means, stderrs = {}, {}
    for name in dict.fromkeys(name for each in scores for name in each):
        values = torch.tensor([each[name] for each in scores if name in each], dtype=torch.float64)
        means[name] = float(values.mean())
        stderrs[name] = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    three = [[each[name] for name in ("ES", "PS", "NS")] for each in scores if {"ES", "PS", "NS"} <= each.keys()]
    if three:
        values = torch.tensor(three, dtype=torch.float64)  # (records, 3)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
        means["score"] = float(_harmonic(values.mean(dim=0)))
        stderrs["score"] = float(_harmonic(values[drawn].mean(dim=1)).std()) if len(values) > 1 else math.nan
    return Summary(count=len(scores), means=means, stderrs=stderrs)


def _harmonic(rates: Float[Tensor, "*N 3"]) -> Float[Tensor, "*N"]:
    return 3 / (1 / rates.clamp(min=1e-12)).sum(dim=-1)
