"""Who else moves: how far an edit moves every token's row, exactly, before it is applied.

Edits of rows move nobody else: zero, by construction and bit for bit. Edits of values and keys move every token that
uses these cells, by c'(t) v' - c(t) v summed over the changed cells, at the cost of a pass over the vocabulary with
these cells. It is about rows; what attention makes of an edited row at later positions is not in it.
Dimension key: V vocabulary, U tokens at once, P layers that the edit touches, S changed cells, R vectors that changes
are sums of, D model width.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from flexmemory.interpret.kept import Kept, all_coefficients, holds_coefficients, row_lengths
from flexmemory.interpret.patch import Patch
from flexmemory.interpret.precise import precise_memory
from flexmemory.interpret.rank_one import smoothed
from flexmemory.interpret.tkv import TokenMemory
from flexmemory.model.transformer import Transformer

EPSILON = 1e-2
"""A row moved that moved by more than this share of the mean length of its layer's rows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spill:
    """How far rows move."""

    layers: tuple[int, ...]
    """The layers that the edit touches; in the others no row moves."""
    tokens: tuple[int, ...]
    """The tokens that the edit is about, which `others` leaves out."""
    moved: Float[Tensor, "V P"]
    """Length of the change of each token's row."""
    memory: TokenMemory
    """What would be edited."""

    kept: Kept
    """What is known of the memory."""

    @functools.cached_property
    def lengths(self) -> Float[Tensor, "V P"]:
        """Length of each token's row before; unless they are kept, a pass over the vocabulary when first asked for."""
        return torch.stack([row_lengths(self.memory, layer=layer, kept=self.kept) for layer in self.layers], dim=1)

    @property
    def others(self) -> Bool[Tensor, " V"]:
        """All tokens but those that the edit is about."""
        mask = torch.ones(len(self.moved), dtype=torch.bool)
        mask[list(self.tokens)] = False
        return mask

    def worst(self, count: int) -> list[tuple[int, int, float]]:
        """The other tokens' rows that move farthest: (token, layer, how far), those that do not move left out."""
        moved = self.moved * self.others[:, None]
        best = moved.flatten().topk(min(count, moved.numel()))
        places = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        width = len(self.layers)
        return [(place // width, self.layers[place % width], size) for place, size in places if size > 0]

    def summary(self, *, counts: Int64[Tensor, " V"] | None = None, epsilon: float = EPSILON) -> list[dict[str, Any]]:
        """For each layer, how far the other tokens' rows move.

        Args:
            counts: How often each token occurs, for `weighted_mean`; without them all weigh the same.
            epsilon: How far a row must move to count as moved, over the mean length of the layer's rows.

        Returns:
            For each layer: `layer`; `moved`, how many rows moved more than that; `any`, how many moved at all; `max`,
            `mean` and `weighted_mean` of the lengths of changes; `row_length`, the mean length of rows.
        """
        weights = smoothed(counts, vocab_size=len(self.moved))[self.others]
        entries = []
        for place, layer in enumerate(self.layers):
            moved, length = self.moved[self.others, place].double(), float(self.lengths[:, place].double().mean())
            entries.append({
                "layer": layer,
                "moved": int((moved > epsilon * length).sum()),
                "any": int((moved > 0).sum()),
                "max": float(moved.max()) if len(moved) else 0.0,
                "mean": float(moved.mean()) if len(moved) else 0.0,
                "weighted_mean": float((moved * weights).sum() / weights.sum()) if len(moved) else 0.0,
                "row_length": length,
            })  # fmt: skip
        return entries


@torch.no_grad()
def spill(
    memory: TokenMemory,
    patch: Patch,
    *,
    edited: Transformer | None = None,
    kept: Kept | None = None,
    progress: bool = True,
) -> Spill:
    """How far `patch` would move every token's row. Rows are computed in at least fp32.

    Args:
        memory: What it would be applied to, which is not changed.
        patch: The edit.
        edited: What the patch makes of the model, where it was made before.
        kept: What is known of memories that share weights with this one; what is found out is added.
        progress: Whether a bar is shown (on a terminal).

    Raises:
        ValueError: the patch is for another model.
    """
    kept = Kept() if kept is None else kept
    edited = patch.apply(memory.model) if edited is None else edited
    has_embedding = any(step.kind == "embedding" for step in patch.steps)
    layers = memory.layers if has_embedding else tuple(sorted({step.layer for step in patch.steps}))
    moved = torch.zeros(memory.vocab_size, len(layers), dtype=torch.float64)
    bar = tqdm(layers, desc="rows that move", unit="layer", leave=False, disable=None if progress else True)
    for place, layer in enumerate(bar):
        before, after = precise_memory(memory.model, layer=layer), precise_memory(edited, layer=layer)
        moved[:, place] = _moved_by_cells(memory, before, after, patch, layer=layer, kept=kept)
        named = _named(patch, before, after, layer)
        if len(named):
            change = after.rows(named, layer=layer).double() - before.rows(named, layer=layer).double()
            moved[named.cpu(), place] = change.norm(dim=1).cpu()
    return Spill(layers=tuple(layers), tokens=patch.tokens, moved=moved, memory=memory, kept=kept)


def _changed_cells(patch: Patch, layer: int, num_keys: int) -> Int64[Tensor, " S"]:
    """The cells of a layer whose key, gate or value changes."""
    steps = [step for step in patch.steps if step.layer == layer]
    if any(step.kind == "outer" for step in steps):
        return torch.arange(num_keys)
    ids = [step.ids for step in steps if step.kind in ("keys", "gates", "values") and step.ids is not None]
    return torch.cat([torch.empty(0, dtype=torch.int64), *ids]).unique()


def _named(patch: Patch, before: TokenMemory, after: TokenMemory, layer: int) -> Int64[Tensor, " U"]:
    """The tokens whose rows do not follow from changed cells alone: rows that are given, and changed embeddings."""
    given = [memory.model.memories[layer].given for memory in (before, after)]
    ids = [rows.ids.cpu() for rows in given if rows is not None]
    ids += [step.ids for step in patch.steps if step.kind == "embedding" and step.ids is not None]
    return torch.cat([torch.empty(0, dtype=torch.int64), *ids]).unique()


def _moved_by_cells(
    memory: TokenMemory, before: TokenMemory, after: TokenMemory, patch: Patch, *, layer: int, kept: Kept
) -> Float[Tensor, " V"]:
    """How far changed cells move rows: (c' - c) v' + c (v' - v) of each, which keeps the digits of small changes."""
    cells = _changed_cells(patch, layer, memory.num_keys).to(memory.model.device)
    if not len(cells):
        return torch.zeros(memory.vocab_size, dtype=torch.float64)
    every = len(cells) == memory.num_keys
    here = slice(None) if every else cells
    new = after.values(layer)[here]
    change = new - before.values(layer)[here]
    if any(step.layer == layer and step.kind in ("keys", "gates") for step in patch.steps):
        lengths = SumLengths(torch.cat((new, change)))
        chunks = (before.queries(ids, layer=layer) for ids in memory.vocabulary_chunks())
        pairs = ([_at(each, queries, cells, layer=layer) for each in (before, after)] for queries in chunks)
        parts = [lengths.of(torch.cat((now - old, old), dim=1)) for old, now in pairs]
    elif every or holds_coefficients(memory, kept):
        lengths = SumLengths(change)
        found = all_coefficients(memory, layer=layer, kept=kept)
        parts = [lengths.of(c if every else c.index_select(1, cells), at_most=size) for c, size in found]
    else:
        lengths = SumLengths(change)
        chunks = (before.queries(ids, layer=layer) for ids in memory.vocabulary_chunks())
        parts = [lengths.of(_at(before, queries, cells, layer=layer)) for queries in chunks]
    return torch.cat(parts).double().cpu()


def _at(
    memory: TokenMemory, queries: Float[Tensor, "U D"], cells: Int64[Tensor, " S"], *, layer: int
) -> Float[Tensor, "U S"]:
    """Coefficients of some cells."""
    keys, gates = memory.keys(layer)[cells], memory.gates(layer)[cells]
    return (queries @ keys.T) * F.silu(queries @ gates.T)


class SumLengths:
    """Lengths of weighted sums of the same vectors, in fewer steps than making the sums."""

    def __init__(self, vectors: Float[Tensor, "R D"]) -> None:
        """Prepare: fewer vectors than dimensions are turned into as few, which changes no length.

        Most changes of W_down are one outer product, rounded: vectors along one line but for rounding. Their sums are
        then as long as along this line, but for what rounding makes of them, which is bounded.
        """
        if len(vectors) < vectors.shape[1]:
            vectors = torch.linalg.qr(vectors.T, mode="r").R.T  # (R, R)
        self._vectors = vectors
        exact = vectors.double()
        line = F.normalize(exact[exact.norm(dim=1).argmax()], dim=0)
        along = exact @ line
        self._along = along.to(vectors)
        self._off = float((exact - torch.outer(along, line)).norm())

    def of(self, weights: Float[Tensor, "U R"], *, at_most: Float[Tensor, " U"] | None = None) -> Float[Tensor, " U"]:
        """The length of each sum; weights are no longer than `at_most`, where that is known."""
        lengths = (weights @ self._along).abs()
        sizes = weights.norm(dim=1) if at_most is None else at_most
        # sqrt(a^2 + b^2) is a but for 4 epsilon, no more than what sums are rounded by, where b <= a sqrt(8 epsilon).
        unsure = self._off * sizes > lengths * (8 * torch.finfo(weights.dtype).eps) ** 0.5
        if unsure.any():
            lengths[unsure] = (weights[unsure] @ self._vectors).norm(dim=1)
        return lengths
