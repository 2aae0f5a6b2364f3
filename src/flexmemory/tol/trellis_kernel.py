"""The Viterbi algorithm of `tol.trellis` on a GPU: a program has all costs of one token in its registers.

What `trellis._ring` does with one PyTorch call after another, which wait for memory and for their launches. A launch is
a run of numbers whose codes have the same bits. Dimension key: U tokens, N numbers, S windows.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int64
from torch import Tensor

TRACED = 32
"""Tokens that a program takes back from the last number to the first."""


@triton.jit(do_not_specialize=["first", "count", "num_tokens"])
def _onward(
    targets_ptr, factors_ptr, levels_ptr, ahead_ptr, chosen_ptr, first, count, num_tokens,
    S: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Costs of a token up to a run's end, by window; of each number, the best code for every window that may follow."""
    token = tl.program_id(0).to(tl.int64)
    ways: tl.constexpr = 1 << BITS
    shared: tl.constexpr = S // ways
    window, following = tl.arange(0, S), tl.arange(0, shared)
    level = tl.load(levels_ptr + window)
    ahead = tl.load(ahead_ptr + token * S + window)
    chosen_ptr += token * count * shared
    for number in range(count):
        target = tl.load(targets_ptr + (first + number).to(tl.int64) * num_tokens + token)
        error = level * tl.load(factors_ptr + first + number) - target
        costs = tl.reshape(error * error + ahead, (shared, ways))
        least, code = tl.min(costs, axis=1, return_indices=True)
        tl.store(chosen_ptr + number * shared + following, code.to(tl.uint8))
        ahead = tl.reshape(tl.broadcast_to(least[None, :], (ways, shared)), (S,))
    tl.store(ahead_ptr + token * S + window, ahead)


@triton.jit(do_not_specialize=["first", "count", "num_tokens", "before"])
def _back(
    chosen_ptr, shared_ptr, windows_ptr, first, count, num_tokens, before,
    S: tl.constexpr, BITS: tl.constexpr, TRACED: tl.constexpr,
):  # fmt: skip
    """Windows of a run from its last number to its first, which shares `before` values with the one before it."""
    token = tl.program_id(0).to(tl.int64) * TRACED + tl.arange(0, TRACED)
    mask = token < num_tokens
    shared: tl.constexpr = S >> BITS
    state = tl.load(shared_ptr + token, mask=mask, other=0)
    for step in range(count):
        number = count - 1 - step
        code = tl.load(chosen_ptr + (token * count + number) * shared + state, mask=mask, other=0)
        window = (state << BITS) + code.to(tl.int64)
        tl.store(windows_ptr + (first + number).to(tl.int64) * num_tokens + token, window, mask=mask)
        state = window & (tl.where(number > 0, shared, before) - 1)
    tl.store(shared_ptr + token, state, mask=mask)


def ring(
    targets: Float[Tensor, "N U"],
    levels: Float[Tensor, " S"],
    factors: Float[Tensor, " N"],
    bits: Sequence[int],
    seam: Int64[Tensor, " U"],
) -> tuple[Float[Tensor, " U"], Int64[Tensor, "N U"]]:
    """The least cost of each token's codes, and its windows; the last one shares the bits `seam` with the first.

    Args:
        targets: Numbers to code.
        levels: What each window stands for, before it is multiplied by
        factors: those of each number.
        bits: Of each number's code.
        seam: What is shared over the seam.
    """
    tokens, windows_of_all = targets.shape[1], len(levels)
    ahead = targets.new_full((tokens, 1 << bits[-1], windows_of_all >> bits[-1]), math.inf)
    ahead.scatter_(2, seam[:, None, None].expand(-1, ahead.shape[1], 1), 0.0)
    targets, runs, first = targets.contiguous(), [], 0
    for size, run in groupby(bits):
        count = len(list(run))
        chosen = torch.empty((tokens, count, windows_of_all >> size), dtype=torch.uint8, device=targets.device)
        with torch.cuda.device_of(targets):
            _onward[tokens,](
                targets, factors, levels, ahead, chosen, first, count, tokens, S=windows_of_all, BITS=size, num_warps=8
            )
        runs.append((size, first, count, chosen))
        first += count
    windows = torch.empty(targets.shape, dtype=torch.int64, device=targets.device)
    cost, state = ahead.view(tokens, -1).gather(1, seam[:, None])[:, 0], seam.clone()
    for size, first, count, chosen in reversed(runs):
        before = windows_of_all >> bits[first - 1]
        with torch.cuda.device_of(targets):
            _back[triton.cdiv(tokens, TRACED),](
                chosen, state, windows, first, count, tokens, before,
                S=windows_of_all, BITS=size, TRACED=TRACED, num_warps=1,
            )  # fmt: skip
    return cost, windows
