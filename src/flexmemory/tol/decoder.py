"""Rows in few bits back to numbers, whole rows at once: `tol.scheme.Scheme.decode` is the slow reference.

Each coefficient of a row has a place of its own: the bit at which its code begins, how wide the code is, which levels
it chooses from, which byte is its scale. These places are the same for all rows of a band, so a row is decoded by a few
operations over all of its coefficients, whatever codings its slices have. On a GPU a kernel does that
(`tol.decode_kernel`). Dimension key: U tokens, N coefficients, P slices of a row, D model width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, Int32, Int64, Shaped, UInt8
from torch import Tensor

from flexmemory.tol.coding import PLAIN, Coding, SliceTensors, all_scales, gains_of, levels_of
from flexmemory.tol.scheme import Band
from flexmemory.tol.trellis import WINDOW, trellis_levels

CHUNK_NUMBERS = 1 << 19
"""Coefficients decoded at once on a CPU: what is written in between stays in its cache."""
CHUNK_ROWS = 512
"""Rows decoded at once on a GPU: what a basis makes of them takes as much memory again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Places:
    """Where the coefficients of one slice of one band are in a row, and what they stand for."""

    bit: Int64[Tensor, " N"]
    """The bit of the row at which the code begins."""
    width: Int64[Tensor, " N"]
    """Bits of the code, in a trellis of its window; 16 and 32 are a number's own bits."""
    end: Int64[Tensor, " N"]
    """The byte of the row after the last of the codes: from there windows read on `size` bytes before."""
    size: Int64[Tensor, " N"]
    base: Int64[Tensor, " N"]
    """Where the levels begin: the level is `levels[base + code * step]`."""
    step: Int64[Tensor, " N"]
    scale: Int64[Tensor, " N"]
    """The byte of the row that is the scale; -1 where there is none."""
    gain: Float[Tensor, " N"]


class Levels:
    """All tables that codes choose from, one after the other, each once."""

    def __init__(self) -> None:
        """No tables yet."""
        self._starts: dict[object, int] = {}
        self._tables: list[Tensor] = []
        self._size = 0

    def start(self, key: object, table: Float[Tensor, " levels"]) -> int:
        """Where the table of this key begins."""
        if key not in self._starts:
            self._starts[key] = self._size
            self._tables.append(table)
            self._size += len(table)
        return self._starts[key]

    def all(self) -> Float[Tensor, " levels"]:
        """The tables; never empty."""
        return torch.cat([*self._tables, torch.zeros(1)])


