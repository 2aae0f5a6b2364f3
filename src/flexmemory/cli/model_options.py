"""Options of the verbs that run a model: which rows, within which memory, on what."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Literal

from flexmemory.device import resolve_device
from flexmemory.engine.int8 import Int8Part
from flexmemory.engine.loading import DTYPES, LoadedModel, RowPlace, load_model
from flexmemory.engine.placement import parse_size
from flexmemory.model.checkpoint import Checkpoint

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """How a model is loaded."""

    tol: Path | None = None
    """A ToL store built from the checkpoint: rows are looked up, and FFN-M weights are never loaded."""
    rows: RowPlace | None = None
    """Where rows come from; by default as near as budgets allow, disk where none is given, compute without --tol."""
    keep_layers: int | None = None
    """Layers of each row to read, the first ones in the store's order; the others add nothing."""
    memory_budget: str | None = None
    """Memory of the device to use, such as 2GiB: decides what lives where (docs/placement.md)."""
    host_budget: str | None = None
    """Host memory to use beside a GPU."""
    int8: Int8Part | None = None
    """Weights to make int8: of the output head, or of all projections."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ..., or auto: the GPU where there is one."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the computation; auto is bf16 on a GPU and the stored dtype on a CPU."""

    def load(self, checkpoint: Checkpoint, *, sequences: int, length: int) -> LoadedModel:
        """The model, for so many sequences at once of that length, and a line in the log about what it takes.

        Raises:
            ValueError: the options do not go together, or a budget is too small.
        """
        place = resolve_device(self.device)
        name = "bf16" if self.dtype == "auto" and place.type == "cuda" else self.dtype
        loaded = load_model(
            checkpoint,
            tol=self.tol,
            rows=self.rows,
            keep_layers=self.keep_layers,
            device=place,
            dtype=DTYPES.get(name),
            int8=self.int8,
            memory_budget=None if self.memory_budget is None else parse_size(self.memory_budget),
            host_budget=None if self.host_budget is None else parse_size(self.host_budget),
            sequences=sequences,
            length=length,
        )
        if loaded.placement is not None:
            logger.info("%s", loaded.placement.table())
        logger.info("%s", loaded.describe())
        return loaded
