"""Causal self-attention with rotary positions and optional grouped-query heads.

Dimension key: B batch, T new tokens, S cached and new tokens, H query heads, G key and value heads, E head width,
D model width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from flexmemory.config import ModelConfig
from flexmemory.model.kv_cache import KVCacheLike


def rotary_table(
    positions: Int[Tensor, "*B T"], *, head_size: int, theta: float, dtype: torch.dtype
) -> Float[Tensor, "2 *B T E"]:
    """Cosines and sines of `positions`, the pairing of Llama (halves, not neighbours).

    Angles are computed in fp64, so the table is exact to its dtype (at least fp32).
    """
    exponents = torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float64) / head_size
    angles = positions.double()[..., None] * theta**-exponents  # (*B, T, E/2)
    angles = torch.cat((angles, angles), dim=-1)  # (*B, T, E)
    return torch.stack((angles.cos(), angles.sin())).to(torch.promote_types(dtype, torch.float32))


def rotate(x: Float[Tensor, "B T H E"], rotary: Float[Tensor, "2 *B T E"]) -> Float[Tensor, "B T H E"]:
    """Turn each head vector by the angle of its position."""
    first, second = x.chunk(2, dim=-1)
    cosines, sines = rotary.unsqueeze(-2)  # (*B, T, 1, E) each
    return (x * cosines + torch.cat((-second, first), dim=-1) * sines).to(x.dtype)


AttentionFunction = Callable[["Attention", Tensor, Tensor, Tensor], Tensor]
"""What stands between the projections, who sees whom included: of the module, queries (B, H, T, E), and keys and values
(B, G, S, E), to (B, T, H, E)."""


class Attention(nn.Module):
    """Multi-head or grouped-query attention; queries, keys and values come from one fused projection."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        """Attention of layer `layer`."""
        super().__init__()
        self.layer = layer
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_size = config.head_size
        total_heads = config.num_heads + 2 * config.num_kv_heads
        self.qkv = nn.Linear(config.hidden_size, total_heads * config.head_size, bias=False)
        self.output = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        rotary: Float[Tensor, "2 *B T E"],
        mask: Bool[Tensor, "... T S"] | None = None,
        kv_cache: KVCacheLike | None = None,
        function: AttentionFunction | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Attend to this and earlier tokens; without a `mask`, to all of them; or as `function` does."""
        batch, length, _ = x.shape
        # Heads of a position side by side in memory, from the projection to the output: nothing is copied to reorder.
        heads = self.qkv(x).view(batch, length, -1, self.head_size)  # (B, T, H+2G, E)
        turned = rotate(heads[:, :, : self.num_heads + self.num_kv_heads], rotary)
        query, key = turned.transpose(1, 2).split((self.num_heads, self.num_kv_heads), dim=1)
        value = heads[:, :, -self.num_kv_heads :].transpose(1, 2)  # (B, G, T, E)
        if kv_cache is not None:
            key, value = kv_cache.update(key, value, self.layer)  # (B, G, S, E)
        if function is not None:
            return self.output(function(self, query, key, value).reshape(batch, length, -1))
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None and length > 1,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )
        return self.output(attended.transpose(1, 2).reshape(batch, length, -1))
