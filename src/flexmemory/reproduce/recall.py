"""Whether recall tasks fall more than reasoning tasks when FFNs are scaled, beyond what perplexity alone predicts.

By accuracy, where tasks are above chance, and by the gain (`evaluate.gain`), which is graded and 0 for a model that
does not use the context. Falls are relative to the whole model. What perplexity predicts is a parabola in held-out nats
through the gains of all whole models of the study; its residuals say how far models of one perplexity differ. Errors
over documents are a jackknife over blocks of them, so all models are paired. Dimension key: M models, B blocks.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float

from flexmemory.evaluate.tasks import Metric
from flexmemory.reproduce.found import Entry, Found, accuracy, has_gains
from flexmemory.reproduce.study import RECALL, TASKS
from flexmemory.reproduce.verdict import Claim, percent, verdict_of

CHANCE = {
    "lambada_openai": 0.0, "arc_easy": 0.25, "sciq": 0.25, "social_iqa": 1 / 3, "hellaswag": 0.25,
    "winogrande": 0.5, "boolq": 0.62, "piqa": 0.5,
}  # fmt: skip
"""Accuracy of guessing; of BoolQ that of always saying what is right more often."""
VARIANTS = ("base", "memory", "flex3")
ALPHA = 0.5
SURE = 3.0
"""Standard errors by which a gain must be above 0."""
_SOURCE = "Table 1, Fig. 7"
_PAPER = "LAMBADA -70 %, ARC-Easy -39 %; BoolQ -1 %, PIQA -3 %, HellaSwag -11 %"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Falls:
    """Of one model at `ALPHA`, by task: those whose gain is above 0 by more than `SURE` errors."""

    model: str
    fall: dict[str, Metric]
    """Change of the gain, relative to the whole model's."""
    beyond: dict[str, Metric]
    """The same, less what the rise of perplexity predicts."""


def recall_claims(found: Found) -> Iterator[Claim]:
    """By accuracy, and by gain where it was measured."""
    yield _by_accuracy(found)
    if found.graded:
        all_falls = falls(found)
        name = f"By gain, at alpha {ALPHA:g} recall tasks fall far more than reasoning tasks"
        yield _by_gain(name, [(each.model, contrast(each.fall)) for each in all_falls], paper=_PAPER)
        name = f"By gain, at alpha {ALPHA:g} recall tasks fall more than perplexity predicts, beside reasoning tasks"
        yield _by_gain(name, [(each.model, contrast(each.beyond)) for each in all_falls], paper="not asked")


def falls(found: Found) -> list[Falls]:
    """Of all models that were probed with their gains."""
    result = []
    for model, whole, scaled in graded_pairs(found):
        tasks = [task for task in TASKS if is_sure(whole, task)]
        beyond = {task: fall_beyond(found, whole, scaled, task) for task in tasks}
        result.append(
            Falls(
                model=model,
                fall={task: fall(whole, scaled, task) for task in tasks},
                beyond={task: found_fall for task, found_fall in beyond.items() if found_fall is not None},
            )
        )
    return result


def graded_pairs(found: Found) -> Iterator[tuple[str, Entry, Entry]]:
    """Models whose gains were measured, whole and scaled: the study's, and those from elsewhere."""
    for size in found.sizes:
        for variant in VARIANTS:
            whole, scaled = found.probe(size, variant), found.probe(size, variant, alpha=ALPHA)
            if whole is not None and scaled is not None and has_gains(whole):
                yield f"{size} {variant}", whole, scaled
    entries = list(found.parts["models"].values())
    for whole in entries:
        scaled = next((each for each in entries if (each["model"], each["alpha"]) == (whole["model"], ALPHA)), None)
        if whole["alpha"] == 1 and scaled is not None and has_gains(whole):
            yield whole["model"], whole, scaled


def is_sure(entry: Entry, task: str) -> bool:
    """Whether a model uses the context of a task: its gain is above 0 by more than `SURE` errors."""
    gain = entry["tasks"][task]["gain"]
    return gain["stderr"] is not None and gain["value"] > SURE * gain["stderr"]


def fall(whole: Entry, scaled: Entry, task: str) -> Metric:
    """Relative change of the gain from one model to another on the same documents."""
    before, after = _blocks(whole, task), _blocks(scaled, task)
    return _jackknife(lambda kept: after[kept].mean() / before[kept].mean() - 1, len(before))


