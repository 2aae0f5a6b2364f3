"""A chunk of a prompt on a GPU: many new tokens of one sequence, by the operations of a decode step.

`Transformer.forward` computes the same in about three times as many launches; tests hold the two together.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from flexmemory.engine.decode import residual_stream
from flexmemory.engine.plain import RowOf
from flexmemory.engine.wide import WideKernels, rotate_and_cache
from flexmemory.model.memory import MemoryRows
from flexmemory.model.transformer import Transformer


class _PromptKernels(WideKernels):
    """The operations for T tokens of one slot, whose keys and values are (1, G, C, E)."""

    def __init__(self, device: torch.device, *, stop: int) -> None:
        super().__init__(device)
        self._stop = stop

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
        upcoming: Tensor | None = None,
    ) -> Tensor:
        return rotate_and_cache(qkv(norm(x)), rotary, lengths, keys, values, slot_stride=0)

    def attend(
        self, query: Tensor, *, lengths: Tensor, keys: Tensor, values: Tensor, upcoming: Tensor | None = None
    ) -> Tensor:
        count, num_heads = query.shape[:2]
        grouped = num_heads != keys.shape[1]
        mask = None
        if 1 < count < self._stop:
            mask = causal_lower_right(count, self._stop)
            if grouped:  # that bias has no form for groups
                mask = torch.ones(count, self._stop, dtype=torch.bool, device=query.device).tril(self._stop - count)
        attended = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            keys[:, :, : self._stop],
            values[:, :, : self._stop],
            attn_mask=mask,
            is_causal=count == self._stop > 1,
            enable_gqa=grouped,
        )  # (1, H, T, E)
        return attended[0].transpose(0, 1).flatten(1)


def prompt_logits(
    model: Transformer,
    token_ids: Int[Tensor, " T"],
    rows: MemoryRows | None,
    *,
    start: int,
    rotary: Float[Tensor, "2 C E"],
    states: Float[Tensor, "L 2 1 G C E"],
) -> Float[Tensor, "1 V"]:
    """Logits after a chunk at positions `start` .. `start + T - 1` of the sequence whose cache is `states`."""
    operations = _PromptKernels(token_ids.device, stop=start + len(token_ids))
    x = None if rows is None else rows.embeddings()
    x = model.embed(token_ids) if x is None else x[0]

    def row(layer: int) -> RowOf | None:
        of_layer = None if rows is None else rows.unique(layer)
        return None if of_layer is None or rows is None else RowOf(of_layer, rows.index.flatten())

    x = residual_stream(
        model,
        operations,
        x,
        row=row,
        rotary=rotary,
        lengths=torch.arange(start, start + len(token_ids), dtype=torch.int32, device=x.device),
        states=states,
    )
    return operations.logits(x[-1:], model.norm, model.head)
