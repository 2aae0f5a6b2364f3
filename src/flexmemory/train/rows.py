"""Rows in training: a table of them is computed once and detached, and its gradient summed apart, in fp32.

The loss reaches FFN-M only through the table, so one backward pass through FFN-M with the sum of all micro-batches'
gradients gives the gradient of the sum. Dimension key: B batch, T tokens, U unique ids, L layers, D model width,
N positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from flexmemory.model.memory import MemoryRows, Rows
from flexmemory.train.parallel import RowExchange

AddRows = Callable[[Tensor, Tensor, Tensor], Any]


def add_rows(total: Float[Tensor, "U D"], index: Int[Tensor, " N"], values: Float[Tensor, "N D"]) -> None:
    """Add row n of `values` to row `index[n]` of `total`, in the dtype of `total`.

    Deterministic on a CPU, and on a GPU under `torch.use_deterministic_algorithms`.
    """
    total.index_add_(0, index, values.to(total.dtype))


class TrainedRows:
    """A table of rows whose gradient is being summed."""

    def __init__(
        self,
        compute: Callable[[Tensor], Tensor],
        unique_ids: Int[Tensor, " U"],
        *,
        num_unique: int,
        add: AddRows = add_rows,
        exchange: RowExchange | None = None,
    ) -> None:
        """Compute the rows of `unique_ids` by `compute`, or each by its owner with an `exchange`.

        The first `num_unique` of the ids are distinct, the others padding.
        """
        self.num_computed = num_unique if exchange is None else exchange.num_owned
        """Rows computed here, padding apart."""
        self._exchange = exchange
        self._add = add
        self._computed = compute(unique_ids if exchange is None else exchange.owned_ids.to(unique_ids.device))
        rows = self._computed.detach()
        self.table: Float[Tensor, "U L D"] = rows if exchange is None else exchange.rows(rows)
        """Rows of each unique id in every layer."""
        wide = torch.promote_types(rows.dtype, torch.float32)
        self._gradient = torch.zeros_like(self.table, dtype=wide) if self._computed.requires_grad else None

    def at(self, index: Int[Tensor, "B T"]) -> Rows:
        """The rows of a batch, whose backward pass adds to the gradient."""
        if self._gradient is None:
            return MemoryRows(self.table, index)
        return _BatchRows(self.table, self._gradient, index, self._add)

    def backward(self) -> None:
        """The backward pass through what computed the rows."""
        assert self._gradient is not None
        gradient = self._gradient if self._exchange is None else self._exchange.gradients(self._gradient)
        self._gradient = None
        self._computed.backward(gradient.to(self._computed.dtype))


class _BatchRows:
    """Rows of one batch during training."""

    def __init__(self, table: Tensor, gradient: Tensor, index: Tensor, add: AddRows) -> None:
        self._table, self._gradient, self._index, self._add = table, gradient, index, add
        self._anchor = torch.zeros((), device=table.device, requires_grad=True)

    def layer(self, layer: int) -> Tensor | None:
        return _Gather.apply(self._anchor, self._table[:, layer], self._gradient[:, layer], self._index, self._add)


class _Gather(torch.autograd.Function):
    """Rows of a table by index; the backward pass adds to a gradient table instead of making one per call.

    Autograd would fill a table with zeros for every layer of every micro-batch to hold a few thousand rows.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, rows: Tensor, gradient: Tensor, index: Tensor, add: AddRows) -> Tensor:
        ctx.save_for_backward(index)
        ctx.gradient, ctx.add = gradient, add
        return F.embedding(index, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        (index,) = ctx.saved_tensors
        ctx.add(ctx.gradient, index.flatten(), grads[0].flatten(0, 1))
        return (None,) * 5
