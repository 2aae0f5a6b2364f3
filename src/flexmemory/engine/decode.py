"""One decode step: one new token for each of B sequences, operation by operation.

The sequence of operations is written once. What carries them out is `engine/plain.py` (PyTorch, the reference),
`engine/narrow.py` (few sequences on a GPU) or `engine/wide.py` (many on a GPU). It equals `Transformer.forward` on
the same tokens, which tests assert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from flexmemory.engine.plain import RowOf
from flexmemory.model.ffn import SwiGLU
from flexmemory.model.transformer import DenseBlock, FlexBlock, MemoryBlock, Transformer


@runtime_checkable
class Operations(Protocol):
    """What a step is made of; shapes and meaning as in `engine/plain.py`."""

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
        ...

    def attend(self, query: Tensor, *, lengths: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """As `plain.attend`."""
        ...

    def add_projection(self, x: Tensor, inner: Tensor, projection: nn.Linear, *, row: RowOf | None) -> Tensor:
        """As `plain.add_projection`."""
        ...

    def gated(self, x: Tensor, norm: nn.RMSNorm, gate: nn.Linear, up: nn.Linear) -> Tensor:
        """As `plain.gated`."""
        ...

    def logits(self, x: Tensor, norm: nn.RMSNorm, head: nn.Linear) -> Tensor:
        """As `plain.logits`."""
        ...

    def most_likely(self, x: Tensor, norm: nn.RMSNorm, head: nn.Linear) -> Tensor:
        """As `plain.most_likely`."""
        ...


def residual_stream(
    model: Transformer,
    operations: Operations,
    x: Float[Tensor, "B D"],
    *,
    row: Callable[[int], RowOf | None],
    rotary: Float[Tensor, "2 C E"],
    lengths: Int[Tensor, " B"],
    states: Float[Tensor, "L 2 S G C E"],
) -> Float[Tensor, "B D"]:
    """The residual stream after all layers, before the last norm.

    Args:
        model: Its weights.
        operations: What computes.
        x: Input embeddings of the new tokens.
        row: Where a layer's rows are; None where it has none.
        rotary: Cosines and sines by position.
        lengths: Tokens in the cache: the positions of the new ones.
        states: Keys and values, to which those of the new tokens are added.
    """
    blocks = [block for block in model.blocks if isinstance(block, DenseBlock | MemoryBlock)]
    for layer, block in enumerate(blocks):
        keys, values = states[layer]
        output = block.attention.output
        query = operations.query_and_cache(
            x,
            block.attention_norm,
            block.attention.qkv,
            rotary=rotary,
            lengths=lengths,
            keys=keys,
            values=values,
        )
        inner = operations.attend(query, lengths=lengths, keys=keys, values=values)
        if isinstance(block, MemoryBlock) and not isinstance(block, FlexBlock):
            x = operations.add_projection(x, inner, output, row=row(layer))
            continue
        ffn = block.ffn_c if isinstance(block, FlexBlock) else block.ffn
        if isinstance(ffn, SwiGLU):
            x = operations.add_projection(x, inner, output, row=None)
            inner = operations.gated(x, block.ffn_norm, ffn.gate, ffn.up)
        else:
            x = operations.add_projection(x, inner, output, row=None)
            inner = block.ffn_norm(x)
            inner = inner if ffn.up is None else F.silu(ffn.up(inner))
        x = operations.add_projection(x, inner, ffn.down, row=row(layer))
    return x
