"""The memory: rows that depend on the token id alone, computed (Eq. 2.5) or looked up (Eq. 2.9).

`MemoryRows` is the one form in which the model receives them: a table of rows for the unique ids of a batch, and an
index into it. Training, table building, prefill and decode all use it; nothing after this file knows where rows came
from. Dimension key: B batch, T tokens, U unique ids, L layers, D model width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from flexmemory.config import ModelConfig
from flexmemory.model.ffn import SwiGLU


@runtime_checkable
class Rows(Protocol):
    """What the model needs of its memory: one tensor a layer, or nothing where the layer is dropped."""

    def layer(self, layer: int) -> Float[Tensor, "B T D"] | None:
        """The rows that layer `layer` adds to the residual stream."""
        ...

    def embeddings(self) -> Float[Tensor, "B T D"] | None:
        """The input embeddings, or None where the model looks them up."""
        ...


class MemoryRows:
    """A table of rows and an index into it.

    `table` is (U, slices, D), token-major as on disk; `index` is (B, T), positions in the table. A slice is a layer of
    the model; `layers` names them in the table's order, by default all. With `embedding`, one slice more comes before
    them: the input embedding.
    """

    def __init__(
        self,
        table: Float[Tensor, "U slices D"],
        index: Int[Tensor, "B T"],
        *,
        layers: Sequence[int] | None = None,
        embedding: bool = False,
        fixed: bool = False,
    ) -> None:
        """Bind an index to a table, which is `fixed` where all other batches' rows are in the same one."""
        self.table = table
        self.fixed = fixed
        self.index = index
        # One unbind, not a select for each: its backward is one stack instead of many zero-padded tables.
        slices = table.unbind(1)
        self._embedding = slices[0] if embedding else None
        rows = slices[1:] if embedding else slices
        self._layers = dict(zip(range(len(rows)) if layers is None else layers, rows, strict=True))

    def layer(self, layer: int) -> Float[Tensor, "B T D"] | None:
        """The rows that layer `layer` adds to the residual stream, or None where the table leaves it out."""
        rows = self.unique(layer)
        return None if rows is None else F.embedding(self.index, rows)

    def unique(self, layer: int) -> Float[Tensor, "U D"] | None:
        """The rows of layer `layer` that the index points into, or None where the table leaves it out."""
        return self._layers.get(layer)

    def moved(self, table: Float[Tensor, "U slices D"], index: Int[Tensor, "B T"]) -> MemoryRows:
        """The same slices in another table, under another index."""
        return MemoryRows(table, index, layers=tuple(self._layers), embedding=self._embedding is not None)

    def under(self, index: Int[Tensor, "B T"]) -> MemoryRows:
        """The same table under another index."""
        rows = copy.copy(self)
        rows.index = index
        return rows

    def embeddings(self) -> Float[Tensor, "B T D"] | None:
        """The input embeddings, or None where the table does not hold them and the model looks them up."""
        return None if self._embedding is None else F.embedding(self.index, self._embedding)


class ScaledRows:
    """Rows times a factor per layer: the alpha probe (Table 1) and, with factor 0, dropped layers (Fig. 12)."""

    def __init__(self, rows: Rows, alphas: Sequence[float]) -> None:
        """Scale layer l of `rows` by `alphas[l]`."""
        self._rows = rows
        self._alphas = alphas

    def layer(self, layer: int) -> Float[Tensor, "B T D"] | None:
        """The scaled rows of layer `layer`, or None where its factor is 0."""
        alpha = self._alphas[layer]
        rows = None if alpha == 0 else self._rows.layer(layer)
        return rows if rows is None or alpha == 1 else rows * alpha

    def embeddings(self) -> Float[Tensor, "B T D"] | None:
        """Those of the rows that are scaled."""
        return self._rows.embeddings()


def empty_embedding(config: ModelConfig) -> nn.Embedding:
    """A table of V rows, not initialised: on the meta device that would import torch's compiler, which takes 1.1 s."""
    return nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size), freeze=False)


class GivenRows(nn.Module):
    """Rows of some tokens that are given, whatever would be computed or looked up: edits of rows (docs/editing.md)."""

    ids: Int[Tensor, " N"]
    """Distinct, ascending."""
    rows: Float[Tensor, "N D"]

    def __init__(self, ids: Int[Tensor, " N"], rows: Float[Tensor, "N D"]) -> None:
        """Give `rows` to the tokens `ids`, at least one and distinct."""
        super().__init__()
        order = ids.argsort()
        # They are no weights: `model/checkpoint.py` stores them in a file of their own.
        self.register_buffer("ids", ids[order], persistent=False)
        self.register_buffer("rows", rows[order], persistent=False)

    def forward(self, token_ids: Int[Tensor, "*N"], rows: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        """`rows` of `token_ids` with the given ones in their places; the others bit for bit as they were."""
        place = torch.searchsorted(self.ids, token_ids).clamp(max=len(self.ids) - 1)
        given = self.ids[place] == token_ids
        return torch.where(given[..., None], self.rows[place].to(rows.dtype), rows)


class LayerMemory(nn.Module):
    """The memory of one layer: FFN-M behind a norm of its own, a free table, or their sum; some rows may be given."""

    def __init__(self, config: ModelConfig) -> None:
        """Allocate what `config.memory_kind` asks for."""
        super().__init__()
        self.norm: nn.RMSNorm | None = None
        self.ffn: SwiGLU | None = None
        if config.memory_kind != "table":
            self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
            self.ffn = SwiGLU(config.hidden_size, config.intermediate_size)
        has_table = config.memory_kind != "ffn"
        self.table = empty_embedding(config) if has_table else None
        self.given: GivenRows | None = None

    def query(self, embeddings: Float[Tensor, "U D"]) -> Float[Tensor, "U D"]:
        """What FFN-M sees of a token: q = LN_L(E[t]), Sec. 2.3.1."""
        assert self.norm is not None
        return self.norm(embeddings)

    def coefficients(self, embeddings: Float[Tensor, "U D"]) -> Float[Tensor, "U K"]:
        """The coefficient of each cell, c(t) of Eq. 2.7."""
        assert self.ffn is not None
        return self.ffn.coefficients(self.query(embeddings))

    def forward(self, token_ids: Int[Tensor, " U"], embeddings: Float[Tensor, "U D"]) -> Float[Tensor, "U D"]:
        """The rows of `token_ids`, whose embeddings are given: FFN_L(LN_L(E[t])), Eq. 2.5."""
        if self.ffn is None:
            assert self.table is not None
            rows = self.table(token_ids)
        else:
            rows = self.ffn(self.query(embeddings))
            rows = rows if self.table is None else rows + self.table(token_ids)
        return rows if self.given is None else self.given(token_ids, rows)


def unique_ids(token_ids: Int[Tensor, "B T"]) -> tuple[Int[Tensor, " U"], Int[Tensor, "B T"]]:
    """The sorted distinct ids, and for each position its place among them."""
    return torch.unique(token_ids, return_inverse=True)
