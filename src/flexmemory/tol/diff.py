"""How far the rows of two stores are apart, layer by layer and token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from tqdm import tqdm

from flexmemory.tol.disk import DiskRows
from flexmemory.tol.store import ToLStore

CHUNK_TOKENS = 1024
"""Rows compared at once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """What two stores differ by. Errors are those of the second against the first."""

    names: tuple[str, ...]
    """What is compared: the embedding where both have it, and the layers that both have."""
    missing: tuple[str, ...]
    """What one of them lacks."""
    rms: Float[Tensor, " P"]
    """Root mean square of the errors of each."""
    relative: Float[Tensor, " P"]
    """Norm of the errors over the norm of the first store's numbers."""
    largest: Float[Tensor, " P"]
    """The largest error."""
    by_token: Float[Tensor, "V P"]
    """Norm of the error of each token's row over the norm of the first store's; 0 where both are zero."""
    moved: Float[Tensor, "V P"]
    """Norm of the error of each token's row."""

    @property
    def changed(self) -> Int64[Tensor, " P"]:
        """How many tokens' rows differ at all."""
        return (self.moved > 0).sum(dim=0)

    def to_json(self) -> dict[str, Any]:
        """All of it; `tokens` has a list for each token, in the order of `names`."""
        return {
            "names": list(self.names),
            "missing": list(self.missing),
            "rms": self.rms.tolist(),
            "relative": self.relative.tolist(),
            "largest": self.largest.tolist(),
            "changed": self.changed.tolist(),
            "tokens": self.by_token.tolist(),
        }

    def worst(self, count: int) -> list[tuple[int, str, float]]:
        """The tokens with the largest relative errors, each with what differs most, and by how much."""
        errors, places = self.by_token.max(dim=1)
        tokens = errors.argsort(descending=True, stable=True)[:count].tolist()
        return [(token, self.names[int(places[token])], float(errors[token])) for token in tokens]


def difference(first: ToLStore, second: ToLStore) -> Difference:
    """Compare all rows of two stores, whatever their codecs.

    Raises:
        OSError: a file cannot be read.
        ValueError: they are of models of different shapes, or have no layer in common.
    """
    shapes = [(store.vocab_size, store.hidden_size, store.manifest.num_layers) for store in (first, second)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{first.path} has V, D and L of {shapes[0]}, {second.path} of {shapes[1]}; give stores of one model"
        )
    held = [[store.manifest.slice_name(place) for place in range(store.num_slices)] for store in (first, second)]
    names = tuple(name for name in held[0] if name in held[1])
    if not names:
        raise ValueError(f"{first.path} and {second.path} have no layer in common")
    places = [[own.index(name) for name in names] for own in held]
    with DiskRows(first) as one, DiskRows(second) as other:

        def read(tier: DiskRows, kept: list[int], ids: Tensor) -> Tensor:
            whole = torch.empty((len(ids), tier.num_slices, tier.hidden_size), dtype=tier.dtype)
            tier.gather(ids, whole)
            return whole[:, kept]

        return compare(
            lambda ids: read(one, places[0], ids),
            lambda ids: read(other, places[1], ids),
            names=names,
            missing=tuple(sorted({*held[0], *held[1]} - set(names))),
            vocab_size=first.vocab_size,
        )


def compare(
    first: Callable[[Int64[Tensor, " U"]], Float[Tensor, "U P D"]],
    second: Callable[[Int64[Tensor, " U"]], Float[Tensor, "U P D"]],
    *,
    names: tuple[str, ...],
    missing: tuple[str, ...] = (),
    vocab_size: int,
) -> Difference:
    """Compare all rows of two sources, of which few exist at once.

    Args:
        first: The rows of some tokens, called with every token once, in order.
        second: Other rows of them.
        names: What the P slices are.
        missing: What one of them lacks.
        vocab_size: V.
    """
    errors, numbers, largest = torch.zeros(3, len(names), dtype=torch.float64)
    by_token, moved = torch.zeros(2, vocab_size, len(names))
    width = 0
    for start in tqdm(range(0, vocab_size, CHUNK_TOKENS), desc="comparing rows", unit="chunk", disable=None):
        ids = torch.arange(start, min(start + CHUNK_TOKENS, vocab_size))
        one, other = (source(ids).double() for source in (first, second))
        width, error = one.shape[2], other - one
        errors += error.square().sum(dim=(0, 2))
        numbers += one.square().sum(dim=(0, 2))
        largest = torch.maximum(largest, error.abs().amax(dim=(0, 2)))
        moved[ids] = error.norm(dim=2).float()
        by_token[ids] = _over(error.norm(dim=2), one.norm(dim=2)).float()
    return Difference(
        names=names,
        missing=missing,
        rms=(errors / (vocab_size * width)).sqrt().float(),
        relative=_over(errors.sqrt(), numbers.sqrt()).float(),
        largest=largest.float(),
        by_token=by_token,
        moved=moved,
    )


def _over(error: Tensor, size: Tensor) -> Tensor:
    """Error over size; 0 where there is no error, infinite where there is nothing but error."""
    return torch.where(error == 0, 0.0, error / size)
