"""What a decode step computes, operation by operation, in plain PyTorch: the reference of `engine/kernels.py`.

One new token a sequence. Dimension key: B sequences, S
slots of the cache, H query heads, G key and value heads, E head width, C capacity of a slot, D model width, K cells, U
rows, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


class RowOf(NamedTuple):
    """Where a layer's rows are: those of several tokens, and which of them each sequence takes."""

    rows: Float[Tensor, "U D"]
    chosen: Int[Tensor, " B"]


def query_and_cache(
    x: Float[Tensor, "B D"],
    norm: nn.RMSNorm,
    qkv: nn.Linear,
    *,
    rotary: Float[Tensor, "2 C E"],
    lengths: Int[Tensor, " B"],
    keys: Float[Tensor, "S G C E"],
    values: Float[Tensor, "S G C E"],
) -> Float[Tensor, "B H E"]:
    """The turned queries of new tokens at positions `lengths`; their keys and values go into the cache there."""
    batch, kv_heads, head_size = len(x), keys.shape[1], keys.shape[3]
    heads = qkv(norm(x)).view(batch, -1, head_size)  # (B, H+2G, E)
    cosines, sines = rotary[:, lengths].unsqueeze(2)  # (B, 1, E) each
    turning = heads[:, :-kv_heads]
    first, second = turning.chunk(2, dim=-1)
    turned = (turning * cosines + torch.cat((-second, first), dim=-1) * sines).to(x.dtype)
    slots = torch.arange(batch, device=x.device)
    keys[slots, :, lengths] = turned[:, -kv_heads:]
    values[slots, :, lengths] = heads[:, -kv_heads:]
    return turned[:, :-kv_heads].contiguous()


def attend(
    query: Float[Tensor, "B H E"],
    *,
    lengths: Int[Tensor, " B"],
    keys: Float[Tensor, "S G C E"],
    values: Float[Tensor, "S G C E"],
) -> Float[Tensor, "B D"]:
    """Attention of each query over positions 0 .. `lengths` of its slot."""
    batch, heads, _ = query.shape
    visible = torch.arange(keys.shape[2], device=query.device) <= lengths[:, None]  # (B, C)
    attended = F.scaled_dot_product_attention(
        query[:, :, None],
        keys[:batch].where(visible[:, None, :, None], 0),  # what lies beyond may be anything
        values[:batch].where(visible[:, None, :, None], 0),
        attn_mask=visible[:, None, None],
        enable_gqa=heads != keys.shape[1],
    )
    return attended.flatten(1)


def add_projection(
    x: Float[Tensor, "B D"],
    inner: Float[Tensor, "B K"],
    projection: nn.Linear,
    *,
    row: RowOf | None,
) -> Float[Tensor, "B D"]:
    """The residual stream plus a projection, plus the layer's row where there is one (Eq. 2.10)."""
    y = x + projection(inner)
    return y if row is None else y + row.rows[row.chosen[: len(x)]].to(x.dtype)


def gated(x: Float[Tensor, "B D"], norm: nn.RMSNorm, gate: nn.Linear, up: nn.Linear) -> Float[Tensor, "B K"]:
    """Coefficients of a SwiGLU's cells (Eq. 2.7)."""
    y = norm(x)
    return up(y) * F.silu(gate(y))


def logits(x: Float[Tensor, "B D"], norm: nn.RMSNorm, head: nn.Linear) -> Float[Tensor, "B V"]:
    """Scores of the next token, in fp32 at least."""
    scores = head(norm(x))
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def most_likely(x: Float[Tensor, "B D"], norm: nn.RMSNorm, head: nn.Linear) -> Int[Tensor, " B"]:
    """The most likely next token; the smallest id of equals."""
    return logits(x, norm, head).argmax(dim=-1)
