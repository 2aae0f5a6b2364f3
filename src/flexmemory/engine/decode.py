"""One decode step: one new token for each of B sequences, operation by operation.

The sequence of operations is written once. What carries them out is `engine/plain.py` (PyTorch, the reference),
`engine/narrow.py` (few sequences on a GPU) or `engine/wide.py` (many on a GPU). It equals `Transformer.forward` on
the same tokens, which tests assert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from flexmemory.engine.plain import RowOf
from flexmemory.model.ffn import SwiGLU
from flexmemory.model.transformer import DenseBlock, FlexBlock, MemoryBlock, Transformer


class Operations(Protocol):
    """What a step is made of; shapes and meaning as in `engine/plain.py`.

    `upcoming` is the matrix that the next operation reads, which may be fetched ahead.
    """

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
        upcoming: Tensor | None = None,
    ) -> Tensor:
        """As `plain.query_and_cache`."""
        ...

    def attend(
        self, query: Tensor, *, lengths: Tensor, keys: Tensor, values: Tensor, upcoming: Tensor | None = None
    ) -> Tensor:
        """As `plain.attend`."""
        ...

    def add_projection(
        self, x: Tensor, inner: Tensor, projection: nn.Linear, *, row: RowOf | None, upcoming: Tensor | None = None
    ) -> Tensor:
        """As `plain.add_projection`."""
        ...

    def gated(
        self, x: Tensor, norm: nn.RMSNorm, gate: nn.Linear, up: nn.Linear, *, upcoming: Tensor | None = None
    ) -> Tensor:
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
    matrices = [block.attention.qkv.weight for block in blocks] + [model.head.weight]
    for layer, block in enumerate(blocks):
        keys, values = states[layer]
        output, after = block.attention.output, matrices[layer + 1]
        query = operations.query_and_cache(
            x,
            block.attention_norm,
            block.attention.qkv,
            rotary=rotary,
            lengths=lengths,
            keys=keys,
            values=values,
        )
        inner = operations.attend(query, lengths=lengths, keys=keys, values=values, upcoming=output.weight)
        if isinstance(block, MemoryBlock) and not isinstance(block, FlexBlock):
            x = operations.add_projection(x, inner, output, row=row(layer), upcoming=after)
            continue
        ffn = block.ffn_c if isinstance(block, FlexBlock) else block.ffn
        if isinstance(ffn, SwiGLU):
            x = operations.add_projection(x, inner, output, row=None, upcoming=ffn.gate.weight)
            inner = operations.gated(x, block.ffn_norm, ffn.gate, ffn.up, upcoming=ffn.down.weight)
        else:
            x = operations.add_projection(x, inner, output, row=None)
            inner = block.ffn_norm(x)
            inner = inner if ffn.up is None else F.silu(ffn.up(inner))
        x = operations.add_projection(x, inner, ffn.down, row=row(layer), upcoming=after)
    return x
