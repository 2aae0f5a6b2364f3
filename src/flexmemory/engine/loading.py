"""A model and its rows, ready to run: from FFN weights, or from a ToL store with those weights left on disk."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch

from flexmemory.engine.reference import RowSource
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.model.transformer import Transformer
from flexmemory.tol.store import ToLStore
from flexmemory.tol.tiers import DiskRows, lookup, open_rows

RowPlace = Literal["compute", "device", "host", "disk"]
"""Where rows come from: computed by FFN-M, or looked up in a table on the device, in host memory or on disk."""
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

    def describe(self) -> str:
        """One line: what is in memory."""
        text = f"{self.weight_bytes / 1e6:,.2f} MB of weights on {self.model.device}"
        if self.row_source is None:
            return text
        where = (
            f"{self.table_bytes / 1e6:,.2f} MB of rows in {self.rows} memory" if self.table_bytes else "rows on disk"
        )
        return f"{text} (FFN weights that rows replace were not loaded), {where}"


def load_model(
    checkpoint: Checkpoint,
    *,
    tol: str | Path | None = None,
    rows: RowPlace | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> LoadedModel:
    """Load a model to generate or evaluate with.

    Args:
        checkpoint: Its weights.
        tol: A ToL store built from them; with it, memory weights are not read.
        rows: Where rows come from; by default `disk` with a store and `compute` without.
        device: Where the model runs.
        dtype: Of the weights and of computation; as stored by default.

    Raises:
        ValueError: `rows` and `tol` do not go together, or the store is not of this checkpoint.
    """
    place = rows or ("compute" if tol is None else "disk")
    if place not in get_args(RowPlace):
        raise ValueError(f"rows must be one of {', '.join(get_args(RowPlace))}, got {place!r}")
    if (place == "compute") != (tol is None):
        needs = "a ToL store (--tol DIR)" if tol is None else "no ToL store: leave out --tol, or the rows option"
        raise ValueError(f"rows from {place!r} need {needs}")
    if tol is not None and not checkpoint.config.has_memory:
        raise ValueError(f"{checkpoint.path} is a dense model: it has no rows to look up; leave out the ToL store")
    store = None if tol is None else ToLStore.open(tol, checkpoint=checkpoint)  # refuse before loading weights
    carried = store is not None and store.embedding
    model = checkpoint.load(memory=store is None, embedding=not carried, device=device, dtype=dtype)
    weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
    source, table_bytes = (None, 0) if store is None else _looked_up(store, model, place)
    return LoadedModel(model=model, row_source=source, rows=place, weight_bytes=weight_bytes, table_bytes=table_bytes)


def _looked_up(store: ToLStore, model: Transformer, where: RowPlace) -> tuple[RowSource, int]:
    assert where != "compute"
    tier = open_rows(store, where, device=model.device)
    table_bytes = 0 if isinstance(tier, DiskRows) else tier.table.nbytes
    return partial(lookup, tier, dtype=model.dtype, device=model.device), table_bytes