def fall_beyond(found: Found, whole: Entry, scaled: Entry, task: str) -> Metric | None:
    """`fall` less that of the curve between both perplexities; the error has the scatter around the curve, too.

    None where fewer than four whole models were judged on the same documents.
    """
    count = whole["tasks"][task]["documents"]
    models = [run for run in found.graded if run["tasks"][task]["documents"] == count]
    models = [run for run in models if math.isfinite(found.nats(run))]
    if len(models) < 4:
        return None
    nats = np.array([found.nats(run) for run in models])
    gains = np.array([_blocks(run, task) for run in models])  # (M, B)
    powers = _powers(nats)
    fit: Float[np.ndarray, "3 M"] = np.linalg.pinv(powers)
    between = (_powers(np.array([found.nats(scaled)])) - _powers(np.array([found.nats(whole)]))) @ fit  # (1, M)
    before, after = _blocks(whole, task), _blocks(scaled, task)
    excess = after - before - (between @ gains)[0]  # (B,)
    found_fall = _jackknife(lambda kept: excess[kept].mean() / before[kept].mean(), len(before))
    means = gains.mean(axis=1)
    left_over = means - powers @ fit @ means
    scatter = math.sqrt(float(left_over @ left_over) / max(1, len(models) - 3)) / before.mean()
    return Metric(found_fall.value, math.hypot(found_fall.stderr, scatter))


def contrast(changes: dict[str, Metric]) -> Metric | None:
    """Mean over recall tasks less that over reasoning tasks; below 0 recall falls more. None without both kinds."""
    kinds = [[changes[task] for task in changes if (task in RECALL) is recall] for recall in (True, False)]
    if not all(kinds):
        return None
    recall, reasoning = (statistics.mean(metric.value for metric in kind) for kind in kinds)
    squares = (sum(metric.stderr**2 for metric in kind) / len(kind) ** 2 for kind in kinds)
    return Metric(recall - reasoning, math.sqrt(sum(squares)))


def _blocks(entry: Entry, task: str) -> Float[np.ndarray, " B"]:
    return np.array(entry["tasks"][task]["gain"]["blocks"])


def _powers(nats: Float[np.ndarray, " M"]) -> Float[np.ndarray, "M 3"]:
    return np.stack([np.ones_like(nats), nats, nats**2], axis=1)


def _jackknife(value_of: Callable[[np.ndarray], float], count: int) -> Metric:
    """A value of all blocks, and its error from what it is without each."""
    without = np.array([value_of(np.arange(count) != block) for block in range(count)])
    stderr = math.sqrt((count - 1) / count * float(((without - without.mean()) ** 2).sum()))
    return Metric(float(value_of(np.ones(count, dtype=bool))), stderr)


def _by_gain(claim: str, contrasts: list[tuple[str, Metric | None]], *, paper: str) -> Claim:
    known = [(model, each) for model, each in contrasts if each is not None]
    points = [f"{100 * each.value:+.1f} ± {100 * each.stderr:.1f} ({model})" for model, each in known]
    told = [each.value < 0 for _, each in known if abs(each.value) > 2 * each.stderr]
    return Claim(
        source=_SOURCE, claim=claim, paper=paper,
        ours=f"recall less reasoning, points: {', '.join(points) or 'none'}",
        verdict=verdict_of(told, told),
        rule=f"below 0 where it is 2 standard errors from it; tasks whose gain is {SURE:g} errors above 0",
    )  # fmt: skip


def _above_chance(entry: Entry, task: str) -> bool:
    value, stderr = accuracy(entry, task)
    return value - CHANCE[task] > max(0.02, 4 * stderr)


def _by_accuracy(found: Found) -> Claim:
    changes: dict[bool, list[float]] = {True: [], False: []}
    said: list[str] = []
    for size in found.sizes:
        for variant in VARIANTS:
            whole, half = found.probe(size, variant), found.probe(size, variant, alpha=ALPHA)
            if whole is None or half is None:
                continue
            for task in TASKS:
                if task in whole["tasks"] and _above_chance(whole, task):
                    before, after = accuracy(whole, task)[0] - CHANCE[task], accuracy(half, task)[0] - CHANCE[task]
                    changes[task in RECALL].append(after / before - 1)
                    said.append(f"{task} {percent(after / before - 1)} ({size}-{variant})")
    enough = bool(changes[True]) and bool(changes[False])
    lower = enough and statistics.mean(changes[True]) < statistics.mean(changes[False])
    return Claim(
        source=_SOURCE, claim="At alpha 0.5 recall tasks fall far more than reasoning tasks", paper=_PAPER,
        ours=f"tasks above chance, change of what is above it: {'; '.join(said) or 'none'}",
        verdict=verdict_of([lower], [True]) if enough else "cannot be told here",
        rule="needs tasks of both kinds by more than 4 standard errors (and 2 points) above chance",
    )  # fmt: skip
