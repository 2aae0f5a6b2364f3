"""Codes of few bits whose levels depend on the codes after them: a trellis, searched by the Viterbi algorithm.

A code stands for `level[window]`, where the window is `WINDOW` bits of the slice from the code's first on, those after
the slice's end being its first. So a code of k bits chooses among thousands of levels, but so do its neighbours by the
same bits; all codes of a slice are found together, with about the least squared error. This is the bitshift trellis of
QTIP (arXiv 2406.11235) as a ring, with levels that are computed and widths that may change along the slice.
Dimension key: U tokens, N numbers, S windows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

WINDOW = 12
"""Bits that a level depends on."""
SPREADS = {1: 0.88, 2: 1.02, 3: 1.09, 4: 1.12, 5: 1.13, 6: 1.18, 8: 1.26}
"""What levels are multiplied by where codes have so many bits: about the best for normal numbers."""
NOISE = {1: 0.272, 2: 0.0711, 3: 0.0185, 4: 0.00477, 5: 0.00124, 6: 0.000325, 8: 0.0000236}
"""Squared error of normal numbers of variance 1 in long slices of one width, measured."""
WOUND = 4 * WINDOW
"""Bits before and after the seam that say which way the ring closes there."""
RING = 512
"""Bits of rings for which one way over the seam is tried; of shorter ones more."""
KEPT_BYTES = {"cpu": 2**28, "cuda": 2**33}
"""Memory that a search may take."""

Widths = Sequence[tuple[int, int]]
"""Runs of numbers: bits of a code, and how many numbers have such codes."""


@functools.cache
def trellis_levels() -> Float[Tensor, " S"]:
    """The level of each window: quantiles of the normal distribution, quantile s (2 s + 1) mod S for window s.

    Bit j of s (2 s + 1) is bit j of s, flipped or not by the bits below it. So the windows that differ in their last
    bits only, the highest, have levels spread evenly over all, whatever the number of these bits; and this is a
    permutation. It codes normal numbers better than levels trained for random orders do.
    """
    window = torch.arange(1 << WINDOW)
    place = window * (2 * window + 1) % (1 << WINDOW)
    return (torch.erfinv(2 * (place.double() + 0.5) / (1 << WINDOW) - 1) * math.sqrt(2.0)).float()


def code_bits(widths: Widths) -> list[int]:
    """Bits of each code."""
    return [width for width, count in widths for _ in range(count)]


def spreads(widths: Widths) -> Float[Tensor, " N"]:
    """What the levels of each number are multiplied by."""
    return torch.cat([torch.full((count,), SPREADS[width]) for width, count in widths])


def decode_windows(data: UInt8[Tensor, "U nbytes"], widths: Widths) -> Int64[Tensor, "U N"]:
    """The window of each number; `trellis_levels` and `spreads` say what it stands for."""
    bits = (data[..., None] >> torch.arange(8, dtype=torch.uint8, device=data.device) & 1).flatten(1).long()
    sizes = torch.tensor(code_bits(widths))
    start = (sizes.cumsum(0) - sizes).to(data.device)
    windows = torch.zeros((len(data), len(start)), dtype=torch.int64, device=data.device)
    for number in range(WINDOW):
        windows |= bits[:, (start + number) % bits.shape[1]] << number
    return windows


def encode_windows(windows: Int64[Tensor, "U N"], widths: Widths) -> UInt8[Tensor, "U nbytes"]:
    """The inverse of `decode_windows`, for windows that agree in the bits that they share."""
    sizes = torch.tensor(code_bits(widths))
    number = torch.arange(len(sizes)).repeat_interleave(sizes)  # of each bit
    place = torch.arange(len(number)) - (sizes.cumsum(0) - sizes)[number]
    bits = (windows[:, number.to(windows.device)] >> place.to(windows.device) & 1).unflatten(1, (-1, 8))
    return (bits << torch.arange(8, device=windows.device)).sum(-1).to(torch.uint8)


def search(numbers: Float[Tensor, "U N"], weight: Float[Tensor, " N"], widths: Widths) -> Int64[Tensor, "U N"]:
    """Windows with about the least squared error, that of number i times `weight[i]`.

    What the last windows share with the first is that of the best ways over the seam, as far as the numbers around it
    say; for each of these the best ring is found, and the best of those is taken.
    """
    bits = code_bits(widths)
    root = (weight / weight.mean().clamp(min=1e-30)).sqrt()
    own, factors = trellis_levels().to(numbers.device), spreads(widths).to(numbers.device) * root
    levels = own * factors[:, None]  # (N, S)
    targets = (numbers * root).T.contiguous()  # (N, U)
    tried = min(max(1, RING // sum(bits)), (1 << WINDOW) >> bits[-1])
    numel = _numel(bits, tried=tried, fused=numbers.is_cuda)
    chunk = min(max(1, KEPT_BYTES[numbers.device.type] // (4 * numel)), len(numbers))
    memory = targets.new_empty((1 << WINDOW if numbers.is_cuda else numel) * chunk)
    found = []
    for part in targets.split(max(1, chunk), dim=1):
        seams = _seams(part, levels, bits, count=tried, memory=memory)  # (tried, U)
        if numbers.is_cuda:
            from flexmemory.tol.trellis_kernel import ring  # needs Triton

            cost, windows = ring(part.repeat(1, tried), own, factors, bits, seams.flatten())
        else:
            cost, windows = _ring(part.repeat(1, tried), levels, bits, seams.flatten(), memory=memory)
        best = cost.view(seams.shape).argmin(0)
        found.append(windows.view(len(bits), *seams.shape).gather(1, best.expand(len(bits), 1, -1))[:, 0])
    return torch.cat(found, dim=1).T


def _numel(bits: Sequence[int], *, tried: int, fused: bool) -> int:
    """Numbers of four bytes that a token takes: costs of all ways; or, of one number's, with codes in a byte each."""
    if not fused:
        return tried * sum(_sizes(bits))
    return (1 + tried) * (1 << WINDOW) + tried * sum((1 << WINDOW) >> size for size in bits) // 4


