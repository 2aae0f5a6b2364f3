"""What needs the whole package: rows from a ToL store, and folders that are checkpoints of this package too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from huggingface_hub import snapshot_download
from torch import Tensor

from flexmemory.hf.modeling_flex_memory import FlexMemoryModel
from flexmemory.model.checkpoint import ROWS, WEIGHTS, Checkpoint, given_rows, save_tensors, seal
from flexmemory.model.memory import Rows
from flexmemory.tokenizer import Tokenizer
from flexmemory.tol import tiers
from flexmemory.tol.store import ToLStore


@dataclasses.dataclass(frozen=True, slots=True)
class LookedUpRows:
    """A store that is of the checkpoint at hand, and where its rows are to be kept."""

    store: ToLStore
    where: tiers.Where

    @property
    def embedding(self) -> bool:
        """Whether a row begins with the token's input embedding."""
        return self.store.embedding

    def source(self, model: FlexMemoryModel) -> Callable[[Tensor], Rows]:
        """Looks rows up for `model`, in its dtype and on its device, wherever it is moved.

        Raises:
            OSError: a file cannot be read.
            ValueError: the store is damaged.
        """
        tier = tiers.open_rows(self.store, self.where, device=model.core.device)
        return lambda token_ids: tiers.lookup(tier, token_ids, dtype=model.core.dtype, device=model.core.device)


def open_rows(checkpoint: str | Path, tol: str | Path, *, rows: Any) -> LookedUpRows:
    """Open the ToL store `tol` for `checkpoint`, a folder or a name on the Hub. Rows are not read yet.

    Raises:
        FileNotFoundError: there is no checkpoint, or no store.
        ToLMismatchError: the store was built from another checkpoint or tokenizer.
        ValueError: there is no place called `rows`, or the model is dense.
    """
    if rows not in get_args(tiers.Where):
        raise ValueError(f"rows must be one of {', '.join(get_args(tiers.Where))} with a ToL store, got {rows!r}")
    folder = Path(checkpoint) if Path(checkpoint).is_dir() else Path(snapshot_download(str(checkpoint)))
    opened = Checkpoint.open(folder)
    if not opened.config.has_memory:
        raise ValueError(f"{checkpoint} is a dense model: it has no rows to look up; leave out tol")
    return LookedUpRows(ToLStore.open(tol, checkpoint=opened), rows)


def seal_checkpoint(folder: Path, model: FlexMemoryModel) -> None:
    """Make a folder that transformers wrote one of this package's checkpoints, where its weights are in one file.

    Rows that are given in `model`, which was saved there, are written beside the weights.
    """
    if rows := given_rows(model.core):
        save_tensors(rows, folder / ROWS)
    if (folder / WEIGHTS).is_file():
        tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None
        seal(folder, tokenizer, names={WEIGHTS, ROWS, "config.json", "tokenizer.json", "tokenizer_config.json"})
