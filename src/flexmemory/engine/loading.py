"""A model and its rows, ready to run: from FFN weights, or from a ToL store with those weights left on disk."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from flexmemory.device import free_memory
from flexmemory.engine.engine import Engine
from flexmemory.engine.int8 import Int8Part, quantize
from flexmemory.engine.placement import PREFILL_TOKENS, Budget, CodedFacts, Placement, StoreFacts, place
from flexmemory.engine.reference import RowSource
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.model.transformer import Transformer
from flexmemory.tol.coded_rows import RowIndex
from flexmemory.tol.contract import RowTier
from flexmemory.tol.decoder import gpu_bytes
from flexmemory.tol.disk import DiskRows
from flexmemory.tol.hot import HotRows, HotSet
from flexmemory.tol.store import ToLStore
from flexmemory.tol.tiers import Where, lookup, open_rows

RowPlace = Literal["compute", "device", "host", "disk"]
"""Where rows come from: computed by FFN-M, or looked up in a table on the device, in host memory or on disk."""
FREE_SHARE = 0.9
"""Of free memory, what is used where no budget is given for it: a plan does not see everything."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A model, the source of its rows, and what they take."""

    model: Transformer
    row_source: RowSource | None
    """None when the model computes its rows, or has none."""
    rows: RowPlace
    weight_bytes: int
    """Bytes of the weights that were loaded."""
    table_bytes: int
    """Bytes of rows in memory, on device or host."""
    tier: RowTier | None
    """Behind `row_source`; `HotRows` where the placement has hot rows."""
    placement: Placement | None
    """What was planned; None where no budget was given."""

    def engine(
        self, *, max_sequences: int = 1, max_length: int | None = None, prefill_chunk: int = PREFILL_TOKENS
    ) -> Engine:
        """An engine for this model: captured decoding where it runs on a GPU and looks rows up, or has none.

        Raises:
            ValueError: a size is impossible.
        """
        learn = 0
        if self.placement is not None and self.placement.store is not None and self.placement.store.counts is None:
            learn = self.placement.hot_rows
        return engine_of(
            self.model,
            self.tier,
            learn=learn,
            max_sequences=max_sequences,
            max_length=max_length,
            prefill_chunk=prefill_chunk,
        )

    def describe(self) -> str:
        """One line: what is in memory."""
        text = f"{self.weight_bytes / 1e6:,.2f} MB of weights on {self.model.device}"
        if self.row_source is None:
            return text
        where = (
            f"{self.table_bytes / 1e6:,.2f} MB of rows in {self.rows} memory" if self.table_bytes else "rows on disk"
        )
        return f"{text} (FFN weights that rows replace were not loaded), {where}"


def can_capture(model: Transformer, tier: RowTier | None) -> bool:
    """Whether decode steps can be CUDA graphs: on a GPU, with rows that are looked up, or none."""
    return model.device.type == "cuda" and (tier is not None or not model.config.has_memory)


def engine_of(
    model: Transformer,
    tier: RowTier | None,
    *,
    learn: int = 0,
    forced: Int[Tensor, "S C"] | None = None,
    max_sequences: int = 1,
    max_length: int | None = None,
    prefill_chunk: int = PREFILL_TOKENS,
) -> Engine:
    """An engine for `model` with rows from `tier`; `learn` and `forced`, of captured steps only, as in `GraphDecoder`.

    Raises:
        ValueError: a size is impossible.
    """
    decoder = None
    if can_capture(model, tier):
        from flexmemory.engine.graph import GraphDecoder  # Triton is there where a GPU is

        decoder = partial(GraphDecoder, model, tier=tier, learn=learn, forced=forced)
    return Engine(
        model,
        row_source=_row_source(model, tier),
        max_sequences=max_sequences,
        max_length=max_length,
        prefill_chunk=prefill_chunk,
        decoder=decoder,
    )


def _row_source(model: Transformer, tier: RowTier | None) -> RowSource | None:
    return None if tier is None else partial(lookup, tier, dtype=model.dtype, device=model.device)


