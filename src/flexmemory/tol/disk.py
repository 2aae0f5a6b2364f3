"""Rows read from disk as they are asked for: none resident but those that the page cache happens to hold.

Dimension key: U unique ids, D model width.
"""

from __future__ import annotations

import bisect
import concurrent.futures
import errno
import logging
import os
import sys
import weakref
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from flexmemory.tol.codec import PlainCodec, get_codec
from flexmemory.tol.contract import check_out
from flexmemory.tol.decoder import RowDecoder
from flexmemory.tol.format import PAGE_BYTES
from flexmemory.tol.pages import (
    AlignedBuffer,
    address_of,
    after,
    drop_pages,
    open_direct,
    read_exactly,
    resident_pages,
    unreadable,
)
from flexmemory.tol.staging import Staging
from flexmemory.tol.store import ToLStore

DISK_THREADS = 16
"""Reads in flight at once; NVMe drives reach their rate of random reads with about as many."""
CACHE_THREADS = min(8, os.cpu_count() or 1)
"""Copies from the page cache at once."""
BYTES_PER_THREAD = 2**20
"""Copying less than this from the page cache is not worth waking a thread for."""
SPAN_BYTES = 2**20
"""Of rows side by side on disk, what is read at once."""
SPAN_ROWS = 512
"""As many at most: a read may fill 1024 buffers, of which half are padding where rows have some."""
DIRECT_BELOW = 0.5
"""Share of the store in the page cache from which on reading through it is the better bet."""
SAMPLED_PAGES = 128
"""Pages that are looked up to tell that share: about 1 ms."""

Direct = Literal["auto", "always", "never"]
"""Whether reads go around the page cache."""

logger = logging.getLogger(__name__)


