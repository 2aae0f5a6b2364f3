"""Rows that a GPU itself reads from pinned host memory: no copy on the host, no wait for it."""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WORDS = 2048
"""Words of four bytes that a program copies."""


@triton.jit
def _gather(table_ptr, ids_ptr, out_ptr, words, WORDS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    mask = columns < words
    source = table_ptr + tl.load(ids_ptr + row).to(tl.int64) * words
    tl.store(out_ptr + row * words + columns, tl.load(source + columns, mask=mask), mask=mask)


def gather_pinned(table: Tensor, token_ids: Tensor, out: Tensor) -> None:
    """Write the rows `token_ids` (U,) of `table` (V, row_bytes), pinned uint8, over `out` (U, row_bytes) on a GPU."""
    assert table.is_pinned()
    assert table.shape[1] % 4 == 0
    words = table.shape[1] // 4
    ids = token_ids.to(out.device, non_blocking=True)
    _gather[len(ids), triton.cdiv(words, WORDS)](
        table.view(torch.int32), ids, out.view(torch.int32), words, WORDS=WORDS
    )
