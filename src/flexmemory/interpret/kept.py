"""What was computed of a memory, kept for the next question.

The length of every row, every token's coefficients or C of a layer take a pass over the vocabulary, and are functions
of a few weights. They are found again by the very tensors that they were made from: an edited copy shares all weights
that it does not change, so what is known of the original holds for it too, and nothing has to be told when edits come
and go. Weights must be replaced, not written to, as `patch.take_step` does. Dimension key: V vocabulary, K cells.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flexmemory.interpret.patch import shared_copy
from flexmemory.interpret.precise import precise_memory
from flexmemory.interpret.tkv import TokenMemory

Tensors = tuple[Tensor, ...]
Key = tuple[str | int, ...]
Entry = tuple[tuple[weakref.ref[Tensor], ...], Tensors]
ROW_LENGTHS = "row lengths"


class Kept:
    """Tensors by the weights that they were made from, no more of them than a budget; the least used goes first."""

    def __init__(self, *, budget_bytes: int = 0) -> None:
        """Keep nothing unless there is a budget."""
        self.budget_bytes = budget_bytes
        self._entries: dict[Key, Entry] = {}
        self._told: dict[Key, Entry] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of what was found and is kept."""
        return sum(tensor.nbytes for _, tensors in self._entries.values() for tensor in tensors)

    def holds(self, nbytes: int) -> bool:
        """Whether something of this size would be kept and leave room for as much again."""
        return 2 * nbytes <= self.budget_bytes

    def tell(self, name: str, weights: Sequence[Tensor], tensors: Tensors) -> None:
        """Let `get` give what is known from elsewhere, as long as these weights are there, whatever the budget."""
        self._told[name, *map(id, weights)] = _entry(weights, tensors)

    def get(self, name: str, weights: Sequence[Tensor], make: Callable[[], Tensors]) -> Tensors:
        """What `make` gives, or gave when it was last asked for this of these weights; not to be written to."""
        key = (name, *map(id, weights))
        if _is_of(self._told.get(key), weights):
            return self._told[key][1]
        found = self._entries.pop(key, None)
        entry = found if found is not None and _is_of(found, weights) else _entry(weights, make())
        self._entries[key] = entry
        self._tidy()
        return entry[1]

    def _tidy(self) -> None:
        dead = [key for key, (refs, _) in self._entries.items() if any(ref() is None for ref in refs)]
        for key in dead:
            del self._entries[key]
        while self._entries and self.nbytes > self.budget_bytes:
            del self._entries[next(iter(self._entries))]


def _entry(weights: Sequence[Tensor], tensors: Tensors) -> Entry:
    return tuple(weakref.ref(weight) for weight in weights), tensors


def _is_of(entry: Entry | None, weights: Sequence[Tensor]) -> bool:
    """Whether it is there and of these very weights: those that are gone leave their ids to others."""
    return entry is not None and all(ref() is weight for ref, weight in zip(entry[0], weights, strict=True))


def tell_row_lengths(memory: TokenMemory, *, layer: int, lengths: Float[Tensor, " V"], kept: Kept) -> None:
    """Let `row_lengths` of a layer be those that are known from elsewhere, an index say."""
    kept.tell(ROW_LENGTHS, layer_weights(memory, layer), (lengths,))


def row_lengths(memory: TokenMemory, *, layer: int, kept: Kept) -> Float[Tensor, " V"]:
    """The length of every token's row in a layer, in fp64 on the CPU, of rows computed in at least fp32."""

    def computed() -> Tensors:
        bare = shared_copy(memory.model)
        bare.memories[layer].given = None
        precise = precise_memory(bare, layer=layer)
        return (torch.cat([precise.rows(ids, layer=layer).norm(dim=1) for ids in memory.vocabulary_chunks()]).cpu(),)

    lengths = kept.get(ROW_LENGTHS, layer_weights(memory, layer), computed)[0].double()
    given = memory.model.memories[layer].given
    if given is not None:
        lengths = lengths.index_copy(0, given.ids.cpu(), given.rows.norm(dim=1).cpu().double())
    return lengths


def all_coefficients(
    memory: TokenMemory, *, layer: int, kept: Kept
) -> Iterator[tuple[Float[Tensor, "U K"], Float[Tensor, " U"]]]:
    """The coefficients of all tokens in at least fp32, and the length of each token's, in parts.

    They are kept, and are one part, where there is room for all of a layer.
    """
    precise = precise_memory(memory.model, layer=layer)
    chunks = memory.vocabulary_chunks()

    def computed(ids: Int[Tensor, " U"]) -> tuple[Tensor, Tensor]:
        coefficients = precise.coefficients(ids, layer=layer)
        return coefficients, coefficients.norm(dim=1)

    def whole() -> Tensors:
        coefficients, lengths = zip(*map(computed, chunks), strict=True)
        return torch.cat(coefficients), torch.cat(lengths)

    if holds_coefficients(memory, kept):
        coefficients, lengths = kept.get("coefficients", coefficient_weights(memory, layer), whole)
        yield coefficients, lengths
    else:
        yield from map(computed, chunks)


def holds_coefficients(memory: TokenMemory, kept: Kept) -> bool:
    """Whether every token's coefficients of a layer would be kept."""
    dtype = torch.promote_types(memory.model.dtype, torch.float32)
    return kept.holds(memory.vocab_size * memory.num_keys * dtype.itemsize)


def layer_weights(memory: TokenMemory, layer: int) -> Tensors:
    """What the rows of a layer are made of, but for those that are given."""
    assert memory.model.embedding is not None
    memory.cells(layer)
    return (memory.model.embedding.weight, *memory.model.memories[layer].parameters())


def coefficient_weights(memory: TokenMemory, layer: int) -> Tensors:
    """What the coefficients of a layer are made of."""
    values = memory.cells(layer).down.weight
    return tuple(weight for weight in layer_weights(memory, layer) if weight is not values)
