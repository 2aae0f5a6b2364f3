"""How a slice of a row is written in few bits: scales of one byte, then codes.

A slice of D numbers is `mean + coefficients`, or `mean + coefficients @ basis` with fewer than D or better chosen
coefficients. Coefficient i of a token is

    gain_i * scale * level[code_i],    scale = 2 ** ((byte - 255) / 16) of the group that i is in

`Coding` says how many bits each code has; mean, gains, basis and levels are the same for many tokens and stay in memory
(`SliceTensors`). `encode_slice` and `decode_slice` are the plain reference; `tol.decoder` decodes whole rows at once.
Dimension key: U tokens, N coefficients, M codes, D model width.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from flexmemory.tol import trellis

Levels = Literal["fp32", "bf16", "int", "normal", "trellis", "nf4", "fp8", "pq"]
"""What codes stand for: a number's own bits; whole numbers; levels with the least squared error for normal numbers;
levels that depend on the codes after (`tol.trellis`); NF4 (QLoRA, arXiv 2305.14314); e4m3; vectors of a codebook."""
PLAIN = ("fp32", "bf16")
STEPS_PER_OCTAVE = 16
"""Of scales: two neighbours differ by 4.4 %."""
LARGEST_SCALE = 255
WIDTHS = (1, 2, 3, 4, 5, 6, 8)
"""Bits that a code of `normal` or `trellis` levels may have."""
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Coding:
    """How one slice is written."""

    levels: Levels
    """What codes stand for."""
    widths: tuple[tuple[int, int], ...]
    """Runs of coefficients: bits of a code, and how many coefficients have such codes."""
    group: int = 0
    """Coefficients under one scale; 0 where there are no scales."""
    vector: int = 1
    """Coefficients that one code stands for: more than 1 in product quantisation."""
    basis: bool = False
    """Whether coefficients are those of a basis."""

    def __post_init__(self) -> None:
        """Reject what cannot be decoded."""
        fixed = {"fp32": (32,), "bf16": (16,), "nf4": (4,), "fp8": (8,), "pq": (8,)}
        known = {**fixed, "int": WIDTHS[1:], "normal": WIDTHS, "trellis": WIDTHS}
        if self.levels not in known:
            raise ValueError(f"unknown levels {self.levels!r}; this version has {', '.join(known)}: update flexmemory")
        for bits, count in self.widths:
            if bits not in known[self.levels] or count < 1:
                raise ValueError(f"{self.levels} codes cannot be {count} of {bits} bits")
        if not self.widths or self.group < 0 or self.vector < 1 or (self.vector > 1) != (self.levels == "pq"):
            raise ValueError(f"not a coding of a slice: {self}")
        if self.levels == "pq" and any(count % self.vector for _, count in self.widths):
            raise ValueError(f"vectors of {self.vector} do not divide {self.num_coefficients} numbers")
        if self.levels == "trellis" and ((bits := self.num_bits) % 8 or bits < trellis.WINDOW):
            raise ValueError(f"trellis codes of a slice need whole bytes, two or more, got {bits} bits")

    @property
    def num_coefficients(self) -> int:
        """N."""
        return sum(count for _, count in self.widths)

    @property
    def num_bits(self) -> int:
        """Bits of a token's codes, those of each run one after the other, where codes are of one number."""
        return sum(bits * count for bits, count in self.widths)

    @property
    def num_scales(self) -> int:
        """Scales of a token."""
        return -(-self.num_coefficients // self.group) if self.group else 0

    @property
    def nbytes(self) -> int:
        """Bytes of one token's slice; each run of codes begins at a whole byte, but in a trellis."""
        if self.levels == "trellis":
            return self.num_scales + self.num_bits // 8
        return self.num_scales + sum(-(-bits * (count // self.vector) // 8) for bits, count in self.widths)

    @property
    def plain(self) -> bool:
        """Whether it is numbers as they are."""
        return self.levels in PLAIN and not self.basis

    def to_json(self) -> dict[str, Any]:
        """What a manifest says; defaults are left out."""
        values: dict[str, Any] = {"levels": self.levels, "widths": [list(run) for run in self.widths]}
        for name, default in (("group", 0), ("vector", 1), ("basis", False)):
            if getattr(self, name) != default:
                values[name] = getattr(self, name)
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Coding:
        """From what a manifest says.

        Raises:
            ValueError: it says something else than a coding that this version has.
        """
        try:
            widths = tuple((int(bits), int(count)) for bits, count in values["widths"])
            return cls(**{**values, "widths": widths})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a coding of this version: {values} ({error}); update flexmemory") from error


CODECS = {
    "fp32": "numbers as they are",
    "bf16": "numbers rounded to bfloat16",
    "fp8": "e4m3 numbers with a scale for each token and layer",
    "int8": "whole numbers of 8 bits with a scale for each token and layer (int4, int3, int2 with fewer)",
    "nf4": "NormalFloat of 4 bits with a scale for 64 numbers",
    "normal4": "levels for normal numbers (1, 2, 3, 4, 5, 6 or 8 bits) with a scale for each token and layer",
    "trellis4": "the same with codes that choose among thousands of levels together; smaller errors, slower to write",
    "svd512": "512 coefficients in bf16 on a basis for each layer",
    "svd512+normal4": "the same with coefficients of 4 bits (or int4, int8, trellis2 ...)",
    "pq4x8": "product quantisation: 4 numbers as one code of 8 bits (2 bits a number; pq8x8 has 1)",
}
"""Names of codecs, by example; `coding_of` reads them."""


def coding_of(name: str, hidden_size: int) -> Coding:
    """The coding that a codec of this name gives slices of `hidden_size` numbers.

    Raises:
        ValueError: there is no such codec, or not for this size.
    """
    match = re.fullmatch(r"(?:svd(\d+)(?:\+|$))?(?:(fp32|bf16|fp8|nf4)|(int|normal|trellis)([1-68])|pq(\d+)x8)?", name)
    if not match or not name or name.endswith("+"):
        raise ValueError(f"unknown ToL codec {name!r}; there are {', '.join(CODECS)} and others of their kinds")
    rank, fixed, kind, bits, vector = match.groups()
    count = hidden_size if rank is None else int(rank)
    if not 0 < count <= hidden_size or (rank and fixed == "fp32") or (rank and vector):
        raise ValueError(f"codec {name!r} does not fit rows of {hidden_size} numbers")
    basis = rank is not None
    levels: Any = kind or fixed or "bf16"
    if kind:
        return Coding(levels=levels, widths=((int(bits), count),), group=count, basis=basis)
    if vector:
        return Coding(levels="pq", widths=((8, count),), group=count, vector=int(vector))
    group = {"fp8": count, "nf4": min(64, count)}.get(levels, 0)
    return Coding(
        levels=levels, widths=(({"fp32": 32, "bf16": 16, "fp8": 8, "nf4": 4}[levels], count),), group=group, basis=basis
    )


@functools.cache
def normal_levels(bits: int) -> Float[Tensor, " levels"]:
    """The levels with the least squared error for normal numbers (Lloyd-Max), ascending; linear for 8 bits."""
    if bits == 8:
        return torch.arange(-128, 128) / 24.0
    count = 1 << bits
    root = math.sqrt(2.0)
    # For many levels the best have the density of a normal distribution three times as wide (Bennett).
    levels = torch.erfinv(2 * (torch.arange(count, dtype=torch.float64) + 0.5) / count - 1) * math.sqrt(6.0)
    edge = torch.tensor([40.0], dtype=torch.float64)
    for _ in range(2000):
        ends = torch.cat((-edge, (levels[1:] + levels[:-1]) / 2, edge))
        density = torch.exp(-ends * ends / 2) / math.sqrt(2 * math.pi)
        share = (torch.erf(ends / root)).diff() / 2
        levels = -density.diff() / share
    return levels.float()


@functools.cache
def levels_of(levels: Levels, bits: int) -> Float[Tensor, " levels"]:
    """What the codes of some width stand for; not for plain numbers and vectors."""
    if levels == "normal":
        return normal_levels(bits)
    if levels == "nf4":
        return torch.tensor(_NF4)
    if levels == "fp8":
        values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        return values.nan_to_num(0.0)  # 0x7F and 0xFF, which are never written
    assert levels == "int"
    largest = (1 << (bits - 1)) - 1
    return torch.arange(-largest - 1, largest + 1).clamp(min=-largest).float()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SliceTensors:
    """What codes of a slice are decoded with, the same for all tokens of a band; float32, on one device."""

    mean: Float[Tensor, " D"] | None = None
    gain: Float[Tensor, " N"] | None = None
    basis: Float[Tensor, "R D"] | None = None
    """May have more rows than there are coefficients: bands share it, and each takes the first ones."""
    analysis: Float[Tensor, "D R"] | None = None
    """What takes a row less its mean to coefficients; to encode only. None: the transposed basis."""
    weight: Float[Tensor, " N"] | None = None
    """What a squared error of each coefficient costs, to choose scales by; to encode only."""
    codebook: Float[Tensor, "M 256 vector"] | None = None
    """Of product quantisation."""


@functools.cache
def all_scales() -> Float[Tensor, " 256"]:
    """The scale of each byte, made once: what a device's powers end in is its own matter."""
    return torch.exp2((torch.arange(256).double() - LARGEST_SCALE) / STEPS_PER_OCTAVE).float()


def scale_of(byte: UInt8[Tensor, "U groups"]) -> Float[Tensor, "U groups"]:
    """Scales of bytes."""
    return all_scales().to(byte.device)[byte.int()]


def _byte_of(scale: Float[Tensor, "U groups"], *, up: bool = False) -> UInt8[Tensor, "U groups"]:
    """The byte of the nearest scale, or of the next larger one."""
    exact = scale.clamp(min=1e-30).log2() * STEPS_PER_OCTAVE + LARGEST_SCALE
    whole = (exact - 1e-4).ceil() if up else exact.round()
    return whole.clamp(0, LARGEST_SCALE).to(torch.uint8)


def pack(codes: Int64[Tensor, "U N"], bits: int) -> UInt8[Tensor, "U bytes"]:
    """Codes of `bits` bits one after the other, the lowest bits first; zeros up to a whole byte."""
    count = codes.shape[1]
    padded = torch.nn.functional.pad(codes, (0, -count % 8)).unflatten(1, (-1, 8))  # 8 codes fill `bits` bytes
    shifts = torch.arange(8, device=codes.device) * bits
    if bits == 8:
        data = padded.to(torch.uint8)
    else:
        words = (padded << shifts).sum(-1)
        data = (words[..., None] >> (8 * torch.arange(bits, device=codes.device)) & 255).to(torch.uint8)
    return data.flatten(1)[:, : -(-count * bits // 8)]


def unpack(data: UInt8[Tensor, "U bytes"], bits: int, count: int) -> Int64[Tensor, "U N"]:
    """The inverse of `pack`."""
    padded = torch.nn.functional.pad(data, (0, -data.shape[1] % bits)).unflatten(1, (-1, bits)).long()
    words = (padded << (8 * torch.arange(bits, device=data.device))).sum(-1) if bits < 8 else None
    if words is None:
        return data[:, :count].long()
    codes = words[..., None] >> (torch.arange(8, device=data.device) * bits) & ((1 << bits) - 1)
    return codes.flatten(1)[:, :count]


def decode_slice(data: UInt8[Tensor, "U nbytes"], coding: Coding, tensors: SliceTensors) -> Float[Tensor, "U D"]:
    """The rows that `data` holds, in float32."""
    if coding.levels in PLAIN:
        dtype = torch.bfloat16 if coding.levels == "bf16" else torch.float32
        numbers = data.reshape(-1).view(dtype).view(len(data), -1).float()
    else:
        numbers = _coefficients(data, coding, tensors)
    if tensors.basis is not None:
        numbers = numbers @ tensors.basis[: numbers.shape[1]]
    return numbers if tensors.mean is None else numbers + tensors.mean


def gains_of(coding: Coding, tensors: SliceTensors) -> Float[Tensor, " N"] | None:
    """What levels are multiplied by besides the scale: the gains, and in a trellis what belongs to each width."""
    if coding.levels != "trellis":
        return tensors.gain
    spreads = trellis.spreads(coding.widths)
    return spreads if tensors.gain is None else tensors.gain * spreads.to(tensors.gain.device)


def _coefficients(data: UInt8[Tensor, "U nbytes"], coding: Coding, tensors: SliceTensors) -> Float[Tensor, "U N"]:
    numbers = _levels(data, coding, tensors)
    if coding.group:
        scales = scale_of(data[:, : coding.num_scales])
        numbers = numbers * scales.repeat_interleave(coding.group, dim=1)[:, : numbers.shape[1]]
    gains = gains_of(coding, tensors)
    return numbers if gains is None else numbers * gains.to(data.device)


def _levels(data: UInt8[Tensor, "U nbytes"], coding: Coding, tensors: SliceTensors) -> Float[Tensor, "U N"]:
    """What the codes stand for."""
    at, parts = coding.num_scales, []
    if coding.levels == "trellis":
        return trellis.trellis_levels().to(data.device)[trellis.decode_windows(data[:, at:], coding.widths)]
    for bits, count in coding.widths:
        codes = count // coding.vector
        size = -(-bits * codes // 8)
        code = unpack(data[:, at : at + size], bits, codes)
        at += size
        if coding.levels == "pq":
            assert tensors.codebook is not None
            book = tensors.codebook
            parts.append(book[torch.arange(codes, device=data.device), code].flatten(1))
        else:
            parts.append(levels_of(coding.levels, bits).to(data.device)[code])
    return torch.cat(parts, dim=1)


def encode_slice(rows: Float[Tensor, "U D"], coding: Coding, tensors: SliceTensors) -> UInt8[Tensor, "U nbytes"]:
    """`rows` as bytes; scales are those with about the least (weighted) squared error."""
    rows = rows.float()
    numbers = rows if tensors.mean is None else rows - tensors.mean
    if tensors.basis is not None:
        analysis = tensors.basis.T if tensors.analysis is None else tensors.analysis
        numbers = numbers @ analysis[:, : coding.num_coefficients]
    if coding.levels in PLAIN:
        dtype = torch.bfloat16 if coding.levels == "bf16" else torch.float32
        return numbers.to(dtype).contiguous().view(torch.uint8)
    if tensors.gain is not None:
        numbers = numbers / tensors.gain
    weight = torch.ones_like(numbers[0]) if tensors.weight is None else tensors.weight
    group = coding.group or numbers.shape[1]
    missing = -numbers.shape[1] % group
    grouped = torch.nn.functional.pad(numbers, (0, missing)).unflatten(1, (-1, group))  # (U, groups, group)
    weights = torch.nn.functional.pad(weight, (0, missing)).unflatten(0, (-1, group))
    byte = _scales(grouped, weights, coding, tensors)
    scaled = (grouped / scale_of(byte)[..., None]).flatten(1)[:, : numbers.shape[1]]
    start = [byte] if coding.group else []
    if coding.levels == "trellis":
        windows = trellis.search(scaled, weight, coding.widths)
        return torch.cat([*start, trellis.encode_windows(windows, coding.widths)], dim=1)
    _, codes = _nearest(scaled, coding, tensors)
    runs, at = [], 0
    for bits, count in coding.widths:
        runs.append(pack(codes[:, at : at + count // coding.vector], bits))
        at += count // coding.vector
    return torch.cat(start + runs, dim=1)


def _scales(
    grouped: Float[Tensor, "U groups group"],
    weights: Float[Tensor, "groups group"],
    coding: Coding,
    tensors: SliceTensors,
) -> UInt8[Tensor, "U groups"]:
    """The bytes of the scales; of a trellis the deviations, which its levels are made for."""
    largest = grouped.abs().amax(dim=-1)
    if coding.levels == "fp8":
        return _byte_of(largest / 448.0, up=True)
    if coding.levels == "int" and coding.widths[0][0] == 8:  # no number is cut off: the error is half a step at most
        return _byte_of(largest / 127.0, up=True)
    spread = (grouped.square() * weights).sum(-1).div(weights.sum(-1).clamp(min=1e-30)).sqrt()
    if coding.levels == "trellis":
        return _byte_of(spread)
    if coding.levels in ("normal", "pq"):
        middle, reach = _byte_of(spread).int(), 12
    else:
        top = levels_of(coding.levels, coding.widths[0][0]).max().item()
        middle, reach = _byte_of(largest / top).int() - 10, 12  # where the largest number is cut off a little

    def error_of(byte: Tensor) -> Tensor:
        scale = scale_of(byte)[..., None]
        levels, _ = _nearest((grouped / scale).flatten(1)[:, : coding.num_coefficients], coding, tensors)
        levels = torch.nn.functional.pad(levels, (0, grouped[0].numel() - levels.shape[1])).view_as(grouped)
        return ((levels * scale - grouped).square() * weights).sum(-1)

    best = middle.clamp(0, LARGEST_SCALE).to(torch.uint8)
    least = error_of(best)
    for offsets in (range(-reach, reach + 1, 3), (-1, 1)):
        around = middle if len(offsets) > 2 else best.int()
        for offset in offsets:
            byte = (around + offset).clamp(0, LARGEST_SCALE).to(torch.uint8)
            error = error_of(byte)
            best, least = torch.where(error < least, byte, best), torch.minimum(error, least)
    return best


def _nearest(
    numbers: Float[Tensor, "U N"], coding: Coding, tensors: SliceTensors
) -> tuple[Float[Tensor, "U N"], Int64[Tensor, "U M"]]:
    """The nearest levels, and their codes."""
    levels, codes, at = [], [], 0
    for bits, count in coding.widths:
        part = numbers[:, at : at + count]
        at += count
        if coding.levels == "pq":
            assert tensors.codebook is not None
            vectors = part.unflatten(1, (-1, coding.vector)).transpose(0, 1).contiguous()  # (M, U, vector)
            code = torch.cdist(vectors, tensors.codebook).argmin(-1).T  # (U, M)
            codes.append(code)
            levels.append(tensors.codebook[torch.arange(code.shape[1], device=code.device), code].flatten(1))
        elif coding.levels == "fp8":
            code = part.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).long()
            codes.append(code)
            levels.append(levels_of("fp8", 8).to(part.device)[code])
        else:
            table = levels_of(coding.levels, bits).to(part.device)
            first = 1 if coding.levels == "int" else 0  # the lowest code repeats the next
            ends = (table[first + 1 :] + table[first:-1]) / 2
            code = torch.bucketize(part.contiguous(), ends) + first
            codes.append(code)
            levels.append(table[code])
    return torch.cat(levels, dim=1), torch.cat(codes, dim=1)
