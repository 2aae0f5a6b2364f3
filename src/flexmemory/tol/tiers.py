"""Where rows are when they are asked for: on the device, in host memory, or on disk.

A tier moves rows and changes no bit of them. Dimension key: B batch, T tokens, U unique ids, L layers kept, D model
width, V vocabulary.
"""

from __future__ import annotations

import bisect
import concurrent.futures
import os
import sys
import weakref
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from flexmemory.model.memory import MemoryRows, unique_ids
from flexmemory.model.transformer import check_token_ids
from flexmemory.tol.codec import get_codec
from flexmemory.tol.store import ToLStore, read_exactly

DISK_THREADS = 16
"""Reads in flight at once; NVMe drives reach their rate of random reads with about as many."""
ROWS_PER_THREAD = 4
"""Fewer rows than this are not worth waking a thread for."""

Where = Literal["device", "host", "disk"]


@runtime_checkable
class RowTier(Protocol):
    """A source of rows by token id."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the rows."""
        ...

    @property
    def layers(self) -> tuple[int, ...]:
        """The model's layers that a row holds, in the row's order."""
        ...

    @property
    def hidden_size(self) -> int:
        """D."""
        ...

    @property
    def vocab_size(self) -> int:
        """V."""
        ...

    def gather(self, token_ids: Int[Tensor, " U"], out: Float[Tensor, "U L D"]) -> None:
        """Write the rows of `token_ids`, in any order and repeated at will, over all of `out`.

        Args:
            token_ids: On any device; those on the CPU are checked to be in range.
            out: Contiguous, of the tier's dtype, on any device.

        Raises:
            OSError: the rows cannot be read.
            ValueError: an id is out of range, or `out` has another shape or dtype.
        """
        ...


class DeviceRows:
    """The whole table on one device, which may be the CPU."""

    def __init__(self, store: ToLStore, *, device: torch.device | str) -> None:
        """Load and check every row.

        Raises:
            OSError: a file cannot be read.
            ValueError: the store is damaged.
        """
        self.dtype = get_codec(store.codec).dtype
        self.layers, self.hidden_size, self.vocab_size = store.layers, store.hidden_size, store.vocab_size
        self.table = _empty_table(store, device=device)
        store.read_table(self.table)

    def gather(self, token_ids: Int[Tensor, " U"], out: Float[Tensor, "U L D"]) -> None:
        """As `RowTier.gather`."""
        _check(self, token_ids, out)
        token_ids = token_ids.to(self.table.device)
        if out.device == self.table.device:
            torch.index_select(self.table, 0, token_ids, out=out)
        else:
            out.copy_(self.table.index_select(0, token_ids))


class HostRows:
    """The whole table in host memory, gathered there and copied to where `out` is."""

    def __init__(self, store: ToLStore, *, pinned: bool) -> None:
        """Load and check every row; `pinned` memory is what a GPU copies from at full speed.

        Raises:
            OSError: a file cannot be read.
            ValueError: the store is damaged.
        """
        self.dtype = get_codec(store.codec).dtype
        self.layers, self.hidden_size, self.vocab_size = store.layers, store.hidden_size, store.vocab_size
        self.table = _empty_table(store, device="cpu", pinned=pinned)
        store.read_table(self.table)

    def gather(self, token_ids: Int[Tensor, " U"], out: Float[Tensor, "U L D"]) -> None:
        """As `RowTier.gather`."""
        _check(self, token_ids, out)
        host = out if out.device.type == "cpu" else torch.empty(out.shape, dtype=self.dtype, pin_memory=out.is_cuda)
        torch.index_select(self.table, 0, token_ids.cpu(), out=host)
        if host is not out:
            out.copy_(host)


