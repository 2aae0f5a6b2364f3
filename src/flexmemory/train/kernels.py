"""The kernels of training, on a GPU: rows added to a table by index, and the loss of logits with its gradient.

Gradients of 16k positions meet in about 4k rows, and a comma's row gets hundreds of them. Adding each by itself
(`index_add_`) is bound by atomic additions; here positions come sorted by row, are summed in registers, and only sums
that may go on in a neighbouring tile are added atomically.

The loss goes over a position's logits twice, for their log-partition and for the gradient, which takes their place.
A chunk of 4186 positions of 128k bf16 logits takes 0.83 ms on an H200, and 1.22 ms compiled from the plain form.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 32
"""Positions that one program sums."""
WIDTH = 1024
"""Numbers of a row that one program handles."""

LOGITS = 8192
"""Logits that a program has in registers at once."""
WARPS = 8
"""Of a program of the loss."""


@triton.jit
def _add_sorted(
    total_ptr, ids_ptr, order_ptr, values_ptr, count, width, total_stride, TILE: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    first = tl.program_id(0) * TILE
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = columns < width
    current = tl.load(ids_ptr + first)
    shared = 1  # whether other programs may add to the row of `current`
    summed = tl.zeros((WIDTH,), dtype=tl.float32)
    for position in range(first, min(first + TILE, count)):
        row = tl.load(ids_ptr + position)
        values = tl.load(values_ptr + tl.load(order_ptr + position) * width + columns, mask=inside).to(tl.float32)
        if row != current:
            target = total_ptr + current * total_stride + columns
            if shared == 1:
                tl.atomic_add(target, summed, mask=inside, sem="relaxed")
            else:
                tl.store(target, tl.load(target, mask=inside) + summed, mask=inside)
            summed = values
            current = row
            shared = 0
        else:
            summed += values
    tl.atomic_add(total_ptr + current * total_stride + columns, summed, mask=inside, sem="relaxed")


def add_sorted_rows(total: Tensor, ids: Tensor, order: Tensor, values: Tensor) -> None:
    """Add row `order[n]` of `values` to row `ids[n]` of `total` for every n.

    Args:
        total: (U, D) in fp32; rows may be apart, the numbers of a row are not.
        ids: (N,), sorted.
        order: (N,), each position once.
        values: (N, D), contiguous.
    """
    assert total.dtype == torch.float32
    assert total.stride(1) == 1
    assert values.is_contiguous()
    count, width = values.shape
    grid = (triton.cdiv(count, TILE), triton.cdiv(width, WIDTH))
    _add_sorted[grid](total, ids, order, values, count, width, total.stride(0), TILE=TILE, WIDTH=WIDTH)


@triton.jit
def _logits_loss(
    logits_ptr, targets_ptr, scale_ptr, sums_ptr, vocab_size, z_loss, LOGITS: tl.constexpr
):  # fmt: skip
    position = tl.program_id(0)
    row_ptr = logits_ptr + position.to(tl.int64) * vocab_size
    columns = tl.arange(0, LOGITS)
    target = tl.load(targets_ptr + position)
    chosen = tl.load(row_ptr + target).to(tl.float32)  # before any thread of the program writes
    largest = -float("inf")
    total = 0.0  # of exp(logit - largest)
    for start in range(0, vocab_size, LOGITS):
        inside = start + columns < vocab_size
        logits = tl.load(row_ptr + start + columns, mask=inside, other=-float("inf")).to(tl.float32)
        before = largest
        largest = tl.maximum(largest, tl.max(logits, 0))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(logits - largest), 0)
    log_partition = largest + tl.log(total)
    tl.store(sums_ptr + position, log_partition - chosen)
    tl.store(sums_ptr + tl.num_programs(0) + position, log_partition * log_partition)
    scale = tl.load(scale_ptr)
    factor = scale * (1 + 2 * z_loss * log_partition)
    for start in range(0, vocab_size, LOGITS):
        inside = start + columns < vocab_size
        logits = tl.load(row_ptr + start + columns, mask=inside, other=-float("inf")).to(tl.float32)
        gradient = tl.exp(logits - log_partition) * factor - tl.where(start + columns == target, scale, 0.0)
        tl.store(row_ptr + start + columns, gradient, mask=inside)


def logits_loss_in_place(
    logits: Tensor, targets: Tensor, z_loss: float, scale: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`loss.logits_loss_and_gradient` with the gradient in the place of the logits (N, V), computed in fp32."""
    assert scale.dtype == torch.float32
    assert logits.is_contiguous()
    count, vocab_size = logits.shape
    sums = torch.empty(2, count, device=logits.device)
    _logits_loss[(count,)](logits, targets, scale, sums, vocab_size, z_loss, LOGITS=LOGITS, num_warps=WARPS)
    return sums.sum(1), logits