def _sizes(bits: Sequence[int]) -> list[int]:
    """How many costs of a token are kept: of all windows, and before each code and after all of what windows share."""
    return [1 << WINDOW, *[(1 << WINDOW) >> size for size in (bits[-1], *bits)]]


def _seams(
    targets: Float[Tensor, "N U"],
    levels: Float[Tensor, "N S"],
    bits: Sequence[int],
    *,
    count: int,
    memory: Float[Tensor, " kept"],
) -> Int64[Tensor, "count U"]:
    """Bits that the last window may share with the first, the most promising first."""
    ahead = targets.new_zeros((1, targets.shape[1]))  # what numbers from here on cost at least, by the bits they share
    cost = memory[: targets.shape[1] << WINDOW].view(-1, targets.shape[1])
    for place in reversed(_reach(bits)):
        shared = (1 << WINDOW) >> bits[place - 1]
        torch.sub(levels[place][:, None], targets[place], out=cost).square_()
        cost.view(len(ahead), -1, targets.shape[1]).add_(ahead[:, None])
        ahead = cost.view(-1, shared, targets.shape[1]).amin(0)
    behind = targets.new_zeros((1, targets.shape[1]))
    for place in reversed(_reach(bits[::-1])):
        behind = _onward(behind, targets[-1 - place], levels[-1 - place], bits[-1 - place], cost=cost)
    return (ahead + behind).topk(count, dim=0, largest=False).indices


def _reach(bits: Sequence[int]) -> range:
    """The first places, whose codes have `WOUND` bits; all, if those are fewer."""
    total = 0
    for number, size in enumerate(bits):
        total += size
        if total >= WOUND:
            return range(number + 1)
    return range(len(bits))


def _onward(
    least: Float[Tensor, "shared U"],
    target: Float[Tensor, " U"],
    level: Float[Tensor, " S"],
    bits: int,
    *,
    cost: Float[Tensor, "S U"],
    out: Float[Tensor, "kept U"] | None = None,
) -> Float[Tensor, "kept U"]:
    """What the numbers so far cost at least, by the bits that the next window shares: one number more, in `cost`."""
    torch.sub(level[:, None], target, out=cost).square_()
    cost.view(-1, *least.shape).add_(least)
    ways = cost.view(-1, 1 << bits, len(target))  # the code's own bits are not seen by what follows
    while (half := ways.shape[1] // 2) > 1:  # 4.8 us a number on a core where `amin` has 5.9
        ways = torch.minimum(ways[:, :half], ways[:, half:], out=ways[:, :half])
    return torch.minimum(ways[:, 0], ways[:, 1], out=out)


def _ring(
    targets: Float[Tensor, "N U"],
    levels: Float[Tensor, "N S"],
    bits: Sequence[int],
    seam: Int64[Tensor, " U"],
    *,
    memory: Float[Tensor, " kept"],
) -> tuple[Float[Tensor, " U"], Int64[Tensor, "N U"]]:
    """The Viterbi algorithm: the least cost, and its windows; the last one shares the bits `seam` with the first."""
    parts = [size * len(seam) for size in _sizes(bits)]
    cost, *kept = (part.view(-1, len(seam)) for part in memory[: sum(parts)].split(parts))
    kept[0].fill_(math.inf).scatter_(0, seam[None], 0.0)
    for number, own in enumerate(bits):
        _onward(kept[number], targets[number], levels[number], own, cost=cost, out=kept[number + 1])
    state = seam
    windows = torch.empty(targets.shape, dtype=torch.int64, device=targets.device)
    for number in range(len(bits) - 1, -1, -1):
        own = torch.arange(1 << bits[number], device=targets.device)[:, None]
        ways, before = (state << bits[number]) + own, kept[number]  # (2 ** bits, U)
        costs = (levels[number][ways] - targets[number]).square_() + before.gather(0, ways & (len(before) - 1))
        windows[number] = (state << bits[number]) + costs.argmin(0)
        state = windows[number] & (len(before) - 1)
    return kept[-1].gather(0, seam[None])[0], windows
