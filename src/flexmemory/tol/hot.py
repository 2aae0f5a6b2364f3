"""Rows of frequent tokens kept on the device, in front of a tier that holds them all.

Real text asks for few tokens most of the time, so a small table answers most of it. Its rows are numbers, whatever the
tier below keeps: rows in few bits are decoded once, when they become hot. Dimension key: U unique ids, H hot
ids, D model width, V vocabulary.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Int32, Int64
from torch import Tensor

from flexmemory.tol.contract import RowTier, check_gather
from flexmemory.tol.counts import most_frequent


class HotSet:
    """Rows of frequent tokens on one device."""

    def __init__(
        self,
        ids: Int64[Tensor, " H"],
        table: Float[Tensor, "H slices D"],
        slot: Int32[Tensor, " V"],
    ) -> None:
        """See `load` and `of`."""
        self.ids = ids
        """The most frequent first, on the CPU."""
        self.table = table
        """Their rows, in the dtype of the tier that they are from."""
        self.slot = slot
        """The place of each id in `ids` and `table`, or -1; on the device of `table`."""
        self.host_slot = slot.cpu()
        """The same on the CPU."""

    @classmethod
    def of(cls, ids: Int64[Tensor, " H"], table: Float[Tensor, "H slices D"], *, vocab_size: int) -> HotSet:
        """The set of `ids`, distinct and the most frequent first, whose rows are `table`."""
        ids = ids.cpu()
        slot = torch.full((vocab_size,), -1, dtype=torch.int32)
        slot[ids] = torch.arange(len(ids), dtype=torch.int32)
        return cls(ids, table, slot.to(table.device))

    @classmethod
    def load(cls, tier: RowTier, ids: Int64[Tensor, " H"], *, device: torch.device | str) -> HotSet:
        """Gather the rows of `ids`, distinct and the most frequent first (`ToLStore.hot_ids`), onto `device`.

        From `DiskRows` that reads these rows alone: each once, in the order of the disk, neighbours together.

        Raises:
            OSError: a row cannot be read.
            ValueError: an id is out of range or repeated.
        """
        if len(ids.unique()) < len(ids):
            raise ValueError(f"hot ids must be distinct, got {len(ids)} of which {len(ids.unique())} are")
        table = torch.empty((len(ids), tier.num_slices, tier.hidden_size), dtype=tier.dtype, device=device)
        tier.gather(ids, table)
        return cls.of(ids, table, vocab_size=tier.vocab_size)

    def __len__(self) -> int:
        """H."""
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.table.nbytes + self.slot.nbytes

    def resized(self, num_ids: int) -> HotSet:
        """The `num_ids` most frequent of these rows as a set of their own; this one is empty from then on.

        On a GPU the rows go through host memory, so that at no time more device memory is held than before.

        Raises:
            ValueError: `num_ids` is negative or above H.
        """
        if not 0 <= num_ids <= len(self):
            raise ValueError(f"a hot set of {len(self)} rows can be made one of 0 to {len(self)}, got {num_ids}")
        device, vocab_size = self.table.device, len(self.slot)
        ids = self.ids[:num_ids].clone()
        rows = self.table[:num_ids].to("cpu", copy=True)
        self.ids = self.ids[:0]
        self.table = self.table.new_empty((0, *self.table.shape[1:]))
        self.slot.fill_(-1)
        self.host_slot.fill_(-1)
        if device.type == "cuda":  # else the smaller table would be cut out of the larger one's memory
            torch.cuda.empty_cache()
        return HotSet.of(ids, rows.to(device), vocab_size=vocab_size)


class Traffic:
    """How often each token was asked for."""

    def __init__(self, vocab_size: int) -> None:
        """Nothing was asked for yet."""
        self.counts: Int64[Tensor, " V"] = torch.zeros(vocab_size, dtype=torch.int64)

    def add(self, token_ids: Int[Tensor, " N"]) -> None:
        """Count `token_ids`, on the CPU and in range."""
        self.counts.index_add_(0, token_ids.long(), torch.ones(len(token_ids), dtype=torch.int64))

    def most_frequent(self, num_ids: int) -> Int64[Tensor, " H"]:
        """The `num_ids` ids asked for most often, ties by id; those never asked for are left out."""
        ids = most_frequent(self.counts, num_ids)
        return ids[self.counts[ids] > 0]


class HotRows:
    """A tier with a hot set before it: frequent rows are copied from there, others asked of the tier below."""

    def __init__(self, tier: RowTier, hot: HotSet) -> None:
        """Put `hot`, whose rows are from `tier`, before it."""
        self.dtype = tier.dtype
        self.embedding, self.layers, self.num_slices = tier.embedding, tier.layers, tier.num_slices
        self.hidden_size, self.vocab_size = tier.hidden_size, tier.vocab_size
        self.tier = tier
        self.hot = hot
        """May be replaced between calls of `gather`."""
        self.traffic = Traffic(tier.vocab_size)
        """Of all calls of `gather`; an id counts once for each time that it is in `token_ids`."""

    def gather(self, token_ids: Int[Tensor, " U"], out: Float[Tensor, "U slices D"]) -> None:
        """As `RowTier.gather`. Ids on a GPU come to the host first, as it decides who is asked."""
        token_ids = token_ids.cpu()
        check_gather(self, token_ids, out)
        self._gather(token_ids, out)
        self.traffic.add(token_ids)

    def relearn(self, num_ids: int) -> None:
        """Replace the hot set by the `num_ids` tokens that were asked for most often, as far as there are so many.

        Rows that stay are moved, others asked of the tier below. As in `HotSet.resized`, the device never holds both.

        Raises:
            OSError: a row cannot be read; the hot set is then what it was.
            ValueError: `num_ids` is negative.
        """
        ids = self.traffic.most_frequent(num_ids)
        rows = torch.empty((len(ids), self.num_slices, self.hidden_size), dtype=self.dtype)
        self._gather(ids, rows)
        device = self.hot.table.device
        self.hot = self.hot.resized(0)
        self.hot = HotSet.of(ids, rows.to(device), vocab_size=self.vocab_size)

    def _gather(self, token_ids: Int[Tensor, " U"], out: Float[Tensor, "U slices D"]) -> None:
        slots = self.hot.host_slot[token_ids.long()]
        missed = (slots < 0).nonzero()[:, 0]
        unique, inverse = torch.unique(token_ids[missed], return_inverse=True)
        if len(unique) == len(token_ids):  # all missed, none repeated: nothing to put together
            self.tier.gather(token_ids, out)
            return
        rows = torch.empty((len(unique), *out.shape[1:]), dtype=out.dtype, device=out.device)
        if len(unique):
            self.tier.gather(unique, rows)  # before `out` is touched, as it may fail
        table = self.hot.table
        if len(missed) < len(token_ids):
            places = slots.clamp(min=0).to(table.device)  # any row where there is none
            if out.device == table.device:
                torch.index_select(table, 0, places, out=out)
            else:
                out.copy_(table.index_select(0, places))
        if len(unique):
            out.index_copy_(0, missed.to(out.device), rows[inverse.to(out.device)])
