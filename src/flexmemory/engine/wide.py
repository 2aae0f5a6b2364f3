"""The operations of a decode step for many sequences on a GPU: the library's matrix products, and kernels between them.

Beyond a few sequences the keys and values that a step reads outweigh the weights, and matrix products pay.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn import functional as F

from flexmemory.engine.narrow import NarrowKernels
from flexmemory.engine.plain import RowOf

NUMBERS = 1024
"""Pairs of numbers that a program turns."""


@triton.jit
def _rotate_and_cache(
    heads_ptr, rotary_ptr, lengths_ptr, query_ptr, keys_ptr, values_ptr, slot_ptr, turned_ptr,
    rotary_stride, slot_stride, head_stride,
    E: tl.constexpr, BLOCK: tl.constexpr, H: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr,
    ONE_SLOT: tl.constexpr,
):  # fmt: skip
    """A program takes some heads of one token, as two halves that turn with each other."""
    b = tl.program_id(0)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    near = tl.arange(0, BLOCK)[None, :]
    far = near + E // 2
    inside = near < E // 2
    source = heads_ptr + (b * (H + 2 * G) + head) * E
    a = tl.load(source + near, mask=inside & (head < H + 2 * G), other=0.0).to(tl.float32)
    c = tl.load(source + far, mask=inside & (head < H + 2 * G), other=0.0).to(tl.float32)
    position = tl.load(lengths_ptr + b)
    cosine = tl.load(rotary_ptr + position * E + near, mask=inside, other=0.0)
    sine = tl.load(rotary_ptr + rotary_stride + position * E + near, mask=inside, other=0.0)
    turns = head < H + G
    first = tl.where(turns, a * cosine - c * sine, a).to(query_ptr.dtype.element_ty)
    second = tl.where(turns, c * cosine + a * sine, c).to(query_ptr.dtype.element_ty)
    target = query_ptr + (b * H + head) * E
    tl.store(target + near, first, mask=inside & (head < H))
    tl.store(target + far, second, mask=inside & (head < H))
    slot = tl.load(slot_ptr) if ONE_SLOT else b.to(tl.int64)
    cached = slot * slot_stride + position * E
    is_key = inside & (head >= H) & turns
    target = keys_ptr + cached + (head - H) * head_stride
    tl.store(target + near, first, mask=is_key)
    tl.store(target + far, second, mask=is_key)
    if ONE_SLOT:
        target = turned_ptr + (b * G + head - H) * E
        tl.store(target + near, first, mask=is_key)
        tl.store(target + far, second, mask=is_key)
    is_value = inside & (head >= H + G) & (head < H + 2 * G)
    target = values_ptr + cached + (head - H - G) * head_stride
    tl.store(target + near, first, mask=is_value)
    tl.store(target + far, second, mask=is_value)


@triton.jit
def _add(
    x_ptr, y_ptr, rows_ptr, index_ptr, row_stride, out_ptr,
    D: tl.constexpr, BLOCK: tl.constexpr, HAS_ROW: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < D
    added = tl.load(x_ptr + b * D + columns, mask=mask, other=0.0).to(tl.float32)
    added += tl.load(y_ptr + b * D + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_ROW:
        row = rows_ptr + tl.load(index_ptr + b).to(tl.int64) * row_stride
        added += tl.load(row + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + b * D + columns, added.to(out_ptr.dtype.element_ty), mask=mask)


def rotate_and_cache(
    heads: Tensor, rotary: Tensor, lengths: Tensor, keys: Tensor, values: Tensor, *, slot: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Turn queries and keys of fused projections (B, (H + 2 G) E); keys and values go into the cache at `lengths`.

    Sequence b is that of slot b; or all are tokens of one `slot`, (1,) int64.

    Returns:
        Queries (B, H, E), and for one slot keys (B, G, E).
    """
    batch, kv_heads, head_size = len(heads), keys.shape[1], keys.shape[3]
    num_heads = heads.shape[1] // head_size - 2 * kv_heads
    query = heads.new_empty(batch, num_heads, head_size)
    turned = None if slot is None else heads.new_empty(batch, kv_heads, head_size)
    block = triton.next_power_of_2(head_size // 2)
    some = min(triton.next_power_of_2(num_heads + 2 * kv_heads), max(1, NUMBERS // block))
    _rotate_and_cache[batch, triton.cdiv(num_heads + 2 * kv_heads, some)](
        heads, rotary, lengths, query, keys, values, lengths if slot is None else slot,
        query if turned is None else turned, rotary.stride(0), keys.stride(0), keys.stride(1),
        E=head_size, BLOCK=block, H=num_heads, G=kv_heads, HEADS=some, ONE_SLOT=slot is not None,
    )  # fmt: skip
    return query, turned


class WideKernels:
    """The operations of `engine/plain.py` on one GPU."""

    def __init__(self, device: torch.device) -> None:
        """Allocate what attention needs."""
        self._attention = NarrowKernels(device, pdl=False)

    def query_and_cache(
        self,
        x: Tensor,
        norm: nn.RMSNorm,
        qkv: nn.Module,
        *,
        rotary: Tensor,
        lengths: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> Tensor:
        """As `plain.query_and_cache`."""
        query, _ = rotate_and_cache(qkv(norm(x)), rotary, lengths, keys, values)
        return query

    def attend(self, query: Tensor, *, lengths: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """As `plain.attend`."""
        return self._attention.attend(query, lengths=lengths, keys=keys, values=values)

    def add_projection(self, x: Tensor, inner: Tensor, projection: nn.Module, *, row: RowOf | None) -> Tensor:
        """As `plain.add_projection`."""
        y = projection(inner)
        out = torch.empty_like(x)
        rows_of, index = (x, x) if row is None else row
        batch, width = x.shape
        block = min(1024, triton.next_power_of_2(width))
        _add[batch, triton.cdiv(width, block)](
            x, y, rows_of, index, rows_of.stride(0), out, D=width, BLOCK=block, HAS_ROW=row is not None
        )  # fmt: skip
        return out

    def gated(self, x: Tensor, norm: nn.RMSNorm, gate: nn.Module, up: nn.Module) -> Tensor:
        """As `plain.gated`."""
        y = norm(x)
        return up(y) * F.silu(gate(y))

    def logits(self, x: Tensor, norm: nn.RMSNorm, head: nn.Module) -> Tensor:
        """As `plain.logits`."""
        return head(norm(x)).float()

    def most_likely(self, x: Tensor, norm: nn.RMSNorm, head: nn.Module) -> Tensor:
        """As `plain.most_likely`."""
        return head(norm(x)).argmax(dim=-1)