class DiskRows:
    """Nothing resident: one read per row, of its bytes and not of their padding.

    Rows are not checked against their checksums, which cover whole blocks: `flexmemory tol verify` does that.
    """

    def __init__(self, store: ToLStore) -> None:
        """Open the store's files."""
        self.dtype = get_codec(store.codec).dtype
        self.layers, self.hidden_size, self.vocab_size = store.layers, store.hidden_size, store.vocab_size
        self._store = store
        self._codec = get_codec(store.codec)
        self._first_tokens = [shard.first_token for shard in store.manifest.shards]
        self._descriptors: list[int] = []
        self._close = weakref.finalize(self, _close_all, self._descriptors)
        for shard in store.manifest.shards:
            descriptor = os.open(store.path / shard.file, os.O_RDONLY)
            self._descriptors.append(descriptor)
            if sys.platform == "linux":  # no read-ahead: the next row is somewhere else
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        self._pool = concurrent.futures.ThreadPoolExecutor(DISK_THREADS, thread_name_prefix="tol-read")

    def gather(self, token_ids: Int[Tensor, " U"], out: Float[Tensor, "U L D"]) -> None:
        """As `RowTier.gather`."""
        if not self._close.alive:
            raise ValueError(f"the rows of {self._store.path} are closed; open them again")
        _check(self, token_ids, out)
        ids = token_ids.cpu().numpy()
        data = torch.empty((len(ids), self._store.row_bytes), dtype=torch.uint8, pin_memory=out.is_cuda)
        threads = max(1, min(DISK_THREADS, len(ids) // ROWS_PER_THREAD))
        if threads == 1:
            self._read(ids, data.numpy())
        else:
            parts = zip(np.array_split(ids, threads), np.array_split(data.numpy(), threads), strict=True)
            list(self._pool.map(lambda part: self._read(*part), parts))
        self._codec.decode(data, out)

    def _read(self, ids: np.ndarray, data: np.ndarray) -> None:
        manifest = self._store.manifest
        for token, row in zip(ids.tolist(), data, strict=True):
            number = bisect.bisect_right(self._first_tokens, token) - 1
            shard = manifest.shards[number]
            offset = shard.data_offset + (token - shard.first_token) * manifest.stride_bytes
            read_exactly(self._descriptors[number], row, offset=offset, path=self._store.path / shard.file)

    def close(self) -> None:
        """Close the files; nothing can be gathered any more."""
        self._pool.shutdown()
        self._close()

    def __enter__(self) -> DiskRows:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_rows(store: ToLStore, where: Where, *, device: torch.device | str) -> DeviceRows | HostRows | DiskRows:
    """The rows of `store`, kept `where`, for a model on `device`.

    Raises:
        OSError: a file cannot be read.
        ValueError: the store is damaged (found when the table is loaded), or there is no such tier.
    """
    if where == "device":
        return DeviceRows(store, device=device)
    if where == "host":
        return HostRows(store, pinned=torch.device(device).type == "cuda")
    if where == "disk":
        return DiskRows(store)
    raise ValueError(f"rows can be kept on device, host or disk, got {where!r}")


def lookup(
    tier: RowTier, token_ids: Int[Tensor, "B T"], *, dtype: torch.dtype, device: torch.device | None = None
) -> MemoryRows:
    """The rows of a batch, each unique id gathered once, in the model's `dtype`, on `device` or else the ids' own.

    Raises:
        OSError: the rows cannot be read.
        ValueError: an id is out of range (checked on the CPU).
    """
    unique, index = unique_ids(token_ids)
    shape = (len(unique), len(tier.layers), tier.hidden_size)
    table = torch.empty(shape, dtype=tier.dtype, device=device or token_ids.device)
    tier.gather(unique, table)
    return MemoryRows(table.to(dtype), index.to(table.device), layers=tier.layers)


def _empty_table(store: ToLStore, *, device: torch.device | str, pinned: bool = False) -> Tensor:
    shape = (store.vocab_size, len(store.layers), store.hidden_size)
    return torch.empty(shape, dtype=get_codec(store.codec).dtype, device=device, pin_memory=pinned)


def _check(tier: RowTier, token_ids: Tensor, out: Tensor) -> None:
    shape = (len(token_ids), len(tier.layers), tier.hidden_size)
    if out.shape != shape or out.dtype != tier.dtype or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous {tier.dtype} of shape {list(shape)}, got {out.dtype} of shape {list(out.shape)} "
            f"and strides {list(out.stride())}"
        )
    if token_ids.device.type == "cpu":
        check_token_ids(token_ids, tier.vocab_size)


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
