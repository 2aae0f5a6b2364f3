"""How many of a token's coefficients stand out, and on how few keys its memory rests (Fig. 6b), exactly.

The paper counts "outlier coefficients per token" and does not say by what rule. Two rules here: entries far beyond the
others (O1), which depends on a scale, of the layer or of all layers together; and the number of keys that hold half of
sum c^2 (O5), which depends on none. Dimension key: U tokens of a chunk, N tokens of a pass, K keys.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from flexmemory.interpret.stream import enumerate_layer
from flexmemory.interpret.tkv import TokenMemory

SIGMAS = 6.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Magnitudes:
    """Of the absolute values of entries, |c|."""

    entries: int
    mean: float
    deviation: float

    @property
    def threshold(self) -> float:
        """What an outlier is beyond (O1): mean + 6 deviations of |c|."""
        return self.mean + SIGMAS * self.deviation

    @classmethod
    def of_all(cls, parts: list[Magnitudes]) -> Magnitudes:
        """Those of several layers together."""
        entries = sum(part.entries for part in parts)
        mean = sum(part.entries * part.mean for part in parts) / entries
        square = sum(part.entries * (part.deviation**2 + part.mean**2) for part in parts) / entries
        return cls(entries=entries, mean=mean, deviation=math.sqrt(max(square - mean**2, 0.0)))


class MagnitudeSums:
    """A reducer: `Magnitudes` of a pass."""

    def __init__(self) -> None:
        self._entries, self._sum, self._square = 0, 0.0, 0.0

    def update(self, token_ids: Int[Tensor, " U"], coefficients: Float[Tensor, "U K"]) -> None:
        """Add a chunk."""
        self._entries += coefficients.numel()
        values = coefficients.double()
        self._sum += values.abs().sum().item()
        self._square += values.square().sum().item()

    def result(self) -> Magnitudes:
        """The figures.

        Raises:
            ValueError: there were no tokens.
        """
        if not self._entries:
            raise ValueError("no tokens were given")
        mean = self._sum / self._entries
        variance = max(self._square / self._entries - mean**2, 0.0)
        return Magnitudes(entries=self._entries, mean=mean, deviation=math.sqrt(variance))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TokenOutliers:
    """Of each token in one layer; the unit of all is keys."""

    token_ids: Int64[Tensor, " N"]
    beyond: Int64[Tensor, "thresholds N"]
    """Keys with |c| above each threshold (O1)."""
    half_energy: Int64[Tensor, " N"]
    """The fewest keys that hold half of sum c^2 (O5); 0 for a token without any."""
    participation: Float[Tensor, " N"]
    """(sum c^2)^2 / sum c^4: K if all are alike, 1 if one holds everything."""


class OutlierCounts:
    """A reducer: `TokenOutliers` of a pass."""

    def __init__(self, thresholds: list[float]) -> None:
        """Count keys beyond each of `thresholds`."""
        self._thresholds = thresholds
        self._parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def update(self, token_ids: Int[Tensor, " U"], coefficients: Float[Tensor, "U K"]) -> None:
        """Count a chunk."""
        energy = coefficients.double().square()
        beyond = torch.stack([(coefficients.abs() > each).sum(dim=1) for each in self._thresholds])
        total = energy.sum(dim=1)
        held = energy.sort(dim=1, descending=True).values.cumsum(dim=1)
        half = ((held < total[:, None] / 2).sum(dim=1) + 1) * (total > 0)
        participation = total.square() / energy.square().sum(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
        self._parts.append((token_ids.long().cpu(), beyond.cpu(), half.cpu(), participation.cpu()))

    def result(self) -> TokenOutliers:
        """All tokens, in the order in which they came.

        Raises:
            ValueError: there were none.
        """
        if not self._parts:
            raise ValueError("no tokens were given")
        ids, beyond, half, participation = zip(*self._parts, strict=True)
        return TokenOutliers(
            token_ids=torch.cat(ids),
            beyond=torch.cat(beyond, dim=1),
            half_energy=torch.cat(half),
            participation=torch.cat(participation),
        )


def count_outliers(
    memory: TokenMemory, *, token_ids: Int64[Tensor, " N"] | None = None, progress: bool = True
) -> tuple[list[Magnitudes], list[TokenOutliers]]:
    """Both rules in every layer, in two passes over the tokens.

    Returns:
        Of each layer, the size of its entries; and of each token the keys beyond two thresholds, mean + 6 deviations
        of |c| in the layer and in all layers together, and on how few keys it rests.
    """
    magnitudes = []
    for layer in memory.layers:
        sums = MagnitudeSums()
        enumerate_layer(memory, layer=layer, reducers=[sums], token_ids=token_ids, progress=progress)
        magnitudes.append(sums.result())
    overall = Magnitudes.of_all(magnitudes)
    counted = []
    for layer, of_layer in zip(memory.layers, magnitudes, strict=True):
        counts = OutlierCounts([of_layer.threshold, overall.threshold])
        enumerate_layer(memory, layer=layer, reducers=[counts], token_ids=token_ids, progress=progress)
        counted.append(counts.result())
    return magnitudes, counted
