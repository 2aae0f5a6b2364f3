"""Which coding each layer has in each band under a byte budget: reverse water-filling, rounded to whole widths.

A coefficient of variance v, whose squared error costs h, costs v h noise(width) with a code of some width, and bytes in
every row of its band. All choices that are best at one price of a byte are found one by one; the price is searched
that meets the budget. Dimension key: L layers, N coefficients, D model width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from flexmemory.tol.coding import WIDTHS, Coding
from flexmemory.tol.trellis import NOISE

RUN = 8
"""Coefficients that get one width: whole bytes at any."""
LEAST_RING = 32
"""Bits of a slice below which its codes are too few for a trellis: the levels of each are chosen alone."""


def noise(width: int) -> float:
    """Squared error of normal numbers of variance 1 in codes of `width` bits; 0 bits drop them, 16 are bf16."""
    return {0: 1.0, **NOISE, 16: 2.0**-18 / 3}[width]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """A layer's transform, as far as its coding depends on it."""

    basis: bool
    spread: Float[Tensor, "bands N"]
    """What each coefficient costs where it is dropped: variance times cost of its squared error times share of band."""
    dropped: Float[Tensor, " bands"]
    """What it costs to drop the slice, its mean included."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation:
    """What was chosen for all layers."""

    codings: tuple[tuple[Coding | None, ...], ...]
    """`codings[layer][band]`."""
    cost: float
    """What the choices cost together, as `Choice` counts."""

    def bands(self, band: int) -> tuple[Coding | None, ...]:
        """The coding of each layer in a band."""
        return tuple(layer[band] for layer in self.codings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What bytes depend on."""

    tokens: tuple[int, ...]
    """In each band."""
    width: int
    """D."""
    fixed: int
    """Bytes of all rows and files that no choice changes."""
    basis_bits: int = 8
    """Of a number of a basis."""
    widths: tuple[int, ...] = WIDTHS
    """Bits that codes may have; 16 are plain bf16 numbers, which are alone then."""

    def residents(self, layer: Sequence[Coding | None]) -> int:
        """Bytes of the tensors of a layer, as `tol.scheme.tensors_to_file` stores them, with their headers."""
        present = [coding for coding in layer if coding]
        if not present:
            return 0
        size = 2 * self.width + HEADER
        if any(coding.basis for coding in present):
            size += (self.width * self.basis_bits // 8 + 4) * max(
                coding.num_coefficients for coding in present
            ) + 2 * HEADER
        return size + sum(
            GAIN_BYTES * coding.num_coefficients + HEADER for coding in present if coding.levels != "bf16"
        )

    def nbytes(self, codings: Sequence[Sequence[Coding | None]]) -> int:
        """Bytes of all rows and tensors."""
        rows = sum(
            tokens * max(1, sum(coding.nbytes for layer in codings if (coding := layer[band])))
            for band, tokens in enumerate(self.tokens)
        )
        return self.fixed + rows + sum(map(self.residents, codings))


HEADER = 90
"""About the bytes of a tensor's entry in a safetensors header."""
GAIN_BYTES = 2


def allocate(layers: Sequence[Choice], sizes: Sizes, *, budget_bytes: int) -> Allocation | None:
    """The allocation of about the least cost whose `Sizes.nbytes` is within the budget; None where there is none.

    Args:
        layers: What is known of each layer.
        sizes: What bytes depend on.
        budget_bytes: Of rows and tensors together.
    """
    low, high = 1e-20, 1e6  # nats a byte
    best = None
    for _ in range(80):
        price = math.sqrt(low * high)
        found = at_price(layers, sizes, price=price)
        if sizes.nbytes(found.codings) <= budget_bytes:
            high, best = price, found
        else:
            low = price
    return best


def at_price(layers: Sequence[Choice], sizes: Sizes, *, price: float) -> Allocation:
    """What is best for each layer where a byte costs `price`."""
    found = [_codings(choice, sizes, price=price) for choice in layers]
    return Allocation(codings=tuple(codings for codings, _ in found), cost=sum(cost for _, cost in found))


def _codings(choice: Choice, sizes: Sizes, *, price: float) -> tuple[tuple[Coding | None, ...], float]:
    """The best coding of a layer in each band, and what they cost."""
    codings: list[Coding | None] = []
    total = 0.0
    for spread, dropped, tokens in zip(choice.spread, choice.dropped.tolist(), sizes.tokens, strict=True):
        coding, cost = _coding(spread, choice, sizes, price=price * tokens)
        rate = 0.0 if coding is None else price * (tokens * coding.nbytes + GAIN_BYTES * coding.num_coefficients)
        if coding is None or dropped < cost + rate:
            coding, cost = None, dropped
        codings.append(coding)
        total += cost
    return tuple(codings), total


def _coding(spread: Float[Tensor, " N"], choice: Choice, sizes: Sizes, *, price: float) -> tuple[Coding | None, float]:
    """The best coding where a byte of each row costs `price`, and what its errors cost."""
    count = len(spread)
    scaled = 16 not in sizes.widths
    table = torch.tensor([noise(width) for width in (0, *sizes.widths)], dtype=torch.float64)
    bits = torch.tensor([0, *sizes.widths], dtype=torch.float64)
    if not choice.basis:  # one width for all, as nothing sorts them
        costs = table[1:] * spread.sum().double() + price * bits[1:] * count / 8
        width = sizes.widths[int(costs.argmin())]
        widths = [(width, count)]
        cost = noise(width) * float(spread.sum())
    else:
        parts = torch.nn.functional.pad(spread.double(), (0, -count % RUN)).view(-1, RUN).sum(1)
        choices = (table * parts[:, None] + price * bits * RUN / 8).argmin(1)
        choices[:1].clamp_(min=1)  # something must be written, so that the mean is added
        cost = float((table[choices] * parts).sum())
        every = (0, *sizes.widths)
        widths = _runs([every[number] for number in choices.tolist()], count)
    written = sum(number for _, number in widths)
    size = sum(width * number for width, number in widths)
    levels = "bf16" if not scaled else "normal" if size % 8 or size < LEAST_RING else "trellis"
    return Coding(levels=levels, widths=tuple(widths), group=written if scaled else 0, basis=choice.basis), cost


def _runs(widths: list[int], count: int) -> list[tuple[int, int]]:
    """Widths of parts of `RUN` coefficients as runs; none is written after the first that is not."""
    runs: list[tuple[int, int]] = []
    at = 0
    for width in widths:
        size = min(RUN, count - at)
        if width == 0:
            break
        if runs and runs[-1][0] == width:
            runs[-1] = (width, runs[-1][1] + size)
        else:
            runs.append((width, size))
        at += size
    return runs


def falling(values: Float[Tensor, "bands N"]) -> Float[Tensor, "bands N"]:
    """The nearest values that never rise along a row, by pooling neighbours."""
    rows = []
    for row in values.double().tolist():
        blocks: list[list[float]] = []  # sum, count
        for value in row:
            blocks.append([value, 1.0])
            while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] < blocks[-1][0] / blocks[-1][1]:
                last = blocks.pop()
                blocks[-1] = [blocks[-1][0] + last[0], blocks[-1][1] + last[1]]
        rows.append([total / size for total, size in blocks for _ in range(int(size))])
    return torch.tensor(rows, dtype=values.dtype)
