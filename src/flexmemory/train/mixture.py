"""The data of a run: prepared folders as one data set, each in its share of the sequences (docs/data.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from flexmemory.tokenizer import Tokenizer
from flexmemory.train.data import MixedStreams, TokenDataset


class Mixture:
    """One prepared folder or several of one tokenizer."""

    def __init__(self, datasets: Sequence[TokenDataset], *, weights: Sequence[int] | None) -> None:
        """See `open`."""
        validations = [dataset.validation for dataset in datasets if dataset.validation is not None]
        self.datasets = tuple(datasets)
        self.weights = weights
        self.train = MixedStreams([dataset.train for dataset in datasets], weights=weights)
        self.vocab_size = self.train.vocab_size
        self.validation = MixedStreams(validations) if validations else None

    @classmethod
    def open(cls, names: str | Path | Sequence[str | Path]) -> Mixture:
        """Open a folder or several, each named `DIR`, or each `DIR=WEIGHT`.

        Weights are relative shares of the training sequences. Without them each folder has that of its number of
        windows, so that together they have common epochs.

        Raises:
            FileNotFoundError: there is no such prepared data.
            ValueError: a folder is damaged, named twice or of another tokenizer than the first, or a weight is not a
                positive number or missing.
        """
        names = [names] if isinstance(names, str | Path) else names
        if not names:
            raise ValueError("no data: name at least one folder that `flexmemory prepare` wrote")
        paths, weights = zip(*map(_folder_and_weight, names), strict=True)
        for number, path in enumerate(paths):
            if path.resolve() in (other.resolve() for other in paths[:number]):
                raise ValueError(f"{path} is in the data twice; name it once, with the sum of its weights")
        if None in weights and any(weights):
            raise ValueError(f"{paths[weights.index(None)]} has no weight; give every folder one (DIR=WEIGHT), or none")
        datasets = [TokenDataset.open(path) for path in paths]
        for dataset in datasets[1:]:
            if dataset.tokenizer_fingerprint != datasets[0].tokenizer_fingerprint:
                raise ValueError(
                    f"{datasets[0].folder} and {dataset.folder} are of different tokenizers; prepare one with "
                    "--tokenizer of the other"
                )
        mixed = len(paths) > 1 and None not in weights
        return cls(datasets, weights=_whole_numbers(weights) if mixed else None)

    @property
    def fingerprint(self) -> str:
        """The folder's own; of several, theirs in order, each times its weight if it has one."""
        weights = [f"{weight}*" for weight in self.weights] if self.weights else [""] * len(self.datasets)
        return " + ".join(weight + data.fingerprint for weight, data in zip(weights, self.datasets, strict=True))

    def difference(self, fingerprint: str) -> str | None:
        """What keeps this data from being that of `fingerprint`, as the beginning of a sentence; None if it is."""
        if fingerprint == self.fingerprint:
            return None
        others = [str(data.folder) for data in self.datasets if data.fingerprint not in fingerprint]
        if others:
            return f"{' and '.join(others)} {'is' if len(others) == 1 else 'are'} not the data"
        return "the mixture (its folders, their order or weights) is not the data"

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens.

        Raises:
            ValueError: the first folder's tokenizer is another one.
        """
        return self.datasets[0].tokenizer()

    def describe(self) -> dict[str, Any]:
        """The data as a run's config.json has it."""
        folders = [
            {"path": str(data.folder.resolve()), "fingerprint": data.fingerprint, "weight": weight}
            for data, weight in zip(self.datasets, self.weights or [None] * len(self.datasets), strict=True)
        ]
        return {"fingerprint": self.fingerprint, "folders": folders}


def _folder_and_weight(name: str | Path) -> tuple[Path, Fraction | None]:
    """`DIR=WEIGHT` or `DIR` in parts; a folder of the whole name comes first."""
    folder, equals, number = str(name).rpartition("=")
    if not equals or Path(name).exists():
        return Path(name), None
    try:
        weight = Fraction(number)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"the weight of {folder} must be a number, got {number!r}") from None
    if weight <= 0:
        raise ValueError(f"the weight of {folder} must be above 0, got {number}; leave the folder out to skip it")
    return Path(folder), weight


def _whole_numbers(weights: Sequence[Fraction]) -> list[int]:
    """The smallest whole numbers of the same shares."""
    scaled = [weight * math.lcm(*(weight.denominator for weight in weights)) for weight in weights]
    return [int(weight) // math.gcd(*map(int, scaled)) for weight in scaled]
