"""The study's results, read for the page: what was found where, by name."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexmemory.storage import read_json

PARTS = ("speed", "quality", "probes", "pruning", "compression", "cells", "models", "cost")
Entry = Mapping[str, Any]


def has_gains(entry: Entry) -> bool:
    """Whether gains of a model were measured, beside its accuracies."""
    return bool(entry["tasks"]) and all("gain" in task for task in entry["tasks"].values())


class Found:
    """Entries of each part; a part that was not measured has none."""

    def __init__(self, folder: Path) -> None:
        """Read the folder.

        Raises:
            FileNotFoundError: no run was judged.
        """
        if not (folder / "quality.json").exists():
            raise FileNotFoundError(f"{folder} has no quality.json: run `flexmemory reproduce` first")
        files = {part: read_json(folder / f"{part}.json") for part in PARTS if (folder / f"{part}.json").exists()}
        self.parts: dict[str, dict[str, Entry]] = {part: {} for part in PARTS}
        self.parts |= {part: file["entries"] for part, file in files.items()}
        self.cost = [entry for name, entry in self.parts["cost"].items() if name.startswith("1b-")]
        self.provenance: dict[str, list[dict[str, str]]] = {part: file["provenance"] for part, file in files.items()}
        runs = list(self.parts["quality"].values())
        self.sizes = list(dict.fromkeys(run["size"] for run in runs))
        self.text = "held-out"
        self.has_tasks = any(run["tasks"] for run in runs)
        self.graded = [run for run in runs if has_gains(run)]
        """Runs whose gains were measured."""

    def tokens(self, size: str) -> int:
        """Tokens of the reference runs of a size: those at which all variants are."""
        runs = [run for run in self.parts["quality"].values() if run["size"] == size]
        return statistics.mode(run["tokens"] for run in runs)

    def lr(self, size: str) -> float:
        """The learning rate of the reference runs: the base's best at their tokens."""
        return min(self.swept(size, "base")[self.tokens(size)], key=lambda run: self.nats(run))["lr"]

    def _runs(self, size: str, variant: str) -> list[Entry]:
        return [run for run in self.parts["quality"].values() if (run["size"], run["variant"]) == (size, variant)]

    def run(
        self, size: str, variant: str, *, tokens: int | None = None, seed: int = 0, lr: float | None = None
    ) -> Entry | None:
        """A run, by default at the reference tokens and learning rate; None where there is none."""
        wanted = (tokens or self.tokens(size), seed, lr or self.lr(size))
        return next(
            (run for run in self._runs(size, variant) if (run["tokens"], run["seed"], run["lr"]) == wanted), None
        )

    def budgets(self, size: str, variant: str) -> list[Entry]:
        """Runs of seed 0 at the reference rate by rising tokens."""
        found = [run for run in self._runs(size, variant) if run["seed"] == 0 and run["lr"] == self.lr(size)]
        return sorted(found, key=lambda run: run["tokens"])

    def swept(self, size: str, variant: str) -> dict[int, list[Entry]]:
        """Runs of seed 0 by tokens, at each the learning rates in rising order."""
        runs: dict[int, list[Entry]] = {}
        for run in sorted(self._runs(size, variant), key=lambda run: (run["tokens"], run["lr"])):
            if run["seed"] == 0:
                runs.setdefault(run["tokens"], []).append(run)
        return runs

    def equal_time(self, size: str, variant: str) -> tuple[Entry, Entry] | None:
        """The base, and a run of about as many tokens as a variant takes in its training time, at one rate."""
        speed = self.parts["speed"]
        ratio = speed[f"{size}-{variant}"]["tokens_per_s"] / speed[f"{size}-base"]["tokens_per_s"]
        wanted = self.tokens(size) * ratio
        for run in sorted(self._runs(size, variant), key=lambda run: abs(run["tokens"] - wanted)):
            base = self.run(size, "base", lr=run["lr"])
            if base is not None and abs(run["tokens"] / wanted - 1) < 0.01:
                return base, run
        return None

    def nats(self, entry: Entry, text: str | None = None) -> float:
        """Nats a token of a text, by default the held-out one."""
        return entry["texts"][text or self.text]["nats"]

    def ppl(self, entry: Entry, text: str | None = None) -> float:
        """Perplexity of a text."""
        return math.exp(self.nats(entry, text))

    def seed_deviation(self) -> float | None:
        """Standard deviation of nats between seeds, pooled over all that were trained with several."""
        groups: dict[Any, list[float]] = {}
        for run in self.parts["quality"].values():
            groups.setdefault((run["size"], run["variant"], run["tokens"], run["lr"]), []).append(self.nats(run))
        several = [group for group in groups.values() if len(group) > 1]
        if not several:
            return None
        squares = sum(statistics.variance(group) * (len(group) - 1) for group in several)
        return math.sqrt(squares / sum(len(group) - 1 for group in several))

    def probe(self, size: str, variant: str, *, alpha: float = 1.0, layer: int | None = None) -> Entry | None:
        """A model with its FFNs scaled, or without one."""
        name = f"{size}-{variant} " + (f"alpha {alpha:g}" if layer is None else f"without {layer}")
        return self.parts["probes"].get(name)

    def layers(self, size: str, variant: str) -> list[Entry]:
        """Probes of one left out after the other."""
        found = (self.probe(size, variant, layer=layer) for layer in itertools.count())
        return list(itertools.takewhile(lambda entry: entry is not None, found))  # pyright: ignore[reportReturnType]


def metric_of(task: str) -> str:
    """What the paper reports of a task: accuracy, normalised by length where the harness has that."""
    return "acc_norm" if task in ("arc_easy", "hellaswag", "sciq", "piqa") else "acc"


def accuracy(entry: Entry, task: str) -> tuple[float, float]:
    """Of a task, with its standard error."""
    found = entry["tasks"][task]["metrics"][metric_of(task)]
    return found["value"], found["stderr"] or math.nan
