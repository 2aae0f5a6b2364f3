"""Token, key, value: what the memory of a token is made of (Sec. 2.3.1).

A token's query q = LN_L(E[t]) meets K keys (rows of W_up); cell i contributes its value (column i of W_down) times
c_i(t) = (q . W_up[i]) * SiLU(q . W_gate[i]), Eq. 2.7. As the query space is the vocabulary, every statement here is
exact: nothing is sampled. Dimension key: U token ids, V vocabulary, K cells, D model width.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from flexmemory.model.attention import rotary_table
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.model.ffn import SwiGLU
from flexmemory.model.transformer import DenseBlock, Transformer, check_token_ids

if TYPE_CHECKING:
    from flexmemory.interpret.edit import Editor
    from flexmemory.interpret.kept import Kept

VOCABULARY_CHUNK = 4096
"""Tokens whose coefficients exist at once."""

Sign = Literal[1, -1]


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
    """One cell's part in a token's row."""

    layer: int
    key: int
    coefficient: float
    """c of Eq. 2.7."""
    weight: float
    """|c| times the norm of the value: how long a vector the cell adds."""

    @property
    def name(self) -> str:
        """As in links: L12K3071."""
        return f"L{self.layer}K{self.key}"


@dataclasses.dataclass(frozen=True, slots=True)
class Activations:
    """What happens in the cells of one layer; names as TransformerLens has them for gated MLPs."""

    pre: Float[Tensor, "U K"]
    """The gate before SiLU, q . W_gate[i] (`hook_pre`)."""
    pre_linear: Float[Tensor, "U K"]
    """q . W_up[i] (`hook_pre_linear`)."""
    post: Float[Tensor, "U K"]
    """c, their product after SiLU (`hook_post`)."""


class TokenMemory:
    """The memory of a model, read as keys and values.

    Of a memory or flex model, all layers' FFN-M can be read. Of a dense model only layer 0 can: its FFN reads the
    residual stream, which is a function of the token where the token is the first of its sequence. `scope` says so.
    """

    def __init__(self, model: Transformer) -> None:
        """Read `model`, which is not changed.

        Raises:
            ValueError: its memory weights are not loaded, or its memory is a free table, which has no keys and values.
        """
        self.model = model
        config = model.config
        self._memories = model.memories if config.has_memory else []
        if self._memories and self._memories[0].ffn is None:
            raise ValueError("a free table has no keys and values: coefficients need memory_kind ffn or ffn+table")
        self.exact = config.has_memory
        self.layers = tuple(range(config.num_layers if self.exact else 1))
        self.num_layers = len(self.layers)
        self.num_keys = config.intermediate_size
        self.vocab_size = config.vocab_size
        self.hidden_size = config.hidden_size

    @property
    def scope(self) -> str:
        """What statements about tokens hold for."""
        if not self.exact:
            return "the token as the first of its sequence; at later places a dense FFN reads the context too"
        if self.model.config.architecture == "flex":
            return "every context, for FFN-M; FFN-C reads the residual stream and cannot be enumerated"
        return "every context"

    def cells(self, layer: int) -> SwiGLU:
        """The FFN whose cells these are.

        Raises:
            ValueError: the layer does not exist, or cannot be read as a memory.
        """
        if layer not in self.layers:
            depth = self.model.config.num_layers
            if 0 <= layer < depth:
                raise ValueError(
                    f"layer {layer} of a dense model reads the context: only layer 0 is a function of the token "
                    "(the first of its sequence)"
                )
            raise ValueError(f"layer {layer} is out of range: the model has layers 0 to {depth - 1}")
        if self.exact:
            ffn = self._memories[layer].ffn
            assert ffn is not None
            return ffn
        block = self.model.blocks[layer]
        assert isinstance(block, DenseBlock)
        return block.ffn

    def keys(self, layer: int) -> Float[Tensor, "K D"]:
        """What queries are compared with: rows of W_up."""
        return self.cells(layer).up.weight.detach()

    def gates(self, layer: int) -> Float[Tensor, "K D"]:
        """What reweights: rows of W_gate."""
        return self.cells(layer).gate.weight.detach()

    def values(self, layer: int) -> Float[Tensor, "K D"]:
        """What is added: columns of W_down."""
        return self.cells(layer).down.weight.detach().T

    def value_norms(self, layer: int) -> Float[Tensor, " K"]:
        """Lengths of the values."""
        return self.values(layer).norm(dim=1)

    @torch.no_grad()
    def queries(self, token_ids: Int[Tensor, " U"], *, layer: int) -> Float[Tensor, "U D"]:
        """What the cells see of each token.

        Raises:
            ValueError: the layer cannot be read, or an id is out of range.
        """
        self.cells(layer)
        check_token_ids(token_ids.cpu(), self.vocab_size)
        token_ids = token_ids.to(self.model.device)
        embeddings = self.model.embed(token_ids)
        if self.exact:
            return self._memories[layer].query(embeddings)
        block = self.model.blocks[layer]
        assert isinstance(block, DenseBlock)
        config = self.model.config
        first = torch.zeros(1, dtype=torch.int64, device=token_ids.device)
        rotary = rotary_table(first, head_size=config.head_size, theta=config.rope_theta, dtype=embeddings.dtype)
        return block.ffn_norm(block.attend(embeddings[:, None], rotary, None, None))[:, 0]

    @torch.no_grad()
    def coefficients(self, token_ids: Int[Tensor, " U"], *, layer: int) -> Float[Tensor, "U K"]:
        """c(t) of Eq. 2.7 for each token in one layer; errors as for `queries`."""
        return self.cells(layer).coefficients(self.queries(token_ids, layer=layer))

    @torch.no_grad()
    def activations(self, token_ids: Int[Tensor, " U"], *, layer: int) -> Activations:
        """The coefficients and what they are products of; errors as for `queries`."""
        ffn, queries = self.cells(layer), self.queries(token_ids, layer=layer)
        return Activations(ffn.gate(queries), ffn.up(queries), ffn.coefficients(queries))

    @torch.no_grad()
    def rows(self, token_ids: Int[Tensor, " U"], *, layer: int) -> Float[Tensor, "U D"]:
        """What the layer adds to the residual stream, a free table beside FFN-M included; errors as for `queries`."""
        if not self.exact:
            return self.cells(layer)(self.queries(token_ids, layer=layer))
        self.cells(layer)
        check_token_ids(token_ids.cpu(), self.vocab_size)
        token_ids = token_ids.to(self.model.device)
        return self._memories[layer](token_ids, self.model.embed(token_ids))

    @torch.no_grad()
    def column(self, *, layer: int, key: int) -> Float[Tensor, " V"]:
        """The coefficient of one cell for every token of the vocabulary.

        Raises:
            ValueError: layer or key does not exist.
        """
        self._check_key(layer, key)
        up, gate = self.keys(layer)[key], self.gates(layer)[key]
        parts = []
        for ids in self.vocabulary_chunks():
            queries = self.queries(ids, layer=layer)
            parts.append((queries @ up) * F.silu(queries @ gate))
        return torch.cat(parts)

    def top_keys(self, token_id: int, *, layer: int, count: int = 16, sign: Sign | None = None) -> list[Cell]:
        """The cells that matter most to a token's row, by |c| times the norm of the value.

        Args:
            token_id: The token.
            layer: The layer.
            count: How many, at most.
            sign: Of the coefficient; by default both.

        Raises:
            ValueError: layer or token do not exist.
        """
        coefficients = self.coefficients(torch.tensor([token_id]), layer=layer)[0]
        weights = coefficients.abs() * self.value_norms(layer)
        chosen = torch.ones_like(weights, dtype=torch.bool) if sign is None else sign * coefficients > 0
        best = weights.where(chosen, -1).topk(min(count, int(chosen.sum())))
        found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [Cell(layer, key, float(coefficients[key]), weight) for key, weight in found]

    def top_tokens(
        self, *, layer: int, key: int, count: int = 32, sign: Sign = 1, mask: Bool[Tensor, " V"] | None = None
    ) -> list[tuple[int, float]]:
        """The tokens with the largest (`sign` 1) or smallest coefficients of a cell, over the whole vocabulary.

        Raises:
            ValueError: layer or key does not exist.
        """
        return _extremes(self.column(layer=layer, key=key), count=count, sign=sign, mask=mask)

    @torch.no_grad()
    def project(self, vectors: Float[Tensor, "*N D"]) -> Float[Tensor, "*N V"]:
        """What vectors in the residual stream say of the next token, without later layers: head(gain * vector).

        Gain is the final norm's; its division by the length of the stream is left out, so logits are comparable with
        each other and not with the model's.
        """
        return self.model.head(self.model.norm.weight * vectors.to(self.model.norm.weight))

    def promoted(
        self,
        vector: Float[Tensor, " D"],
        *,
        count: int = 16,
        sign: Sign = 1,
        mask: Bool[Tensor, " V"] | None = None,
    ) -> list[tuple[int, float]]:
        """The tokens that a vector promotes most, or with `sign` -1 suppresses most, by `project`."""
        return _extremes(self.project(vector), count=count, sign=sign, mask=mask)

    @torch.no_grad()
    def contributions(self, token_id: int, *, layer: int, direction: Float[Tensor, " D"]) -> Float[Tensor, " K"]:
        """Each cell's part of the row along a direction: c_k (v_k . direction), which sum to FFN-M's row . direction.

        Raises:
            ValueError: layer or token do not exist.
        """
        coefficients = self.coefficients(torch.tensor([token_id]), layer=layer)[0]
        return coefficients * (self.values(layer) @ direction.to(coefficients))

    @torch.no_grad()
    def nearest_tokens(
        self, token_id: int, *, layer: int = 0, count: int = 5, mask: Bool[Tensor, " V"] | None = None
    ) -> list[tuple[int, float]]:
        """The tokens whose coefficients point most nearly the same way: (id, cosine), nearest first, itself left out.

        Raises:
            ValueError: layer or token do not exist.
        """
        query = F.normalize(self.coefficients(torch.tensor([token_id]), layer=layer)[0], dim=0)
        chunks = self.vocabulary_chunks()
        cosines = torch.cat([F.normalize(self.coefficients(ids, layer=layer), dim=1) @ query for ids in chunks])
        others = torch.ones(self.vocab_size, dtype=torch.bool) if mask is None else mask.cpu().clone()
        others[token_id] = False
        return _extremes(cosines, count=count, sign=1, mask=others)

    def edit(self, checkpoint: Checkpoint | None = None, *, kept: Kept | None = None) -> Editor:
        """Begin to edit a copy (`interpret.edit`).

        Args:
            checkpoint: What the model was loaded from.
            kept: What is known of memories that share weights with this one.

        Raises:
            ValueError: the model is dense.
        """
        from flexmemory.interpret.edit import Editor  # it stands on this module

        return Editor(self, checkpoint, kept=kept)

    def vocabulary_chunks(self, size: int = VOCABULARY_CHUNK) -> tuple[Int[Tensor, " U"], ...]:
        """All token ids, in parts."""
        return torch.arange(self.vocab_size, device=self.model.device).split(size)

    def _check_key(self, layer: int, key: int) -> None:
        self.cells(layer)
        if not 0 <= key < self.num_keys:
            raise ValueError(f"key {key} is out of range: layer {layer} has keys 0 to {self.num_keys - 1}")


def _extremes(
    scores: Float[Tensor, " V"], *, count: int, sign: Sign, mask: Bool[Tensor, " V"] | None
) -> list[tuple[int, float]]:
    signed = sign * scores
    if mask is not None:
        signed = signed.masked_fill(~mask.to(signed.device), -torch.inf)
    best = signed.topk(min(count, len(scores) if mask is None else int(mask.sum())))
    return [(token, sign * score) for token, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
