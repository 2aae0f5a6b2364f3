"""The whole model: embed, L blocks, norm, head, with rows from either source.

Three blocks share one attention. `DenseBlock` is the Llama-style base; `MemoryBlock` (Eq. 2.6) replaces its FFN by a
row that depends on the token id alone; `FlexBlock` (Sec. 4.2) keeps a small FFN on the residual stream beside the row.
Dimension key: B batch, T tokens, U unique ids, L layers, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from flexmemory.config import ModelConfig
from flexmemory.model.attention import Attention, AttentionFunction, rotary_table
from flexmemory.model.ffn import SwiGLU, ffn_c
from flexmemory.model.kv_cache import KVCacheLike
from flexmemory.model.memory import GivenRows, LayerMemory, MemoryRows, Rows, empty_embedding, unique_ids


class Block(nn.Module):
    """Pre-norm attention, shared by the three blocks."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        """Block of layer `layer`."""
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = Attention(config, layer)

    def attend(
        self,
        x: Float[Tensor, "B T D"],
        rotary: Float[Tensor, "2 *B T E"],
        mask: Bool[Tensor, "... T S"] | None,
        kv_cache: KVCacheLike | None,
        attention: AttentionFunction | None = None,
    ) -> Float[Tensor, "B T D"]:
        """The residual stream after attention."""
        return x + self.attention(self.attention_norm(x), rotary, mask, kv_cache, attention)


class DenseBlock(Block):
    """Y = X + Attn(LN(X)); X' = Y + FFN(LN(Y))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        """Block of layer `layer`."""
        super().__init__(config, layer)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.ffn = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        row: Float[Tensor, "B T D"] | None,
        rotary: Float[Tensor, "2 *B T E"],
        mask: Bool[Tensor, "... T S"] | None = None,
        kv_cache: KVCacheLike | None = None,
        attention: AttentionFunction | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Ignores `row`: a dense layer has no memory."""
        y = self.attend(x, rotary, mask, kv_cache, attention)
        return y + self.ffn(self.ffn_norm(y))


class MemoryBlock(Block):
    """X' = X + Attn(LN(X)) + row (Eq. 2.6, 2.10)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        """Block of layer `layer`."""
        super().__init__(config, layer)
        self.memory: LayerMemory | None = LayerMemory(config)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        row: Float[Tensor, "B T D"] | None,
        rotary: Float[Tensor, "2 *B T E"],
        mask: Bool[Tensor, "... T S"] | None = None,
        kv_cache: KVCacheLike | None = None,
        attention: AttentionFunction | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Attend, then add the row."""
        y = self.attend(x, rotary, mask, kv_cache, attention)
        return y if row is None else y + row


class FlexBlock(MemoryBlock):
    """Y = X + Attn(LN(X)); X' = Y + FFN-C(LN(Y)) + row (Sec. 4.2)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        """Block of layer `layer`."""
        super().__init__(config, layer)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.ffn_c = ffn_c(config)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        row: Float[Tensor, "B T D"] | None,
        rotary: Float[Tensor, "2 *B T E"],
        mask: Bool[Tensor, "... T S"] | None = None,
        kv_cache: KVCacheLike | None = None,
        attention: AttentionFunction | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Attend, then add FFN-C's output and the row."""
        y = self.attend(x, rotary, mask, kv_cache, attention)
        out = y + self.ffn_c(self.ffn_norm(y))
        return out if row is None else out + row


BlockRunner = Callable[..., Tensor]
"""Calls a block, its first argument, with the others: `torch.utils.checkpoint.checkpoint`, for one."""

_BLOCKS: dict[str, type[DenseBlock | MemoryBlock | FlexBlock]] = {
    "dense": DenseBlock,
    "memory": MemoryBlock,
    "flex": FlexBlock,
}


