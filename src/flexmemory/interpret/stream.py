"""One pass over the vocabulary: coefficients of a layer, a chunk of tokens at a time, given to reducers.

|V| x K coefficients never exist at once (1.4 GB a layer at the 1B shape in 16 bit, 34 GB in all). Results are exact:
the chunk size changes them by rounding alone. Dimension key: U tokens of a chunk, N tokens of the pass, K cells.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor
from tqdm import tqdm

from flexmemory.interpret.tkv import VOCABULARY_CHUNK, TokenMemory


@runtime_checkable
class Reducer(Protocol):
    """What keeps something of every chunk."""

    def update(self, token_ids: Int[Tensor, " U"], coefficients: Float[Tensor, "U K"]) -> None:
        """Take the coefficients of some tokens; each token comes once."""
        ...

    def result(self) -> Any:
        """What was kept of the tokens so far.

        Raises:
            ValueError: there were none.
        """
        ...


@torch.no_grad()
def enumerate_layer(
    memory: TokenMemory,
    *,
    layer: int,
    reducers: Sequence[Reducer],
    token_ids: Int[Tensor, " N"] | None = None,
    chunk_tokens: int = VOCABULARY_CHUNK,
    progress: bool = True,
) -> None:
    """Give every token's coefficients to every reducer, in the order of the ids.

    Args:
        memory: Whose coefficients.
        layer: Of which layer.
        reducers: They are updated; ask them for their results.
        token_ids: Distinct ids; by default the vocabulary.
        chunk_tokens: Tokens whose coefficients exist at once.
        progress: Whether a bar is shown (on a terminal).

    Raises:
        ValueError: the layer cannot be read, or an id is out of range.
    """
    ids = torch.arange(memory.vocab_size) if token_ids is None else token_ids
    with tqdm(
        total=len(ids), desc=f"layer {layer}", unit="token", leave=False, disable=None if progress else True
    ) as bar:
        for part in ids.to(memory.model.device).split(chunk_tokens):
            coefficients = memory.coefficients(part, layer=layer)
            for reducer in reducers:
                reducer.update(part, coefficients)
            bar.update(len(part))


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLists:
    """Tokens of each cell, the most extreme first."""

    positive_ids: Int64[Tensor, "K N"]
    """Of the largest coefficients."""
    positive: Float[Tensor, "K N"]
    negative_ids: Int64[Tensor, "K N"]
    """Of the smallest coefficients."""
    negative: Float[Tensor, "K N"]


class TopTokens:
    """For each cell the tokens of the largest and of the smallest coefficients."""

    def __init__(self, count: int, *, mask: Bool[Tensor, " V"] | None = None) -> None:
        """Keep `count` on either side, of tokens in `mask` alone."""
        self._count, self._mask = count, mask
        self._sides: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, token_ids: Int[Tensor, " U"], coefficients: Float[Tensor, "U K"]) -> None:
        """Merge a chunk's extremes with those that are kept."""
        if self._mask is not None:
            kept = self._mask.to(token_ids.device)[token_ids]
            token_ids, coefficients = token_ids[kept], coefficients[kept]
        by_key = coefficients.T
        for sign in (1, -1):
            best = by_key.topk(min(self._count, len(token_ids)), dim=1, largest=sign > 0)
            ids, values = token_ids[best.indices], best.values
            if sign in self._sides:
                ids = torch.cat([self._sides[sign][0], ids], dim=1)
                values = torch.cat([self._sides[sign][1], values], dim=1)
                best = values.topk(min(self._count, values.shape[1]), dim=1, largest=sign > 0)
                ids, values = ids.gather(1, best.indices), best.values
            self._sides[sign] = (ids, values)

    def result(self) -> TokenLists:
        """The lists, shorter than asked for where there were fewer tokens.

        Raises:
            ValueError: there were none.
        """
        if not self._sides:
            raise ValueError("no tokens were given")
        (positive_ids, positive), (negative_ids, negative) = self._sides[1], self._sides[-1]
        return TokenLists(positive_ids.long(), positive, negative_ids.long(), negative)


@dataclasses.dataclass(frozen=True, slots=True)
class KeyLists:
    """Cells of each token, the weightiest first."""

    token_ids: Int64[Tensor, " N"]
    keys: Int64[Tensor, "N count"]
    coefficients: Float[Tensor, "N count"]
    """c, with its sign."""


