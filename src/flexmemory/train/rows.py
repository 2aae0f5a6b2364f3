"""Rows in training: a table of them is computed once and detached, and its gradient summed apart, in fp32.

The loss reaches FFN-M only through the table, so one backward pass through FFN-M with the sum of all micro-batches'
gradients gives the gradient of the sum. The input embedding is a lookup of the same kind and comes last in the table,
after the layers. Dimension key: B batch, T tokens, U unique ids, L layers, D model width, N positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from flexmemory.model.memory import Rows
from flexmemory.train.parallel import RowExchange


class TrainedRows:
    """A table of rows whose gradient is being summed."""

    def __init__(
        self,
        compute: Callable[[Tensor], Tensor],
        unique_ids: Int[Tensor, " U"],
        *,
        num_unique: int,
        exchange: RowExchange | None = None,
    ) -> None:
        """Compute the rows of `unique_ids` by `compute`, or each by its owner with an `exchange`.

        The first `num_unique` of the ids are distinct, the others padding.
        """
        self.num_computed = num_unique if exchange is None else exchange.num_owned
        """Rows computed here, padding apart."""
        self._exchange = exchange
        self._computed = compute(unique_ids if exchange is None else exchange.owned_ids.to(unique_ids.device))
        rows = self._computed.detach()
        self.table: Float[Tensor, "U L+1 D"] = rows if exchange is None else exchange.rows(rows)
        """Rows of each unique id in every layer, then its embedding."""
        wide = torch.promote_types(rows.dtype, torch.float32)
        self._gradient = torch.zeros_like(self.table, dtype=wide) if self._computed.requires_grad else None

    def at(self, index: Int[Tensor, "B T"]) -> Rows:
        """The rows of a batch, whose backward pass adds to the gradient."""
        return _BatchRows(self.table, self._gradient, index)

    def backward(self) -> None:
        """The backward pass through what computed the rows."""
        assert self._gradient is not None
        gradient = self._gradient if self._exchange is None else self._exchange.gradients(self._gradient)
        self._gradient = None
        self._computed.backward(gradient.to(self._computed.dtype))


class _BatchRows:
    """Rows and embeddings of one batch during training."""

    def __init__(self, table: Tensor, gradient: Tensor | None, index: Tensor) -> None:
        self._table, self._gradient, self._index = table, gradient, index
        self._anchor = torch.zeros((), device=table.device, requires_grad=True)
        self._sorted = None
        if index.is_cuda and gradient is not None and not torch.are_deterministic_algorithms_enabled():
            self._sorted = index.flatten().sort()

    def layer(self, layer: int) -> Tensor:
        rows = self._table[:, layer]
        if self._gradient is None:
            return F.embedding(self._index, rows)
        return _Gather.apply(self._anchor, rows, self._gradient[:, layer], self._index, self._sorted)

    def embeddings(self) -> Tensor:
        return self.layer(self._table.shape[1] - 1)


class _Gather(torch.autograd.Function):
    """Rows of a table by index; the backward pass adds to a gradient table instead of making one per call.

    Autograd would fill a table with zeros for every layer of every micro-batch to hold a few thousand rows.
    """

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, rows: Tensor, gradient: Tensor, index: Tensor, by_row: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        ctx.gradient, ctx.index, ctx.by_row = gradient, index, by_row
        return F.embedding(index, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        values = grads[0].flatten(0, 1)
        if ctx.by_row is None:
            ctx.gradient.index_add_(0, ctx.index.flatten(), values.to(ctx.gradient.dtype))
        else:
            from flexmemory.train.kernels import add_sorted_rows  # Triton is there where a GPU is

            ids, order = ctx.by_row
            add_sorted_rows(ctx.gradient, ids, order, values.contiguous())
        return (None,) * 5