class Transformer(nn.Module):
    """A causal language model of any of the three architectures.

    Weights are allocated but not initialised: see `model/init.py` and `model/checkpoint.py`.
    """

    def __init__(self, config: ModelConfig, *, with_memory: bool = True, with_embedding: bool = True) -> None:
        """Allocate the weights.

        Args:
            config: The model.
            with_memory: Whether to have the weights that rows replace.
            with_embedding: Whether to have the embedding, which rows can carry; a head tied to it keeps it.
        """
        super().__init__()
        self.config = config
        present = with_embedding or config.tie_embeddings
        self.embedding = empty_embedding(config) if present else None
        block = _BLOCKS[config.architecture]
        self.blocks = nn.ModuleList(block(config, layer) for layer in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_head()
        if not with_memory:
            self.drop_memory()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.norm.weight.dtype

    def tie_head(self) -> None:
        """Let the head be the embedding's matrix, where the configuration says so; again when weights were replaced."""
        if self.config.tie_embeddings:
            assert self.embedding is not None
            self.head.weight = self.embedding.weight

    def drop_memory(self) -> None:
        """Free the weights that rows replace; from here on `forward` needs `rows`."""
        for block in self.blocks:
            if isinstance(block, MemoryBlock):
                block.memory = None

    @property
    def memories(self) -> list[LayerMemory]:
        """The memory of each layer.

        Raises:
            ValueError: the model is dense, or its memory weights were not loaded.
        """
        memories = [block.memory for block in self.blocks if isinstance(block, MemoryBlock)]
        present = [memory for memory in memories if memory is not None]
        if not present:
            reason = "its memory weights are not loaded" if memories else "it is dense"
            raise ValueError(f"this model cannot compute rows: {reason}")
        return present

    def give_rows(self, tensors: Mapping[str, Tensor]) -> None:
        """Let rows be given: `ids.L` [N] int64 and `rows.L` [N, D] for each layer L that has some.

        Raises:
            ValueError: there are ids without rows, or no such layer.
        """
        memories = self.memories
        for layer in sorted(int(name.removeprefix("ids.")) for name in tensors if name.startswith("ids.")):
            if f"rows.{layer}" not in tensors or layer >= len(memories):
                raise ValueError(f"it gives rows of layer {layer}, but has none of them or there is no such layer")
            memories[layer].given = GivenRows(tensors[f"ids.{layer}"], tensors[f"rows.{layer}"])

    def embed(self, token_ids: Int[Tensor, "*N"]) -> Float[Tensor, "*N D"]:
        """The input embeddings of `token_ids`.

        Raises:
            ValueError: the embedding was not loaded.
        """
        if self.embedding is None:
            raise ValueError(
                "this model has no embedding of its own: give rows that carry it, from a ToL store built with "
                "--embedding, or load the checkpoint with its embedding"
            )
        return self.embedding(token_ids)

    def compute_rows(self, token_ids: Int[Tensor, " U"]) -> Float[Tensor, "U L D"]:
        """Rows of each id in every layer (Eq. 2.9), computed by FFN-M and free tables."""
        embeddings = self.embed(token_ids)
        return torch.stack([memory(token_ids, embeddings) for memory in self.memories], dim=1)

    def rows(self, token_ids: Int[Tensor, "B T"]) -> MemoryRows:
        """Rows of a batch, computed once per unique id.

        Raises:
            ValueError: the model is dense, or its memory weights were not loaded.
        """
        unique, index = unique_ids(token_ids)
        return MemoryRows(self.compute_rows(unique), index)

    def hidden_states(
        self,
        token_ids: Int[Tensor, "B T"],
        rows: Rows | None = None,
        kv_cache: KVCacheLike | None = None,
        positions: Int[Tensor, "B T"] | None = None,
        *,
        attention: AttentionFunction | None = None,
        run: BlockRunner | None = None,
    ) -> Float[Tensor, "B T D"]:
        """The normed residual stream that the head reads; arguments as for `forward`, and two for a host of the model.

        `attention` computes attention in place of PyTorch's causal one. It decides who is seen, so it comes with
        `positions`, and no length is checked: sequences may lie behind one another. `run` calls each block.
        """
        length, start = token_ids.shape[1], 0
        if attention is None:
            start = 0 if kv_cache is None else kv_cache.get_seq_length()
            self._check_length(start + length)
        elif positions is None:
            raise ValueError("an attention function comes with the positions (B, T) of the tokens, got none")
        self._check_ids(token_ids)
        if rows is None and self.config.has_memory:
            rows = self.rows(token_ids)
        x = None if rows is None else rows.embeddings()
        if x is None:
            x = self.embed(token_ids)  # (B, T, D)
        mask = None
        if attention is None and positions is not None:
            seen = torch.arange(start + length, device=x.device) <= positions[..., None]  # (B, T, S)
            mask = seen[:, None]  # (B, 1, T, S)
        elif start > 0 and length > 1:
            mask = torch.ones(length, start + length, dtype=torch.bool, device=x.device).tril(start)  # (T, S)
        rotary = rotary_table(
            torch.arange(start, start + length, device=x.device) if positions is None else positions,
            head_size=self.config.head_size,
            theta=self.config.rope_theta,
            dtype=x.dtype,
        )
        for layer, block in enumerate(self.blocks):
            row = None if rows is None else rows.layer(layer)
            if run is None:
                x = block(x, row, rotary, mask, kv_cache, attention)
            else:
                x = run(block, x, row, rotary, mask, kv_cache, attention)
        return self.norm(x)

    def forward(
        self,
        token_ids: Int[Tensor, "B T"],
        rows: Rows | None = None,
        kv_cache: KVCacheLike | None = None,
        positions: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Logits of the next token at every position.

        Args:
            token_ids: The new tokens; those before them are in `kv_cache`.
            rows: The memory rows of these tokens; computed here from FFN-M when not given.
            kv_cache: Keys and values of earlier tokens; the new ones are added to it.
            positions: The place of each token in its sequence, where sequences differ in length; the cache writes there
                (`engine/slots.py`). By default all follow the cached ones.

        Raises:
            ValueError: an id is out of range (checked on CPU), the sequence is longer than `max_seq_len`, or `rows`
                (or the embeddings that they should carry) are missing and cannot be computed.
        """
        return self.head(self.hidden_states(token_ids, rows, kv_cache, positions))

    def _check_length(self, length: int) -> None:
        if length > self.config.max_seq_len:
            raise ValueError(f"sequence of {length} tokens is longer than the model's {self.config.max_seq_len}")

    def _check_ids(self, token_ids: Tensor) -> None:
        if token_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            check_token_ids(token_ids, self.config.vocab_size)


def check_token_ids(token_ids: Tensor, vocab_size: int) -> None:
    """Refuse ids outside the vocabulary.

    Raises:
        ValueError: an id is negative or not below `vocab_size`.
    """
    if token_ids.numel() and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < vocab_size:
        bad = token_ids[(token_ids < 0) | (token_ids >= vocab_size)].flatten()[0]
        raise ValueError(f"token id {int(bad)} is out of range: the vocabulary has {vocab_size} ids")