class TopKeys:
    """For each token the cells that matter most to its row: by |c| times the norm of the value."""

    def __init__(self, count: int, *, value_norms: Float[Tensor, " K"]) -> None:
        """Keep `count` cells a token."""
        self._count, self._norms = count, value_norms
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def update(self, token_ids: Int[Tensor, " U"], coefficients: Float[Tensor, "U K"]) -> None:
        """Take a chunk's lists."""
        weights = coefficients.abs() * self._norms.to(coefficients)
        keys = weights.topk(min(self._count, weights.shape[1]), dim=1).indices
        self._parts.append((token_ids.cpu(), keys.cpu(), coefficients.gather(1, keys).cpu()))

    def result(self) -> KeyLists:
        """The lists of all tokens, in the order in which they came.

        Raises:
            ValueError: there were none.
        """
        if not self._parts:
            raise ValueError("no tokens were given")
        ids, keys, coefficients = (torch.cat(part) for part in zip(*self._parts, strict=True))
        return KeyLists(ids.long(), keys, coefficients)


@dataclasses.dataclass(frozen=True, slots=True)
class CellMoments:
    """Statistics of each cell's coefficients over tokens, in fp64."""

    count: int
    mean: Float[Tensor, " K"]
    variance: Float[Tensor, " K"]
    """Of the population: divided by the number of tokens."""
    kurtosis: Float[Tensor, " K"]
    """Fourth central moment by the squared variance: 3 for a normal distribution; 0 where all are equal."""
    minimum: Float[Tensor, " K"]
    maximum: Float[Tensor, " K"]


class Moments:
    """Mean, variance, kurtosis and extremes of each cell."""

    def __init__(self) -> None:
        self._count = 0
        self._shift = self._low = self._high = torch.empty(0)
        self._sums = torch.empty(0)

    def update(self, token_ids: Int[Tensor, " U"], coefficients: Float[Tensor, "U K"]) -> None:
        """Add powers of the distances from the first chunk's mean."""
        values = coefficients.double()
        if not self._count:
            self._shift = values.mean(0)
            self._low = self._high = coefficients[0]
            self._sums = values.new_zeros(4, values.shape[1])
        self._count += len(token_ids)
        self._low = torch.minimum(self._low, coefficients.amin(0))
        self._high = torch.maximum(self._high, coefficients.amax(0))
        distance = values - self._shift
        power = distance
        for row in range(4):
            self._sums[row] += power.sum(0)
            power = power * distance

    def result(self) -> CellMoments:
        """The statistics.

        Raises:
            ValueError: there were no tokens.
        """
        if not self._count:
            raise ValueError("no tokens were given")
        first, second, third, fourth = self._sums / self._count
        variance = (second - first**2).clamp(min=0)
        central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
        kurtosis = torch.where(variance > 0, central / variance.square().clamp(min=1e-300), 0)
        return CellMoments(
            self._count, self._shift + first, variance, kurtosis, self._low.double(), self._high.double()
        )


class Histogram:
    """How many tokens have coefficients in each of equal bins of a cell's range; what is outside is in the end bins."""

    def __init__(self, *, low: Float[Tensor, " K"], high: Float[Tensor, " K"], bins: int = 64) -> None:
        """Divide each cell's range."""
        self._low, self._width, self._bins = low, (high - low) / bins, bins
        self._counts = torch.zeros(len(low), bins, dtype=torch.int64, device=low.device)

    def update(self, token_ids: Int[Tensor, " U"], coefficients: Float[Tensor, "U K"]) -> None:
        """Count a chunk."""
        width = torch.where(self._width > 0, self._width, 1)
        place = ((coefficients.to(self._low) - self._low) / width).floor().clamp(0, self._bins - 1).long()
        self._counts.scatter_add_(1, place.T, torch.ones_like(place.T))

    def result(self) -> Int64[Tensor, "K bins"]:
        """The counts."""
        return self._counts


class Gram:
    """The second moment of coefficients, sum over t of w(t) c(t) c(t)^T, in fp64."""

    def __init__(self, weights: Float[Tensor, " V"] | None = None) -> None:
        """Weigh each token of the vocabulary, by default with 1."""
        self._weights = weights
        self._sum: Tensor | None = None

    def update(self, token_ids: Int[Tensor, " U"], coefficients: Float[Tensor, "U K"]) -> None:
        """Add a chunk."""
        values = coefficients.double()
        weighted = values
        if self._weights is not None:
            weighted = values * self._weights.to(values)[token_ids, None]
        product = weighted.T @ values
        self._sum = product if self._sum is None else self._sum.add_(product)

    def result(self) -> Float[Tensor, "K K"]:
        """The sum.

        Raises:
            ValueError: there were no tokens.
        """
        if self._sum is None:
            raise ValueError("no tokens were given")
        return self._sum