class DiskRows:
    """Nothing resident: rows are read when they are asked for, neighbours at once, their padding unused.

    Rows are not checked against their checksums, which cover whole blocks: `flexmemory tol verify` does that.
    """

    def __init__(self, store: ToLStore, *, direct: Direct = "auto") -> None:
        """Open the store's files.

        Args:
            store: Where rows are.
            direct: `always` and `never` go around the page cache or through it; `auto` goes around it while it holds
                less than half of the store, which it looks up now and at each `look_at_cache`. Where the file system
                has no direct reads, all go through the page cache.
        """
        self.dtype = store.decoded_dtype
        self.embedding, self.layers, self.num_slices = store.embedding, store.layers, store.num_slices
        self.hidden_size, self.vocab_size = store.hidden_size, store.vocab_size
        self.direct = False
        """Whether reads go around the page cache now."""
        self.store = store
        """What is read."""
        self._mode = direct
        self._row_bytes = store.row_bytes
        self._shards, self._paths = store.manifest.shards, store.paths
        self._first_tokens = [shard.first_token for shard in self._shards]
        self._strides = [store.manifest.stride_of(shard) for shard in self._shards]
        self._sizes = [store.bands[shard.band].row_bytes if store.bands else self._row_bytes for shard in self._shards]
        self._positions = None if store.positions is None else store.positions.numpy()
        unused = max(stride - size for stride, size in zip(self._strides, self._sizes, strict=True))
        self._padding = memoryview(bytearray(unused))  # written by all threads, read by none
        self._codec = get_codec(store.codec) if store.plain else None
        self._decoders: dict[torch.device, RowDecoder] = {}
        self._descriptors: list[int] = []
        self._close = weakref.finalize(self, _close_all, self._descriptors)
        for path in self._paths:
            descriptor = os.open(path, os.O_RDONLY)
            self._descriptors.append(descriptor)
            if sys.platform == "linux":  # no read-ahead: the next row is somewhere else
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        self._direct_descriptors: list[int | None] = []
        self._bounce = AlignedBuffer()
        self._staging: dict[torch.device, Staging] = {}
        self._pool = concurrent.futures.ThreadPoolExecutor(DISK_THREADS, thread_name_prefix="tol-read")
        self.look_at_cache()

    def look_at_cache(self) -> None:
        """Look up how much of the store the page cache holds, and choose by that how to read.

        That is around it or through it, where this is left to us, and in how many threads.

        Raises:
            OSError: a file cannot be opened.
        """
        self._cold = cached_share(self.store, most=SAMPLED_PAGES) < DIRECT_BELOW
        self.direct = self._mode == "always" or (self._mode == "auto" and self._cold)
        if self.direct and not self._direct_descriptors:
            for path in self._paths:
                descriptor = open_direct(path)
                self._direct_descriptors.append(descriptor)
                if descriptor is not None:
                    self._descriptors.append(descriptor)
        if self.direct and None in self._direct_descriptors:
            self._refuse_direct()

    def gather(self, token_ids: Int[Tensor, " U"], out: Float[Tensor, "U slices D"]) -> None:
        """As `RowTier.gather`."""
        self._check_open()
        ids = token_ids.cpu().numpy()
        check_out(self, len(ids), out)
        if len(ids) == 1:  # decoding, where microseconds count
            self._check_id(int(ids[0]))
        elif len(ids):
            self._check_id(int(ids.min()))
            self._check_id(int(ids.max()))
        if self._positions is not None:
            ids = self._positions[ids]
        if out.is_cuda:
            if out.device not in self._staging:
                self._staging[out.device] = Staging(out.device, row_bytes=self._row_bytes)
            self._staging[out.device].send(
                out,
                fill=lambda part, buffer: self._read(ids[part], buffer.numpy()),
                decode=lambda part, buffer: self._decode(buffer, ids[part], out[part]),
            )
        elif isinstance(self._codec, PlainCodec) and out.device.type == "cpu":
            self._read(ids, out.view(torch.uint8).numpy().reshape(len(ids), self._row_bytes))
        else:
            data = torch.empty((len(ids), self._row_bytes), dtype=torch.uint8)
            self._read(ids, data.numpy())
            self._decode(data, ids, out)

    def _decode(self, data: UInt8[Tensor, "U row_bytes"], places: np.ndarray, out: Float[Tensor, "U slices D"]) -> None:
        """Write the rows at `places`, which `data` holds as they are stored, over `out`."""
        if self._codec is not None:
            self._codec.decode(data, out)
            return
        bands = self.store.band_of(torch.from_numpy(places))
        self.decoder(out.device).decode(data.to(out.device, non_blocking=True), bands.to(out.device), out)

    def decoder(self, device: torch.device) -> RowDecoder:
        """What decodes coded rows on a device, made once."""
        if device not in self._decoders:
            self._decoders[device] = RowDecoder(
                self.store.bands, self.store.tensors, hidden_size=self.hidden_size, device=device
            )
        return self._decoders[device]

    def read_row(self, token_id: int, out: UInt8[np.ndarray, " row_bytes"]) -> None:
        """Read one row, as it is stored, into `out`, for instance pinned memory; any thread may.

        This is `gather` for a loop that has no time for tensors: no copy, no allocation, no other thread. Read around
        the page cache, a row goes straight to `out` only where both lie on pages. Where bands differ, a row may be
        shorter than `out`, and the rest stays as it is.

        Raises:
            OSError: the row cannot be read.
            ValueError: the id is out of range, or `out` is not contiguous uint8 of the row's size.
        """
        self._check_open()
        self._check_id(token_id)
        if out.shape != (self._row_bytes,) or out.dtype != np.uint8 or not out.flags.c_contiguous:
            raise ValueError(
                f"out must be contiguous uint8 of shape [{self._row_bytes}], got {out.dtype} of shape {list(out.shape)}"
            )
        place = token_id if self._positions is None else int(self._positions[token_id])
        self._read_span(place, [out.data[: self._sizes[self._shard_of(place)]]])

    def _shard_of(self, place: int) -> int:
        return bisect.bisect_right(self._first_tokens, place) - 1

    def _read(self, ids: np.ndarray, data: np.ndarray) -> None:
        """Read the rows at places `ids` (U,) over `data` (U, row_bytes), each once and in the order of the disk."""
        if len(ids) == 1:
            place = int(ids[0])
            self._read_span(place, [data[0, : self._sizes[self._shard_of(place)]].data])
        if len(ids) <= 1:
            return
        tokens, places, inverse = np.unique(ids, return_index=True, return_inverse=True)
        flat = data.reshape(-1).data
        if self.direct or self._cold:  # each read waits for the drive
            count = min(len(tokens), DISK_THREADS)
        else:
            count = max(1, min(len(tokens) * self._row_bytes // BYTES_PER_THREAD, CACHE_THREADS))
        first, *others = zip(np.array_split(tokens, count), np.array_split(places, count), strict=True)
        futures = [self._pool.submit(self._read_part, *part, flat) for part in others]
        try:
            self._read_part(*first, flat)
        finally:
            concurrent.futures.wait(futures)  # nobody writes to `data` when this returns or raises
        for future in futures:
            future.result()
        if len(tokens) < len(ids):
            repeats = np.setdiff1d(np.arange(len(ids)), places)
            data[repeats] = data[places[inverse[repeats]]]

    def _read_part(self, tokens: np.ndarray, places: np.ndarray, flat: memoryview) -> None:
        """Read the rows of ascending `tokens` to their `places` in `flat`, a table as bytes."""
        ids, row = tokens.tolist(), self._row_bytes
        starts = [place * row for place in places.tolist()]
        ends = [*self._first_tokens[1:], self.vocab_size]
        start = 0
        while start < len(ids):
            shard = self._shard_of(ids[start])
            size, most = self._sizes[shard], max(1, min(SPAN_BYTES // self._strides[shard], SPAN_ROWS))
            end = min(ends[shard], ids[start] + most)
            stop = start + 1
            while stop < len(ids) and ids[stop] == ids[stop - 1] + 1 < end:
                stop += 1
            self._read_span(ids[start], [flat[at : at + size] for at in starts[start:stop]])
            start = stop

    def _read_span(self, token: int, rows: list[memoryview]) -> None:
        """Read the rows that start with that at place `token`, all in one file, over `rows`."""
        number = self._shard_of(token)
        shard, stride = self._shards[number], self._strides[number]
        offset = shard.data_offset + (token - shard.first_token) * stride
        buffers = rows
        padding = self._padding[: stride - self._sizes[number]]
        if padding and len(rows) > 1:
            buffers = [buffer for row in rows for buffer in (row, padding)][:-1]
        done = self._read_direct(number, offset, buffers) if self.direct else 0
        if done:
            buffers = after(buffers, done)
        if buffers:
            read_exactly(self._descriptors[number], buffers, offset=offset + done, path=self._paths[number])

    def _read_direct(self, number: int, offset: int, buffers: list[memoryview]) -> int:
        """Read around the page cache; how many bytes were, which are fewer at the end of a file that was cut short."""
        descriptor = self._direct_descriptors[number]
        if descriptor is None:
            return 0
        size = sum(map(len, buffers))
        start = offset - offset % PAGE_BYTES
        straight = (
            start == offset
            and not any(len(buffer) % PAGE_BYTES for buffer in buffers)
            and not any(address_of(np.frombuffer(buffer, np.uint8)) % PAGE_BYTES for buffer in buffers)
        )
        whole_pages = -(-(offset - start + size) // PAGE_BYTES) * PAGE_BYTES
        target = buffers if straight else [self._bounce.take(whole_pages)]
        try:
            count = os.preadv(descriptor, target, start)
        except OSError as error:
            if error.errno == errno.EINVAL:  # it was opened, but cannot be read so
                self._refuse_direct()
                return 0
            raise unreadable(self._paths[number], offset, error) from error
        count = max(0, min(count - (offset - start), size))
        return count if straight else _scatter(target[0][offset - start :][:count], buffers)

    def _refuse_direct(self) -> None:
        self.direct = False
        level = logging.WARNING if self._mode == "always" else logging.INFO
        logger.log(level, "%s: no direct reads here; rows are read through the page cache", self.store.path)

    def _check_id(self, token_id: int) -> None:
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id} is out of range: the vocabulary has {self.vocab_size} ids")

    def _check_open(self) -> None:
        if not self._close.alive:
            raise ValueError(f"the rows of {self.store.path} are closed; open them again")

    def close(self) -> None:
        """Close the files; nothing can be gathered any more."""
        self._pool.shutdown()
        self._close()

    def __enter__(self) -> DiskRows:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def cached_share(store: ToLStore, *, most: int | None = None) -> float:
    """The share of a store's pages that the page cache holds, by all of them or by about `most`.

    Linux tells that only to those who could write the files; to others it is 1.

    Raises:
        OSError: a file cannot be opened.
    """
    sizes = [path.stat().st_size for path in store.paths]
    shares = [
        resident_pages(path, most=None if most is None else -(-most * size // sum(sizes))).mean()
        for path, size in zip(store.paths, sizes, strict=True)
    ]
    return float(np.average(shares, weights=sizes))


def drop_cache(store: ToLStore) -> None:
    """Take a store's files out of the page cache, so that the next reads come from the drive.

    Raises:
        OSError: a file cannot be opened, or the system cannot do that.
    """
    for path in store.paths:
        drop_pages(path)


def _scatter(data: memoryview, buffers: list[memoryview]) -> int:
    """Copy `data` over `buffers`, one after the other; its length."""
    start = 0
    for buffer in buffers:
        part = data[start : start + len(buffer)]
        buffer[: len(part)] = part
        start += len(part)
    return start


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
