"""Files read exactly, around the page cache or through it, and what of them the page cache holds."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8

from flexmemory.tol.format import PAGE_BYTES

_LIBC = ctypes.CDLL(None, use_errno=True)


def read_exactly(descriptor: int, buffers: Sequence[memoryview], *, offset: int, path: Path) -> None:
    """Fill `buffers` (of bytes), one after the other, from `offset` of an open file, whose `path` is for messages.

    Raises:
        OSError: the file cannot be read, or ends early.
    """
    rest = list(buffers)
    missing = sum(map(len, rest))
    while missing:
        try:
            count = os.preadv(descriptor, rest, offset)
        except OSError as error:
            raise unreadable(path, offset, error) from error
        if count == 0:
            raise OSError(f"{path} ends at byte {offset}, {missing} bytes early; it was truncated after it was opened")
        missing, offset = missing - count, offset + count
        if missing:
            rest = after(rest, count)


def after(buffers: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is left of `buffers` behind their first `count` bytes."""
    rest = []
    for buffer in buffers:
        if count < len(buffer):
            rest.append(buffer[count:])
        count = max(0, count - len(buffer))
    return rest


def unreadable(path: Path, offset: int, error: OSError) -> OSError:
    """The error that a failed read is reported with."""
    return OSError(f"cannot read {path} at byte {offset} ({error.strerror})")


def open_direct(path: Path) -> int | None:
    """A descriptor that reads around the page cache, or None where the file system or the system has no such thing.

    Raises:
        OSError: the file cannot be opened at all.
    """
    if sys.platform != "linux":
        return None
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise


class AlignedBuffer(threading.local):
    """Memory that starts on a page, as direct reads need it: each thread's own, grown to what it asked for."""

    def __init__(self) -> None:
        self._memory = memoryview(mmap.mmap(-1, PAGE_BYTES))

    def take(self, size: int) -> memoryview:
        """The first `size` bytes; they are those of any earlier call."""
        if len(self._memory) < size:
            self._memory = memoryview(mmap.mmap(-1, -(-size // PAGE_BYTES) * PAGE_BYTES))
        return self._memory[:size]


def resident_pages(path: Path, *, most: int | None = None) -> Bool[np.ndarray, " pages"]:
    """Whether each page of a file is in the page cache, or each of `most` pages spread evenly over it.

    Linux tells that only to those who could write the file; to others every page looks resident.

    Raises:
        OSError: the file cannot be opened, or the system does not say.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        count = -(-len(mapping) // mmap.PAGESIZE)
        start = np.frombuffer(mapping, np.uint8, 1).ctypes.data  # valid while `mapping` is open
        if most is None or count <= most:
            return _mincore(start, count)
        pages = np.linspace(0, count - 1, most).astype(np.int64)
        return np.concatenate([_mincore(start + int(page) * mmap.PAGESIZE, 1) for page in pages])


def drop_pages(path: Path) -> None:
    """Ask the system to forget what it holds of a file in the page cache.

    Raises:
        OSError: the file cannot be opened, or the system cannot do that.
    """
    if sys.platform != "linux":
        raise OSError(f"dropping {path} from the page cache needs Linux, this is {sys.platform}")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # pages that are not on disk yet would stay
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def address_of(data: UInt8[np.ndarray, ...]) -> int:
    """Where the bytes of `data` start in memory."""
    return data.__array_interface__["data"][0]


def _mincore(start: int, pages: int) -> Bool[np.ndarray, " pages"]:
    vector = np.zeros(pages, np.uint8)
    size = ctypes.c_size_t(pages * mmap.PAGESIZE)
    if _LIBC.mincore(ctypes.c_void_p(start), size, ctypes.c_void_p(address_of(vector))) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"the system does not say what it caches (mincore: {os.strerror(number)})")
    return (vector & 1).astype(np.bool_)