def load_model(
    checkpoint: Checkpoint,
    *,
    tol: str | Path | None = None,
    rows: RowPlace | None = None,
    keep_layers: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    int8: Int8Part | None = None,
    memory_budget: int | None = None,
    host_budget: int | None = None,
    sequences: int = 1,
    length: int | None = None,
) -> LoadedModel:
    """Load a model to generate or evaluate with.

    Args:
        checkpoint: Its weights.
        tol: A ToL store built from them; with it, memory weights are not read.
        rows: Where rows come from; by default `disk` with a store and `compute` without. Within a budget, as near as
            they fit (`engine/placement.py`).
        keep_layers: Layers of each row to read, the first ones in the store's order; the others add nothing.
        device: Where the model runs.
        dtype: Of the weights and of computation; as stored by default.
        int8: Weights to make int8.
        memory_budget: Bytes of the device's memory to use; by default, where the other budget is given, nine tenths of
            what is free.
        host_budget: Bytes of host memory to use beside a GPU, with the same default.
        sequences: Sequences at once that a budget has to allow for.
        length: Their longest length; by default the model's.

    Raises:
        ValueError: `rows` and `tol` do not go together, the store is not of this checkpoint, or a budget is too small.
    """
    chosen = rows or ("compute" if tol is None else "disk")
    if chosen not in get_args(RowPlace):
        raise ValueError(f"rows must be one of {', '.join(get_args(RowPlace))}, got {chosen!r}")
    if (chosen == "compute") != (tol is None):
        needs = "a ToL store (--tol DIR)" if tol is None else "no ToL store: leave out --tol, or the rows option"
        raise ValueError(f"rows from {chosen!r} need {needs}")
    if tol is not None and not checkpoint.config.has_memory:
        raise ValueError(f"{checkpoint.path} is a dense model: it has no rows to look up; leave out the ToL store")
    if keep_layers is not None and tol is None:
        raise ValueError("layers of rows can be left out where rows are looked up: give a ToL store (--tol DIR)")
    # Refuse before loading weights.
    store = None if tol is None else ToLStore.open(tol, checkpoint=checkpoint, keep_layers=keep_layers)
    placement = None
    if memory_budget is not None or host_budget is not None:
        placement = place(
            checkpoint.config,
            budget=_budget(torch.device(device), memory_budget, host_budget),
            dtype=dtype or checkpoint.stored_dtype(),
            store=None if store is None else store_facts(store),
            rows=None if rows in (None, "compute") else rows,
            int8=int8,
            sequences=sequences,
            length=length,
        )
        chosen = placement.rows or chosen
    carried = store is not None and store.embedding
    model = checkpoint.load(memory=store is None, embedding=not carried, device=device, dtype=dtype)
    if int8 is not None:
        quantize(model, int8)
    tier, table_bytes = None, 0
    if store is not None:
        assert chosen != "compute"
        tier, table_bytes = _open_tier(
            store, chosen, device=model.device, hot_rows=placement.hot_rows if placement else 0
        )
    return LoadedModel(
        model=model,
        row_source=_row_source(model, tier),
        rows=chosen,
        weight_bytes=sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        table_bytes=table_bytes,
        tier=tier,
        placement=placement,
    )


def store_facts(store: ToLStore) -> StoreFacts:
    """What a placement needs to know of a store.

    Raises:
        ValueError: its counts are damaged.
    """
    coded = None
    if not store.plain:
        index = RowIndex(store)
        decoder = gpu_bytes(store.bands, store.tensors, hidden_size=store.hidden_size)
        coded = CodedFacts(
            row_bytes=store.row_bytes,
            table_bytes=index.nbytes,
            decoder_bytes=decoder + index.offset.nbytes + index.band.nbytes,
        )
    return StoreFacts(
        row_bytes=store.num_slices * store.hidden_size * store.decoded_dtype.itemsize,
        disk_bytes=store.nbytes,
        vocab_size=store.vocab_size,
        embedding=store.embedding,
        counts=store.counts(),
        coded=coded,
    )


def _budget(device: torch.device, memory: int | None, host: int | None) -> Budget:
    if device.type == "cpu" and host is not None:
        raise ValueError("on a CPU there is one memory: give a memory budget and no host budget")
    if memory is None:
        memory = int(FREE_SHARE * free_memory(device))
    if device.type != "cpu" and host is None:
        host = int(FREE_SHARE * free_memory(torch.device("cpu")))
    return Budget(device=memory, host=host)


def _open_tier(store: ToLStore, where: Where, *, device: torch.device, hot_rows: int) -> tuple[RowTier, int]:
    """The rows and their bytes in memory, behind a hot set: empty, to be learnt, where there are no counts."""
    tier = open_rows(store, where, device=device)
    table_bytes = 0 if isinstance(tier, DiskRows) else tier.nbytes
    if not hot_rows:
        return tier, table_bytes
    known = store.manifest.counts is not None
    ids = store.hot_ids(hot_rows) if known else torch.empty(0, dtype=torch.int64)
    hot = HotSet.load(tier, ids, device=device)
    return HotRows(tier, hot), table_bytes + hot.nbytes
