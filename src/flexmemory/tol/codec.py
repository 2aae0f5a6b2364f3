"""How a row is written as bytes.

A codec turns rows (U, slices, D) into (U, row_bytes) uint8 and back, slice after slice (the embedding, if it is there,
then layers), so that the first slices of a row are a prefix of its bytes.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor


@runtime_checkable
class Codec(Protocol):
    """One way to store rows."""

    @property
    def name(self) -> str:
        """Name in manifests and on the command line."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of decoded rows."""
        ...

    def row_bytes(self, num_slices: int, hidden_size: int) -> int:
        """Bytes of one token's rows, before padding."""
        ...

    def encode(self, rows: Float[Tensor, "U slices D"]) -> UInt8[Tensor, "U row_bytes"]:
        """Bytes of `rows`."""
        ...

    def decode(self, data: UInt8[Tensor, "U row_bytes"], out: Float[Tensor, "U slices D"]) -> None:
        """Write the rows that `data` holds over `out`, contiguous, of `dtype` and on any device.

        Where `data` is pinned memory and `out` on a GPU, the GPU may still be reading `data` afterwards.
        """
        ...


class PlainCodec:
    """Numbers as they are, in one floating-point dtype; decoding moves bytes and changes none."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        """Store rows in `dtype`."""
        self.name = name
        self.dtype = dtype

    def row_bytes(self, num_slices: int, hidden_size: int) -> int:
        """Bytes of one token's rows, before padding."""
        return num_slices * hidden_size * self.dtype.itemsize

    def encode(self, rows: Float[Tensor, "U slices D"]) -> UInt8[Tensor, "U row_bytes"]:
        """Bytes of `rows`, rounded to the codec's dtype."""
        return rows.to(self.dtype).contiguous().view(torch.uint8).flatten(1)

    def decode(self, data: UInt8[Tensor, "U row_bytes"], out: Float[Tensor, "U slices D"]) -> None:
        """Copy the bytes over `out`."""
        assert out.dtype == self.dtype
        assert out.is_contiguous()
        out.view(torch.uint8).flatten(1).copy_(data, non_blocking=out.is_cuda)


CODECS: dict[str, Codec] = {
    codec.name: codec for codec in (PlainCodec("bf16", torch.bfloat16), PlainCodec("fp32", torch.float32))
}


def get_codec(name: str) -> Codec:
    """The codec called `name`.

    Raises:
        ValueError: this version has none of that name.
    """
    if name not in CODECS:
        raise ValueError(f"unknown ToL codec {name!r}; this version has {', '.join(CODECS)}")
    return CODECS[name]
