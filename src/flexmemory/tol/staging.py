"""From host memory to a GPU through two pinned buffers: one is filled while the GPU copies the other."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

STAGING_BYTES = 32 * 2**20
"""Of one buffer, at most, unless a row is longer: 0.6 ms at the 55 GB/s that an H200 copies from its host."""


class Staging:
    """Two pinned buffers for one GPU, made once and used in turn; safe to share among threads."""

    def __init__(self, device: torch.device, *, row_bytes: int) -> None:
        """Buffers of as many rows of `row_bytes` as fit `STAGING_BYTES`, for copies to `device`."""
        self._rows = max(1, STAGING_BYTES // row_bytes)
        self._buffers = [torch.empty((self._rows, row_bytes), dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)]
        self._locks = [threading.Lock() for _ in range(2)]
        self._turns = itertools.count()
        self._device = device

    def send(
        self,
        out: Float[Tensor, "U slices D"],
        *,
        fill: Callable[[slice, UInt8[Tensor, "N row_bytes"]], object],
        decode: Callable[[slice, UInt8[Tensor, "N row_bytes"]], object],
    ) -> None:
        """Fill `out` part by part: `fill` writes some of its rows as bytes, `decode` takes them to the GPU.

        Each is given the rows that are meant, as a slice of `out`.

        Returns when the last copy is on the GPU's current stream, not when it is done.
        """
        stream = torch.cuda.current_stream(self._device)
        for first in range(0, len(out), self._rows):
            part = slice(first, min(first + self._rows, len(out)))
            turn = next(self._turns) % 2
            with self._locks[turn]:
                self._copied[turn].synchronize()  # until then the GPU may be reading the buffer
                buffer = self._buffers[turn][: part.stop - part.start]
                fill(part, buffer)
                decode(part, buffer)
                self._copied[turn].record(stream)
