"""Rows in few bits, decoded where they are needed. Dimension key: U tokens, P slices of a row, D model width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from flexmemory.tol.coding import SliceTensors
from flexmemory.tol.scheme import Band, Scheme


class RowDecoder:
    """Decodes rows of all bands of a store on one device."""

    def __init__(
        self,
        bands: Sequence[Band],
        tensors: Sequence[Sequence[SliceTensors]],
        *,
        hidden_size: int,
        device: torch.device | str,
    ) -> None:
        """Decode rows of `bands` with `tensors` on `device`."""
        self._scheme = Scheme(
            codec="",
            layers=tuple(range(len(bands[0].slices))),
            embedding=False,
            hidden_size=hidden_size,
            bands=tuple(bands),
            tensors=tuple(tuple(band) for band in tensors),
        ).moved(device)

    def decode(
        self, data: UInt8[Tensor, "U row_bytes"], band: Int64[Tensor, " U"], out: Float[Tensor, "U P D"]
    ) -> None:
        """Write the rows that `data` holds, each of its band, over `out`."""
        for number in band.unique().tolist():
            chosen = band == number
            size = self._scheme.bands[number].row_bytes
            out[chosen] = self._scheme.decode(data[chosen][:, :size], number).to(out.dtype)
