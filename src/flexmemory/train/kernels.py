"""The one kernel of training: rows added to a table by index, on a GPU.

Gradients of 16k positions meet in about 4k rows, and a comma's row gets hundreds of them. Adding each by itself
(`index_add_`) is bound by atomic additions; here positions come sorted by row, are summed in registers, and only sums
that may go on in a neighbouring tile are added atomically.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 32
"""Positions that one program sums."""
WIDTH = 1024
"""Numbers of a row that one program handles."""


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