def places_of(coding: Coding, tensors: SliceTensors, levels: Levels, *, offset: int) -> Places:
    """Where the coefficients of a slice are that begins at byte `offset` of a row."""
    count = coding.num_coefficients
    bits, widths, bases, steps = [], [], [], []
    at, done = 8 * (offset + coding.num_scales), 0
    for width, run in coding.widths:
        number = torch.arange(run)
        code = number // coding.vector
        bits.append(at + width * code)
        widths.append(torch.full((run,), WINDOW if coding.levels == "trellis" else width))
        steps.append(torch.full((run,), coding.vector))
        if coding.levels in PLAIN:
            bases.append(torch.zeros(run, dtype=torch.int64))
        elif coding.levels == "pq":
            assert tensors.codebook is not None
            start = levels.start(id(tensors.codebook), tensors.codebook.flatten().cpu())
            bases.append(start + (done + code) * 256 * coding.vector + number % coding.vector)
        elif coding.levels == "trellis":
            bases.append(torch.full((run,), levels.start("trellis", trellis_levels())))
        else:
            bases.append(
                torch.full((run,), levels.start((coding.levels, width), levels_of(coding.levels, width).cpu()))
            )
        codes = run // coding.vector
        at, done = at + width * codes, done + codes
        if coding.levels != "trellis":
            at = -(-at // 8) * 8
    scale = offset + torch.arange(count) // coding.group if coding.group else torch.full((count,), -1)
    gains = None if coding.levels in PLAIN else gains_of(coding, tensors)
    return Places(
        bit=torch.cat(bits),
        width=torch.cat(widths),
        base=torch.cat(bases),
        step=torch.cat(steps),
        end=torch.full((count,), offset + coding.nbytes),
        size=torch.full((count,), coding.nbytes - coding.num_scales),
        scale=scale,
        gain=torch.ones(count) if gains is None else gains.float().cpu(),
    )


def gpu_bytes(bands: Sequence[Band], tensors: Sequence[Sequence[SliceTensors]], *, hidden_size: int) -> int:
    """Bytes of what a GPU decodes rows of `bands` with (`tol.decode_kernel.KernelDecoder.nbytes`)."""
    codings = [
        (coding, tensors[number][place])
        for number, band in enumerate(bands)
        for place, coding in enumerate(band.slices)
        if coding
    ]
    levels, slices = Levels(), len(bands[0].slices)
    for coding, of_slice in codings:
        places_of(coding, of_slice, levels, offset=0)
    rank = rank_of(bands)
    based = sum(any(band.slices[p] and tensors[0][p].basis is not None for band in bands) for p in range(slices))
    columns = max(hidden_size, rank)
    numbers = len(bands) * slices * (5 * columns + 2) + slices * hidden_size + len(levels.all()) + len(all_scales())
    return 4 * numbers + 2 * based * rank * hidden_size


def rank_of(bands: Sequence[Band]) -> int:
    """The most coefficients that a slice has of a basis, and two more, always 1, for its mean; a multiple of 8."""
    counts = [coding.num_coefficients for band in bands for coding in band.slices if coding and coding.basis]
    return -(-(max(counts) + 2) // 8) * 8 if counts else 0


class RowDecoder:
    """Decodes rows of a store on one device."""

    def __init__(
        self,
        bands: Sequence[Band],
        tensors: Sequence[Sequence[SliceTensors]],
        *,
        hidden_size: int,
        device: torch.device | str,
    ) -> None:
        """Prepare to decode rows of `bands`, of which `tensors` may have more slices, on `device`."""
        self._device = torch.device(device)
        self.row_bytes = tuple(band.row_bytes for band in bands)
        """Bytes of a row of each band."""
        self.kernel = None
        """What decodes on a GPU."""
        self._bands: list[_BandDecoder] = []
        if self._device.type == "cuda":
            from flexmemory.tol.decode_kernel import KernelDecoder  # Triton is there where a GPU is

            self.kernel = KernelDecoder(bands, tensors, hidden_size=hidden_size, device=device)
            return
        levels = Levels()
        self._bands = [
            _BandDecoder(band, of_band, levels, hidden_size=hidden_size)
            for band, of_band in zip(bands, tensors, strict=True)
        ]
        table, scales = levels.all(), all_scales()
        for band in self._bands:
            band.levels, band.scales = table, scales

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept to decode with."""
        if self.kernel is not None:
            return self.kernel.nbytes
        held = {t.data_ptr(): t.nbytes for band in self._bands for t in band.tensors()}
        return sum(held.values())

    def decode(
        self,
        data: UInt8[Tensor, "U row_bytes"],
        band: Int[Tensor, " U"],
        out: Float[Tensor, "U P D"],
    ) -> None:
        """Write rows over all of `out`.

        Args:
            data: Rows as they are stored, on this device; those of bands with shorter rows end in whatever is there.
            band: The band of each, on this device.
            out: Contiguous bf16 or fp32 on this device.
        """
        if self.kernel is not None:
            for first in range(0, len(data), CHUNK_ROWS):
                part = slice(first, first + CHUNK_ROWS)
                self.kernel.decode(data[part].view(-1), band[part], out[part], pitch=data.shape[1])
            return
        if len(data) == 1 or len(self._bands) == 1:
            self.decode_band(data, 0 if len(data) == 0 else int(band[0]), out)
            return
        for number in band.unique().tolist():
            chosen = (band == number).nonzero()[:, 0]
            if len(chosen) == len(data):
                self.decode_band(data, number, out)
                return
            rows = out.new_empty((len(chosen), *out.shape[1:]))
            self.decode_band(data.index_select(0, chosen), number, rows)
            out.index_copy_(0, chosen, rows)

    def decode_band(self, data: UInt8[Tensor, "U bytes"], number: int, out: Float[Tensor, "U P D"]) -> None:
        """The same for rows of one band, on a CPU."""
        band = self._bands[number]
        size = max(1, CHUNK_NUMBERS // max(1, band.count))
        for first in range(0, len(data), size):
            band.decode(data[first : first + size], out[first : first + size])


class _BandDecoder:
    """Decodes rows of one band by operations of PyTorch: first slices without a basis, then the others."""

    levels: Tensor
    scales: Tensor

    def __init__(self, band: Band, tensors: Sequence[SliceTensors], levels: Levels, *, hidden_size: int) -> None:
        kept = [place for place, coding in enumerate(band.slices) if coding is not None]
        self._direct = [place for place in kept if tensors[place].basis is None]
        self._based = [place for place in kept if tensors[place].basis is not None]
        offsets, parts = band.offsets(), []
        for place in (*self._direct, *self._based):
            coding = band.slices[place]
            assert coding is not None
            parts.append(places_of(coding, tensors[place], levels, offset=offsets[place]))
        self.count = sum(len(part.bit) for part in parts)
        self._width, self._num_slices, self._bytes = hidden_size, len(band.slices), band.row_bytes
        self._means = None
        if any(tensors[place].mean is not None for place in self._direct):
            means = [tensors[place].mean for place in self._direct]
            self._means = torch.stack([torch.zeros(hidden_size) if mean is None else mean for mean in means])
        self._products = [
            (tensors[place].mean, basis[: len(part.bit)])
            for place, part in zip(self._based, parts[len(self._direct) :], strict=True)
            if (basis := tensors[place].basis) is not None
        ]
        self._sizes = [len(part.bit) for part in parts[len(self._direct) :]]
        if not parts:
            return
        bit, width, end, size, base, step, scale, gain = (
            torch.cat([getattr(part, field.name) for part in parts]) for field in dataclasses.fields(Places)
        )
        bit, self._seams = _over_seams(bit, width, end, size, row_bytes=band.row_bytes)
        self._byte, self._shift = (bit >> 3).int(), (bit & 7).int()
        self._crossing = int((((bit & 7) + width.clamp(max=16) - 1) >> 3).max())
        self._raw = (width >= 16) if (width >= 16).any() else None
        self._wide = (width == 32) if (width == 32).any() else None
        self._mask = _one_or_all((1 << width.clamp(max=16)) - 1)
        self._base = _one_or_all(base) if base.any() else None
        self._step = _one_or_all(step) if (step > 1).any() else None
        self._gain = None if (gain == 1).all() else gain
        self._scale_bytes, which = scale.unique_consecutive(return_inverse=True)
        self._which, self._group = which.int(), 0
        self._unscaled = self._scale_bytes < 0
        if len(which) % len(self._scale_bytes) == 0:
            group = len(which) // len(self._scale_bytes)
            if torch.equal(which, torch.arange(len(which)) // group):
                self._group = group

    def tensors(self) -> list[Tensor]:
        """What is kept."""
        kept = [*vars(self).values(), *[tensor for product in self._products for tensor in product]]
        return [tensor for tensor in kept if isinstance(tensor, Tensor)]

    def decode(self, data: UInt8[Tensor, "U bytes"], out: Float[Tensor, "U P D"]) -> None:
        """Write rows over `out`, all in memory at once."""
        if len(self._direct) + len(self._based) < self._num_slices:
            out.zero_()
        if not self.count:
            return
        numbers = self._coefficients(data[:, : self._bytes])
        at = len(self._direct) * self._width
        if at:
            rows = numbers[:, :at].view(len(data), len(self._direct), self._width)
            rows = rows if self._means is None else rows.add_(self._means)
            if len(self._direct) == self._num_slices:
                out.copy_(rows)
            else:
                out[:, self._direct] = rows.to(out.dtype)
        for place, size, (mean, basis) in zip(self._based, self._sizes, self._products, strict=True):
            part = numbers[:, at : at + size]
            out[:, place] = part @ basis if mean is None else torch.addmm(mean, part, basis)
            at += size

    def _coefficients(self, data: UInt8[Tensor, "U bytes"]) -> Float[Tensor, "U N"]:
        count = len(data)
        extended = data if self._seams is None else torch.cat((data, data[:, self._seams]), dim=1)
        words = extended.int()
        for further in range(1, self._crossing + 1):
            words[:, :-further] |= extended[:, further:].int() << 8 * further
        codes = torch.empty((count, self.count), dtype=torch.int32)
        _take(words, self._byte, codes)
        bits = None
        if self._raw is not None:
            bits = codes << 16
            if self._wide is not None:
                above = torch.empty_like(codes)
                _take(words, (self._byte + 2).clamp(max=words.shape[1] - 1), above)
                bits = torch.where(self._wide, codes & 0xFFFF | above << 16, bits)
        if self._raw is None or not self._raw.all():
            codes >>= self._shift
            codes &= self._mask
            if self._raw is not None:
                codes.masked_fill_(self._raw, 0)
            if self._step is not None:
                codes *= self._step
            if self._base is not None:
                codes += self._base
            numbers = self.levels.index_select(0, codes.view(-1)).view(count, -1)
            if bits is not None and self._raw is not None:
                numbers = torch.where(self._raw, bits.view(torch.float32), numbers)
        else:
            assert bits is not None
            numbers = bits.view(torch.float32)
        if not self._unscaled.all():
            scales = self.scales.index_select(0, data[:, self._scale_bytes.clamp(min=0)].reshape(-1).int())
            scales = scales.view(count, -1)
            if self._unscaled.any():
                scales[:, self._unscaled] = 1
            if self._group:
                numbers.view(count, -1, self._group).mul_(scales[:, :, None])
            else:
                spread = torch.empty_like(numbers)
                _take(scales, self._which, spread)
                numbers *= spread
        return numbers if self._gain is None else numbers.mul_(self._gain)


def _over_seams(
    bit: Int64[Tensor, " N"],
    width: Int64[Tensor, " N"],
    end: Int64[Tensor, " N"],
    size: Int64[Tensor, " N"],
    *,
    row_bytes: int,
) -> tuple[Int64[Tensor, " N"], Int64[Tensor, " seams"] | None]:
    """Where codes begin if the last two bytes of each ring and its first two follow the row; these bytes."""
    over = bit + width > 8 * end
    if not over.any():
        return bit, None
    rings, which = torch.stack((end, end - size), dim=1)[over].unique(dim=0, return_inverse=True)
    seams = rings.repeat_interleave(2, dim=1) + torch.tensor([-2, -1, 0, 1])
    moved = bit.clone()
    moved[over] += 8 * (row_bytes + 4 * which - seams[which, 0])
    return moved, seams.flatten()


def _one_or_all(values: Int64[Tensor, " N"]) -> Int32[Tensor, ...]:
    """One value that stands for all, where they are alike."""
    return (values[0] if bool((values == values[0]).all()) else values).int()


def _take(table: Shaped[Tensor, "U all"], index: Int32[Tensor, " N"], out: Shaped[Tensor, "U N"]) -> None:
    """`table[:, index]`, which PyTorch does five times as fast row by row."""
    for row, taken in zip(table, out, strict=True):
        torch.index_select(row, 0, index, out=taken)
