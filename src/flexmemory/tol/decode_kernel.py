"""Rows in few bits decoded by a GPU: from bytes in its memory, wherever they came from, to bf16 rows.

What `tol.decoder` does on a CPU. A program decodes a block of one slice of one row, each number by itself: it looks up
where its code is and what the code stands for. Slices with a basis end as coefficients, which one product for all of
them takes to rows. Nothing waits for the host, so all of it can be captured in a CUDA graph.
Dimension key: U rows, P slices of a row, D model width, W the larger of D and R, R coefficients, Q slices with a basis.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, Int32, Int64, UInt8
from torch import Tensor

from flexmemory.tol.coding import SliceTensors, all_scales
from flexmemory.tol.decoder import Levels, places_of, rank_of
from flexmemory.tol.scheme import Band

BLOCK = 1024
"""Numbers that a program decodes."""
WORDS = 1024
"""Words of four bytes that a program copies."""
PATIENCE = 2**30
"""Looks into the mailbox, of about a microsecond each, before a step gives up and takes whatever is there: a quarter of
an hour, so that a host which lives is always waited for, and one which does not cannot block the GPU for good."""


@triton.jit
def _fetch(
    token_ids_ptr, active_ptr, hot_slot_ptr, below_ptr, offset_ptr, band_ptr, words_ptr, ready_ptr, steps_ptr, out_ptr,
    num_slots, pitch,
    HAS_HOT: tl.constexpr, MAILBOX: tl.constexpr, WORDS: tl.constexpr, PATIENCE: tl.constexpr,
):  # fmt: skip
    """Copy encoded rows, as words: `pitch` apart in `out_ptr`, those of hot tokens left out."""
    b = tl.program_id(0)
    columns = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    token = tl.load(token_ids_ptr + b)
    place = token * 0 - 1
    if HAS_HOT:
        place = tl.load(hot_slot_ptr + token).to(tl.int64)
    if place < 0:
        mask = columns < tl.load(words_ptr + tl.load(band_ptr + token))
        if MAILBOX:
            step = tl.load(steps_ptr + b)
            if tl.load(active_ptr + b):
                looks = 0
                while (tl.load(ready_ptr + b, volatile=True) < step) & (looks < PATIENCE):
                    looks += 1
            tl.debug_barrier()
            start = (step % 2 * num_slots + b) * pitch
        else:
            start = tl.load(offset_ptr + token) // 4
        row = tl.load(below_ptr + start + columns, mask=mask)
        tl.store(out_ptr + b.to(tl.int64) * pitch + columns, row, mask=mask)


@triton.jit
def _decode(
    data_ptr, chosen_ptr, offset_ptr, band_ptr, hot_slot_ptr, hot_ptr, bit_ptr, form_ptr, base_ptr, scale_ptr, gain_ptr,
    ring_ptr, mean_ptr, number_ptr, levels_ptr, scales_ptr, out_ptr, coefficients_ptr, pitch, num_rows,
    P: tl.constexpr, D: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
    BY_TOKEN: tl.constexpr, STAGED: tl.constexpr, HAS_HOT: tl.constexpr, HAS_BASIS: tl.constexpr,
    HAS_NUMBERS: tl.constexpr, HAS_RINGS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program takes a block of one slice of one row: its numbers, or coefficients where it has a basis."""
    b = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1)
    columns = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    index = b
    if BY_TOKEN:
        index = tl.load(chosen_ptr + b).to(tl.int64)
    hot = index * 0 - 1
    if HAS_HOT:
        hot = tl.load(hot_slot_ptr + index).to(tl.int64)
    number = place * 0 - 1
    if HAS_BASIS:
        number = tl.load(number_ptr + place)
    target = out_ptr + (b * P + place) * D + columns
    if hot >= 0:
        if number < 0:
            inside = columns < D
            tl.store(target, tl.load(hot_ptr + (hot * P + place) * D + columns, mask=inside), mask=inside)
    else:
        row = data_ptr + b * pitch
        if not STAGED:
            row = data_ptr + tl.load(offset_ptr + index)
        size = tl.where(number < 0, D, R)
        inside = columns < size
        of_slice = tl.load(band_ptr + index).to(tl.int64) * P + place
        at = of_slice * W + columns
        bit = tl.load(bit_ptr + at, mask=inside, other=0)
        form = tl.load(form_ptr + at, mask=inside, other=0)
        base = tl.load(base_ptr + at, mask=inside, other=0)
        scale_at = tl.load(scale_ptr + at, mask=inside, other=-1)
        gain = tl.load(gain_ptr + at, mask=inside, other=0.0)
        width = form & 255
        byte = bit >> 3
        shift = bit & 7
        word = tl.load(row + byte, mask=width > 0, other=0).to(tl.int32)
        second = byte + 1
        if HAS_RINGS:  # a window reads on from the slice's end to its first codes
            end = tl.load(ring_ptr + 2 * of_slice)
            size = tl.load(ring_ptr + 2 * of_slice + 1)
            third = byte + 2
            second = tl.where(second < end, second, second - size)
            third = tl.where(third < end, third, third - size)
            word |= tl.load(row + third, mask=(shift + width > 16) & (width < 16), other=0).to(tl.int32) << 16
        word |= tl.load(row + second, mask=shift + width > 8, other=0).to(tl.int32) << 8
        code = (word >> shift) & ((1 << tl.minimum(width, 15)) - 1)
        coded = (width > 0) & (width < 16)
        value = tl.load(levels_ptr + base + code * (form >> 8), mask=coded, other=1.0)  # else the gain alone
        if HAS_NUMBERS:
            high = tl.load(row + byte + 2, mask=width == 32, other=0).to(tl.int32)
            high |= tl.load(row + byte + 3, mask=width == 32, other=0).to(tl.int32) << 8
            bits = tl.where(width == 32, word | (high << 16), word << 16)
            value = tl.where(width >= 16, bits.to(tl.float32, bitcast=True), value)
        scaled = scale_at >= 0
        scale = tl.load(row + scale_at, mask=scaled, other=0).to(tl.int32)
        value = value * tl.load(scales_ptr + scale, mask=scaled, other=1.0) * gain
        if number < 0:
            value += tl.load(mean_ptr + place * D + columns, mask=inside & (width > 0), other=0.0)
            tl.store(target, value.to(out_ptr.dtype.element_ty), mask=inside)
        elif HAS_BASIS:
            result = coefficients_ptr + (number * num_rows + b) * R + columns
            tl.store(result, value.to(coefficients_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _spread(
    product_ptr, chosen_ptr, hot_slot_ptr, hot_ptr, place_ptr, out_ptr, num_rows,
    P: tl.constexpr, D: tl.constexpr, HAS_HOT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Put products of coefficients and bases where their slices are, hot rows as they are."""
    b = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1)
    columns = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < D
    place = tl.load(place_ptr + number)
    hot = b * 0 - 1
    if HAS_HOT:
        hot = tl.load(hot_slot_ptr + tl.load(chosen_ptr + b)).to(tl.int64)
    target = out_ptr + (b * P + place) * D + columns
    if hot >= 0:
        tl.store(target, tl.load(hot_ptr + (hot * P + place) * D + columns, mask=mask), mask=mask)
    else:
        value = tl.load(product_ptr + (number * num_rows + b) * D + columns, mask=mask)
        tl.store(target, value.to(out_ptr.dtype.element_ty), mask=mask)


class Hot(NamedTuple):
    """Decoded rows of some tokens (`tol.hot.HotSet`)."""

    slot: Int32[Tensor, " V"]
    table: Float[Tensor, "H P D"]


class KernelDecoder:
    """Decodes rows of a store on one GPU."""

    def __init__(
        self,
        bands: Sequence[Band],
        tensors: Sequence[Sequence[SliceTensors]],
        *,
        hidden_size: int,
        device: torch.device | str,
        basis_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """Prepare to decode rows of `bands`, of which `tensors` may have more slices, on `device`.

        Args:
            bands: How rows are coded.
            tensors: What they are decoded with.
            hidden_size: D.
            device: Where all of it happens.
            basis_dtype: Of coefficients and bases in products. Rows of a basis have a factor of their own, so that
                stored ones, whole numbers of 4 or 8 bits but for it, lose nothing in bf16.
        """
        slices, self._width = len(bands[0].slices), hidden_size
        self._based = [
            place
            for place in range(slices)
            if any(band.slices[place] and of[place].basis is not None for band, of in zip(bands, tensors, strict=True))
        ]
        # The last two coefficients are for the mean: what bf16 keeps of it, and what that lacks.
        self._rank = rank_of(bands)
        columns = max(hidden_size, self._rank)
        levels = Levels()
        names = ("bit", "form", "base", "scale", "gain", "ring")
        grids = {name: torch.zeros((len(bands), slices, columns), dtype=torch.int32) for name in names[:-2]}
        grids["scale"] -= 1
        grids["gain"] = torch.zeros((len(bands), slices, columns))
        grids["ring"] = torch.zeros((len(bands), slices, 2), dtype=torch.int32)
        means = torch.zeros((slices, hidden_size))
        bases, factors = self._bases(tensors, dtype=basis_dtype)
        for number, band in enumerate(bands):
            offsets = band.offsets()
            for place, coding in enumerate(band.slices):
                if coding is None:
                    continue
                of_slice = tensors[number][place]
                places = places_of(coding, of_slice, levels, offset=offsets[place])
                part = (number, place, slice(coding.num_coefficients))
                grids["bit"][part], grids["base"][part] = places.bit.int(), places.base.int()
                grids["form"][part] = (places.width | places.step << 8).int()
                grids["scale"][part], grids["gain"][part] = places.scale.int(), places.gain
                grids["ring"][number, place] = torch.stack((places.end[0], places.size[0])).int()
                if coding.basis:
                    grids["gain"][part] *= factors[place][: coding.num_coefficients]
                    grids["gain"][number, place, self._rank - 2 : self._rank] = 1.0
                elif of_slice.mean is not None:
                    means[place] = of_slice.mean
        self._numbers = bool(((grids["form"] & 255) >= 16).any())
        self._rings = any(coding and coding.levels == "trellis" for band in bands for coding in band.slices)
        self._grids = [grids[name].to(device) for name in names]
        self._means, self._levels, self._scales = (t.to(device) for t in (means, levels.all(), all_scales()))
        basis_number = torch.full((slices,), -1, dtype=torch.int32)
        basis_number[self._based] = torch.arange(len(self._based), dtype=torch.int32)
        self._basis_number = basis_number.to(device)
        self._basis_place = torch.tensor(self._based, dtype=torch.int32, device=device)
        self._basis = bases.to(device)
        pitches = [-(-band.row_bytes // 4) for band in bands]
        self.pitch = 4 * max(pitches)
        """Bytes from one row to the next where encoded rows are staged."""
        self._band_words = torch.tensor(pitches, dtype=torch.int32, device=device)

    def _bases(
        self, tensors: Sequence[Sequence[SliceTensors]], *, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "Q R D"], dict[int, Float[Tensor, " R"]]]:
        """Bases of all slices that have one, their means below them, and by slice the factor of each row."""
        bases = torch.zeros((len(self._based), self._rank, self._width), dtype=dtype)
        factors = {}
        for number, place in enumerate(self._based):
            of_slice = next(of_band[place] for of_band in tensors if of_band[place].basis is not None)
            assert of_slice.basis is not None
            rows = of_slice.basis[: self._rank - 2].float().cpu()
            largest = rows.abs().amax(dim=1).clamp(min=1e-30)
            factor = largest / 127
            for levels in (7, 127):  # as `tol.scheme.pack_basis` stores them
                scaled = rows / (largest / levels)[:, None]
                whole = scaled.round()
                if (scaled - whole).abs().max() < 1e-3:
                    rows, factor = whole, largest / levels
                    break
            else:
                rows = rows / factor[:, None]
            bases[number, : len(rows)] = rows.to(dtype)
            factors[place] = factor
            if of_slice.mean is not None:
                mean = of_slice.mean.float().cpu()
                bases[number, -2] = mean.to(dtype)
                bases[number, -1] = (mean - bases[number, -2].float()).to(dtype)
        return bases, factors

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept to decode with."""
        kept = (*self._grids, self._means, self._levels, self._scales, self._basis)
        return sum(tensor.nbytes for tensor in kept)

    def decode(
        self,
        data: UInt8[Tensor, " bytes"],
        band: Int[Tensor, " n"],
        out: Float[Tensor, "U P D"],
        *,
        pitch: int = 0,
        chosen: Int64[Tensor, " n"] | None = None,
        offset: Int64[Tensor, " n"] | None = None,
        hot: Hot | None = None,
    ) -> None:
        """Write rows over all of `out`, contiguous; all arguments are on the device.

        Args:
            data: Rows as they are stored.
            band: The band of each row, or of each token where rows are `chosen`.
            out: Where rows go.
            pitch: Bytes from one row to the next.
            chosen: The token of each row.
            offset: Where the row of each token begins, or where each begins, if not `pitch` bytes apart.
            hot: Rows that are copied from here instead, by token.
        """
        assert out.is_contiguous()
        assert hot is None or (chosen is not None and hot.table.dtype == out.dtype)
        count, (slices, width) = len(out), out.shape[1:]
        if not count:
            return
        unused = self._means
        coefficients = self._basis.new_empty((len(self._based), count, self._rank))
        hot_slot, hot_table = (unused, unused) if hot is None else hot
        columns = max(width, self._rank)
        _decode[count, slices, triton.cdiv(columns, BLOCK)](
            data, unused if chosen is None else chosen, unused if offset is None else offset, band,
            hot_slot, hot_table, *self._grids, self._means, self._basis_number, self._levels, self._scales, out,
            coefficients, pitch, count,
            P=slices, D=width, W=columns, R=self._rank, BY_TOKEN=chosen is not None, STAGED=offset is None,
            HAS_HOT=hot is not None, HAS_BASIS=bool(self._based), HAS_NUMBERS=self._numbers, HAS_RINGS=self._rings,
            BLOCK=BLOCK,
        )  # fmt: skip
        if self._based:
            product = torch.bmm(coefficients, self._basis)
            _spread[count, len(self._based), triton.cdiv(width, BLOCK)](
                product, unused if chosen is None else chosen, hot_slot, hot_table, self._basis_place, out, count,
                P=slices, D=width, HAS_HOT=hot is not None, BLOCK=BLOCK,
            )  # fmt: skip

    def fetch(
        self,
        below: UInt8[Tensor, " bytes"],
        staged: UInt8[Tensor, "S pitch"],
        *,
        chosen: Int64[Tensor, " n"],
        count: int,
        band: Int32[Tensor, " V"],
        offset: Int64[Tensor, " V"] | None = None,
        mailbox: tuple[Tensor, Tensor, Tensor] | None = None,
        hot_slot: Int32[Tensor, " V"] | None = None,
    ) -> None:
        """Copy the encoded rows of the first `count` tokens of `chosen` to `staged`; all but `below` on the device.

        Args:
            below: Rows in memory that the GPU can read: all of them, or a mailbox of two rows for each slot.
            staged: Where rows go, `pitch` bytes apart.
            chosen: Tokens.
            count: How many.
            band: The band of each token.
            offset: Where the row of each token begins in `below`, a multiple of 4.
            mailbox: Of slots instead: whether they run; the steps whose rows are there, in pinned memory; their steps.
            hot_slot: Tokens whose rows are not needed: those for which this is not negative.
        """
        assert (offset is None) != (mailbox is None)
        active, ready, steps = (chosen, chosen, chosen) if mailbox is None else mailbox
        words = staged.shape[1] // 4
        _fetch[count, triton.cdiv(words, WORDS)](
            chosen, active, chosen if hot_slot is None else hot_slot, below.view(torch.int32),
            chosen if offset is None else offset, band, self._band_words, ready, steps, staged.view(torch.int32),
            len(staged), words,
            HAS_HOT=hot_slot is not None, MAILBOX=mailbox is not None, WORDS=WORDS, PATIENCE=PATIENCE,
        )  # fmt: skip
