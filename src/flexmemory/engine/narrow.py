"""The operations of a decode step for few sequences on a GPU, as exact as those of `engine/plain.py`."""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from __future__ import annotations

import torch
import triton
from torch import Tensor, nn

from flexmemory.engine.int8 import Int8Linear
from flexmemory.engine.kernels import (
    add_projection_kernel,
    attend_kernel,
    best_kernel,
    gated_kernel,
    head_kernel,
    query_and_cache_kernel,
)
from flexmemory.engine.plain import RowOf

TILE, TILE_WARPS = 8192, 4
"""Numbers of the tile of weights that a program takes (two rows at least), and its warps."""
HEAD_TILE = 16384
"""The same for the head, whose programs are many."""
TOKENS = 32
"""Cached tokens that an attention program takes at once."""
ATTENTION_PROGRAMS = 1024
"""Enough to fill a GPU."""
MAX_SPLITS = 64
FEW_HEADS = 64
"""Heads up to which programs of one warp are the fastest."""


class NarrowKernels:
    """The operations of `engine/plain.py` on one GPU."""

    def __init__(self, device: torch.device, *, pdl: bool = True) -> None:
        """With `pdl` kernels start while the one before runs (compute capability 9.0)."""
        self._launch = {"PDL": pdl, "launch_pdl": pdl}
        self._arrived = torch.zeros(ATTENTION_PROGRAMS, dtype=torch.int32, device=device)
        """Programs of each head that have finished; zero between launches."""

    def query_and_cache(
        self,
        x: Tensor,
        norm: nn.RMSNorm,
        qkv: nn.Linear,
        *,
        rotary: Tensor,
        lengths: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> Tensor:
        """As `plain.query_and_cache`."""
        batch, width = x.shape
        kv_heads, head_size = keys.shape[1], keys.shape[3]
        weight, scale, int8 = _matrix(qkv)
        heads = len(weight) // head_size - 2 * kv_heads
        query = x.new_empty(batch, heads, head_size)
        block, rows = _shape(width)
        pairs = 1
        while pairs * 4 <= rows and (head_size // 2) % (2 * pairs) == 0:
            pairs *= 2
        query_and_cache_kernel[heads + 2 * kv_heads, head_size // 2 // pairs](
            x, norm.weight, norm.eps, weight, scale, rotary, lengths, query, keys, values,
            rotary.stride(0), keys.stride(0), keys.stride(1),
            BATCH=batch, D=width, BLOCK=block, E=head_size, PAIRS=pairs, H=heads, G=kv_heads, INT8=int8,
            num_warps=TILE_WARPS, **self._launch,
        )  # fmt: skip
        return query

    def attend(self, query: Tensor, *, lengths: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """As `plain.attend`."""
        batch, heads, head_size = query.shape
        kv_heads, capacity = keys.shape[1:3]
        splits = triton.next_power_of_2(triton.cdiv(ATTENTION_PROGRAMS, batch * heads))
        splits = min(splits, MAX_SPLITS, triton.next_power_of_2(triton.cdiv(capacity, TOKENS)))
        block = triton.next_power_of_2(head_size)
        out = query.new_empty(batch, heads * head_size)
        parts = torch.empty(batch * heads * splits * (block + 2), dtype=torch.float32, device=query.device)
        attend_kernel[batch * heads, splits](
            query, keys, values, lengths, parts, self._arrived, out, head_size**-0.5, keys.stride(0), keys.stride(1),
            H=heads, G=kv_heads, E=head_size, BLOCK_E=block, TOKENS=TOKENS, SPLITS=splits,
            num_warps=1 if batch * heads <= FEW_HEADS else 2, **self._launch,
        )  # fmt: skip
        return out

    def add_projection(
        self,
        x: Tensor,
        inner: Tensor,
        projection: nn.Linear,
        *,
        row: RowOf | None,
    ) -> Tensor:
        """As `plain.add_projection`."""
        batch, width = x.shape
        weight, scale, int8 = _matrix(projection)
        block, rows = _shape(inner.shape[1])
        out = torch.empty_like(x)
        rows_of, index = (x, x) if row is None else row
        add_projection_kernel[(triton.cdiv(width, rows),)](
            x, inner, weight, scale, rows_of, index, rows_of.stride(0), out,
            BATCH=batch, D=width, K=inner.shape[1], BLOCK=block, ROWS=rows, HAS_ROW=row is not None, INT8=int8,
            num_warps=TILE_WARPS, **self._launch,
        )  # fmt: skip
        return out

    def gated(self, x: Tensor, norm: nn.RMSNorm, gate: nn.Linear, up: nn.Linear) -> Tensor:
        """As `plain.gated`."""
        batch, width = x.shape
        (gate_weight, gate_scale, int8), (up_weight, up_scale, _) = _matrix(gate), _matrix(up)
        cells = len(gate_weight)
        block, rows = _shape(width, tile=TILE // 2)
        out = x.new_empty(batch, cells)
        gated_kernel[(triton.cdiv(cells, rows),)](
            x, norm.weight, norm.eps, gate_weight, gate_scale, up_weight, up_scale, out,
            BATCH=batch, D=width, K=cells, BLOCK=block, ROWS=rows, INT8=int8, num_warps=TILE_WARPS, **self._launch,
        )  # fmt: skip
        return out

    def logits(self, x: Tensor, norm: nn.RMSNorm, head: nn.Linear) -> Tensor:
        """As `plain.logits`."""
        out = torch.empty(len(x), len(head.weight), dtype=torch.float32, device=x.device)
        self._head(x, norm, head, logits=out)
        return out

    def most_likely(self, x: Tensor, norm: nn.RMSNorm, head: nn.Linear) -> Tensor:
        """As `plain.most_likely`, without logits in memory."""
        best, best_id = self._head(x, norm, head, logits=None)
        out = torch.empty(len(x), dtype=torch.int64, device=x.device)
        count = best.shape[1]
        best_kernel[(len(x),)](
            best, best_id, out, COUNT=count, BLOCK=triton.next_power_of_2(count), num_warps=8, **self._launch
        )  # fmt: skip
        return out

    def _head(self, x: Tensor, norm: nn.RMSNorm, head: nn.Linear, *, logits: Tensor | None) -> tuple[Tensor, Tensor]:
        weight, scale, int8 = _matrix(head)
        vocab_size, width = weight.shape
        block, rows = _shape(width, tile=HEAD_TILE)
        programs = triton.cdiv(vocab_size, rows)
        best = torch.empty(len(x), programs, dtype=torch.float32, device=x.device)
        best_id = torch.empty(len(x), programs, dtype=torch.int32, device=x.device)
        head_kernel[(programs,)](
            x, norm.weight, norm.eps, weight, scale, best if logits is None else logits, best, best_id,
            BATCH=len(x), D=width, V=vocab_size, BLOCK=block, ROWS=rows, GREEDY=logits is None, INT8=int8,
            num_warps=TILE_WARPS, **self._launch,
        )  # fmt: skip
        return best, best_id


def _matrix(linear: nn.Linear | Int8Linear) -> tuple[Tensor, Tensor, bool]:
    """The matrix of a linear layer, its scales by row, and whether it has any."""
    if isinstance(linear, Int8Linear):
        return linear.weight, linear.scale, True
    return linear.weight, linear.weight, False


def _shape(width: int, *, tile: int = TILE) -> tuple[int, int]:
    """Numbers of a padded row, and rows of a tile."""
    block = triton.next_power_of_2(width)
    return block, max(2, tile // block)
