"""Who else moves: how far an edit moves every token's row, exactly, before it is applied.

Edits of rows move nobody else: zero, by construction and bit for bit. Edits of values and keys move every token that
uses these cells, by c'(t) v' - c(t) v summed over the changed cells, at the cost of a pass over the vocabulary with
these cells. It is about rows; what attention makes of an edited row at later positions is not in it.
Dimension key: V vocabulary, P layers that the edit touches, S changed cells, D model width.
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

from flexmemory.interpret.patch import Patch
from flexmemory.interpret.precise import precise_memory
from flexmemory.interpret.rank_one import smoothed
from flexmemory.interpret.tkv import TokenMemory

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

    @functools.cached_property
    def lengths(self) -> Float[Tensor, "V P"]:
        """Length of each token's row before, computed when it is first asked for: a pass over the vocabulary."""
        lengths = torch.empty_like(self.moved)
        for place, layer in enumerate(self.layers):
            before = precise_memory(self.memory.model, layer=layer)
            for ids in self.memory.vocabulary_chunks():
                lengths[ids.cpu(), place] = before.rows(ids, layer=layer).norm(dim=1).double().cpu()
        return lengths

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
def spill(memory: TokenMemory, patch: Patch, *, progress: bool = True) -> Spill:
    """How far `patch` would move every token's row. Rows are computed in at least fp32.

    Args:
        memory: What it would be applied to, which is not changed.
        patch: The edit.
        progress: Whether a bar is shown (on a terminal).

    Raises:
        ValueError: the patch is for another model.
    """
    edited = patch.apply(memory.model)
    has_embedding = any(step.kind == "embedding" for step in patch.steps)
    layers = memory.layers if has_embedding else tuple(sorted({step.layer for step in patch.steps}))
    moved = torch.zeros(memory.vocab_size, len(layers), dtype=torch.float64)
    bar = tqdm(layers, desc="rows that move", unit="layer", leave=False, disable=None if progress else True)
    for place, layer in enumerate(bar):
        before, after = precise_memory(memory.model, layer=layer), precise_memory(edited, layer=layer)
        cells = _changed_cells(patch, layer, memory.num_keys)
        named = _named(patch, before, after, layer)
        for ids in memory.vocabulary_chunks() if len(cells) else ():
            moved[ids.cpu(), place] = _change(before, after, ids, cells, layer).norm(dim=1).double().cpu()
        if len(named):
            change = after.rows(named, layer=layer).double() - before.rows(named, layer=layer).double()
            moved[named.cpu(), place] = change.norm(dim=1).cpu()
    return Spill(layers=tuple(layers), tokens=patch.tokens, moved=moved, memory=memory)


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


def _change(
    before: TokenMemory, after: TokenMemory, ids: Tensor, cells: Int64[Tensor, " S"], layer: int
) -> Float[Tensor, "U D"]:
    """The change of rows: (c' - c) v' + c (v' - v), which keeps its digits where changes are small."""
    queries = before.queries(ids, layer=layer)

    def parts(memory: TokenMemory) -> tuple[Tensor, Tensor]:
        here = cells.to(queries.device)
        keys, gates = memory.keys(layer)[here], memory.gates(layer)[here]
        return (queries @ keys.T) * F.silu(queries @ gates.T), memory.values(layer)[here]

    (old, old_values), (new, new_values) = parts(before), parts(after)
    return (new - old) @ new_values + old @ (new_values - old_values)
