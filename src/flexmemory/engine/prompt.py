"""Chunks of prompts on a GPU: many new tokens of one sequence, by the operations of a decode step.

`Transformer.forward` computes the same in about three times as many launches; tests hold the two together. The first
chunk of a prompt has a form that fits any slot and any prompt of up to its length, so it is captured as a CUDA graph
the second time that its size occurs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from flexmemory.engine.decode import residual_stream
from flexmemory.engine.plain import RowOf
from flexmemory.engine.slots import Slots
from flexmemory.engine.wide import WideKernels, rotate_and_cache
from flexmemory.model.memory import MemoryRows
from flexmemory.model.transformer import Transformer

SMALLEST = 64
"""Tokens of the smallest captured chunk; longer ones are powers of two."""


class Prompts:
    """Computes chunks of prompts into slots."""

    def __init__(self, model: Transformer, slots: Slots, *, longest: int) -> None:
        """Fill `slots` by chunks of up to `longest` tokens."""
        self._model, self._slots = model, slots
        self._largest = min(_padded(longest), slots.capacity)
        self._seen: set[int] = set()
        self._captured: dict[int, _FirstChunk] = {}
        self._rows: MemoryRows | None = None
        """Where captured chunks look for rows."""
        self._pool: Any = None

    def logits(
        self, token_ids: Int[Tensor, "1 T"], rows: MemoryRows | None, slot: int, *, start: int
    ) -> Float[Tensor, "1 V"]:
        """Logits after a chunk at positions `start` .. `start + T - 1` of the sequence in `slot`."""
        count = token_ids.shape[1]
        size = _padded(count)
        if start == 0 and size <= self._largest:
            if size in self._seen and size not in self._captured:
                self._captured[size] = self._capture(size, rows)
            if size in self._captured:
                return self._captured[size].run(token_ids, rows, slot)
            self._seen.add(size)
        ids = token_ids[0]
        operations = _PromptKernels(ids.device, slot=torch.full((1,), slot, device=ids.device), start=start)
        lengths = torch.arange(start, start + count, dtype=torch.int32, device=ids.device)
        x = _stream(self._model, self._slots, operations, ids, rows, lengths=lengths)
        return operations.logits(x[-1:], self._model.norm, self._model.head)

    def give_back(self) -> bool:
        """Give up the memory of captured chunks, and capture no more; False where there are none."""
        held = bool(self._captured)
        self._captured.clear()
        self._rows, self._largest = None, 0
        return held

    def _capture(self, size: int, rows: MemoryRows | None) -> _FirstChunk:
        """A captured chunk, for rows that look like `rows`."""
        if rows is not None and self._rows is None:
            self._rows = rows
            if not rows.fixed:
                table = rows.table.new_zeros((self._largest, *rows.table.shape[1:]))
                self._rows = rows.moved(table, rows.index.new_zeros(1, self._largest))
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()  # one for all: they never run at once, and keep no result
        return _FirstChunk(self._model, self._slots, size=size, rows=self._rows, pool=self._pool)


def _padded(count: int) -> int:
    """Tokens of the captured chunk that `count` tokens fit."""
    return max(SMALLEST, 1 << (count - 1).bit_length())


class _FirstChunk:
    """A captured chunk at the start of a sequence: up to `size` tokens, those that are left over computed in vain."""

    def __init__(self, model: Transformer, slots: Slots, *, size: int, rows: MemoryRows | None, pool: Any) -> None:
        """Capture it, with `rows` where it looks for them."""
        device = slots.token_ids.device
        self._token_ids = torch.zeros(1, size, dtype=torch.int64, device=device)
        self._slot, self._last = torch.zeros(2, 1, dtype=torch.int64, device=device)
        if rows is not None:
            rows = rows.under(self._token_ids if rows.fixed else rows.index[:, :size])
        self._rows = rows
        lengths = torch.arange(size, dtype=torch.int32, device=device)
        operations = _PromptKernels(device, slot=self._slot, start=0)

        def compute() -> Tensor:
            x = _stream(model, slots, operations, self._token_ids[0], rows, lengths=lengths)
            return operations.logits(x.index_select(0, self._last), model.norm, model.head)

        self._compute = compute  # it keeps alive what the graph reads, which the graph does not
        self._graph, self._logits = _captured(compute, pool)

    def run(self, token_ids: Int[Tensor, "1 T"], rows: MemoryRows | None, slot: int) -> Float[Tensor, "1 V"]:
        """Compute a chunk into `slot`."""
        count = token_ids.shape[1]
        self._token_ids[:, :count] = token_ids
        self._slot.fill_(slot)
        self._last.fill_(count - 1)
        if rows is not None and not rows.fixed:
            assert self._rows is not None
            self._rows.table[: len(rows.table)] = rows.table
            self._rows.index[:, :count] = rows.index
        self._graph.replay()
        return self._logits.clone()


def _captured(compute: Callable[[], Tensor], pool: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of `compute`, and the tensor over which each replay writes its result."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = compute()
    return graph, result


class _PromptKernels(WideKernels):
    """The operations for T tokens of one slot, (1,) int64, after `start` tokens in its cache."""

    def __init__(self, device: torch.device, *, slot: Tensor, start: int) -> None:
        super().__init__(device)
        self._slot, self._start = slot, start
        self._new: tuple[Tensor, Tensor] | None = None
        """Keys and values of these tokens, (T, G, E) each."""

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
    ) -> Tensor:
        heads = qkv(norm(x))
        query, turned = rotate_and_cache(heads, rotary, lengths, keys, values, slot=self._slot)
        assert turned is not None
        self._new = turned, heads[:, -turned[0].numel() :].view_as(turned)
        return query

    def attend(self, query: Tensor, *, lengths: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        assert self._new is not None
        new, self._new = self._new, None
        count, num_heads = query.shape[:2]
        stop = self._start + count
        grouped = num_heads != keys.shape[1]
        mask = None
        if self._start == 0:
            key, value = (tensor.transpose(0, 1)[None] for tensor in new)  # (1, G, T, E)
        else:
            key, value = (tensor.index_select(0, self._slot)[:, :, :stop] for tensor in (keys, values))
            if count > 1:
                mask = causal_lower_right(count, stop)
                if grouped:  # that bias has no form for groups
                    mask = torch.ones(count, stop, dtype=torch.bool, device=query.device).tril(self._start)
        attended = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            key,
            value,
            attn_mask=mask,
            is_causal=self._start == 0 and count > 1,
            enable_gqa=grouped,
        )  # (1, H, T, E)
        return attended[0].transpose(0, 1).flatten(1)


def _stream(
    model: Transformer,
    slots: Slots,
    operations: _PromptKernels,
    token_ids: Int[Tensor, " T"],
    rows: MemoryRows | None,
    *,
    lengths: Int[Tensor, " T"],
) -> Float[Tensor, "T D"]:
    """The residual stream of a chunk, before the last norm."""
    x = None if rows is None else rows.embeddings()
    x = model.embed(token_ids) if x is None else x[0]

    def row(layer: int) -> RowOf | None:
        of_layer = None if rows is None else rows.unique(layer)
        return None if of_layer is None or rows is None else RowOf(of_layer, rows.index[0])

    return residual_stream(model, operations, x, row=row, rotary=slots.rotary, lengths=lengths, states=slots.states)
