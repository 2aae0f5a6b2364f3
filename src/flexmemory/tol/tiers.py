"""Where rows are when they are asked for: on the device, in host memory, or on disk.

A tier moves rows and changes no bit of them, or decodes those that are in few bits. `tol.contract` says what it can do,
`tol.disk` has the one on disk, `tol.coded_rows` those in memory of rows in few bits, and `tol.hot` keeps frequent rows,
decoded, in front of another. Dimension key: B batch, T tokens, U unique ids, D model width.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flexmemory.model.memory import MemoryRows, unique_ids
from flexmemory.model.transformer import check_token_ids
from flexmemory.tol.codec import get_codec
from flexmemory.tol.coded_rows import CodedRows
from flexmemory.tol.contract import RowTier, check_gather
from flexmemory.tol.disk import DiskRows
from flexmemory.tol.store import ToLStore

Where = Literal["device", "host", "disk"]


class DeviceRows:
    """The whole table of a plain store on one device, which may be the CPU."""

    def __init__(self, store: ToLStore, *, device: torch.device | str) -> None:
        """Load and check every row.

        Raises:
            OSError: a file cannot be read.
            ValueError: the store is damaged.
        """
        self.dtype = get_codec(store.codec).dtype
        self.embedding, self.layers, self.num_slices = store.embedding, store.layers, store.num_slices
        self.hidden_size, self.vocab_size = store.hidden_size, store.vocab_size
        self.table = _empty_table(store, device=device)
        store.read_table(self.table)

    @property
    def nbytes(self) -> int:
        """Bytes of the table."""
        return self.table.nbytes

    def gather(self, token_ids: Int[Tensor, " U"], out: Float[Tensor, "U slices D"]) -> None:
        """As `RowTier.gather`."""
        check_gather(self, token_ids, out)
        token_ids = token_ids.to(self.table.device)
        if out.device == self.table.device:
            torch.index_select(self.table, 0, token_ids, out=out)
        else:
            out.copy_(self.table.index_select(0, token_ids))


class HostRows:
    """The whole table of a plain store in host memory; from pinned memory a GPU takes rows by itself."""

    def __init__(self, store: ToLStore, *, pinned: bool) -> None:
        """Load and check every row; `pinned` memory is what a GPU can read.

        Raises:
            OSError: a file cannot be read.
            ValueError: the store is damaged.
        """
        self.dtype = get_codec(store.codec).dtype
        self.embedding, self.layers, self.num_slices = store.embedding, store.layers, store.num_slices
        self.hidden_size, self.vocab_size = store.hidden_size, store.vocab_size
        self.table = _empty_table(store, device="cpu", pinned=pinned)
        self._bytes = self.table.view(torch.uint8).flatten(1)  # (V, row_bytes), the same memory
        self._pinned = pinned
        store.read_table(self.table)

    @property
    def nbytes(self) -> int:
        """Bytes of the table."""
        return self.table.nbytes

    def gather(self, token_ids: Int[Tensor, " U"], out: Float[Tensor, "U slices D"]) -> None:
        """As `RowTier.gather`."""
        token_ids = token_ids.cpu()
        check_gather(self, token_ids, out)
        if out.is_cuda and self._pinned and len(token_ids):
            from flexmemory.tol.pinned import gather_pinned  # Triton is there where a GPU is

            gather_pinned(self._bytes, token_ids, out.view(torch.uint8).flatten(1))
        elif out.device.type == "cpu":
            torch.index_select(self.table, 0, token_ids, out=out)
        else:
            out.copy_(self.table.index_select(0, token_ids))


def open_rows(
    store: ToLStore, where: Where, *, device: torch.device | str
) -> DeviceRows | HostRows | CodedRows | DiskRows:
    """The rows of `store`, kept `where`, for a model on `device`.

    Raises:
        OSError: a file cannot be read.
        ValueError: the store is damaged (found when the table is loaded), or there is no such tier.
    """
    if where == "device":
        return DeviceRows(store, device=device) if store.plain else CodedRows(store, device=device)
    if where == "host":
        pinned = torch.device(device).type == "cuda"
        return HostRows(store, pinned=pinned) if store.plain else CodedRows(store, device="cpu", pinned=pinned)
    if where == "disk":
        return DiskRows(store)
    raise ValueError(f"rows can be kept on device, host or disk, got {where!r}")


def lookup(
    tier: RowTier, token_ids: Int[Tensor, "B T"], *, dtype: torch.dtype, device: torch.device | None = None
) -> MemoryRows:
    """The rows of a batch, in the model's `dtype`, on `device` or else the ids' own.

    Each unique id is gathered once; a plain table that is there already is used as it is.

    Raises:
        OSError: the rows cannot be read.
        ValueError: an id is out of range (checked on the CPU).
    """
    if isinstance(tier, DeviceRows) and (tier.dtype, tier.table.device) == (dtype, device or token_ids.device):
        if token_ids.device.type == "cpu":
            check_token_ids(token_ids, tier.vocab_size)
        index = token_ids.to(tier.table.device)
        return MemoryRows(tier.table, index, layers=tier.layers, embedding=tier.embedding, fixed=True)
    unique, index = unique_ids(token_ids)
    shape = (len(unique), tier.num_slices, tier.hidden_size)
    table = torch.empty(shape, dtype=tier.dtype, device=device or token_ids.device)
    tier.gather(unique, table)
    return MemoryRows(table.to(dtype), index.to(table.device), layers=tier.layers, embedding=tier.embedding)


def _empty_table(store: ToLStore, *, device: torch.device | str, pinned: bool = False) -> Tensor:
    shape = (store.vocab_size, store.num_slices, store.hidden_size)
    return torch.empty(shape, dtype=get_codec(store.codec).dtype, device=device, pin_memory=pinned)
