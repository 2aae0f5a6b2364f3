"""The tables of an index as Parquet, for people and other tools: tokens, and cells with their statistics.

pyarrow (`flexmemory[interpret]`) is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Float32

from flexmemory.interpret.index_format import STATS
from flexmemory.interpret.vocabulary import Vocabulary


def require_pyarrow() -> ModuleType:
    """The library.

    Raises:
        ImportError: it is not installed; the sentence says what to install.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "tables are written and read with pyarrow, which is not installed; pip install 'flexmemory[interpret]'"
        ) from error
    return pyarrow


def write_tokens(path: Path, vocabulary: Vocabulary) -> None:
    """One line a token: id, text, shown, bytes, kind, count (null if none were counted), flags."""
    pyarrow = require_pyarrow()
    counts = [None] * len(vocabulary) if vocabulary.counts is None else vocabulary.counts.tolist()
    columns = {
        "id": pyarrow.array(range(len(vocabulary)), pyarrow.uint32()),
        "text": pyarrow.array(vocabulary.text, pyarrow.string()),
        "shown": pyarrow.array(vocabulary.shown, pyarrow.string()),
        "bytes": pyarrow.array(vocabulary.raw, pyarrow.binary()),
        "kind": pyarrow.array(vocabulary.kind, pyarrow.string()),
        "count": pyarrow.array(counts, pyarrow.int64()),
        "reachable": pyarrow.array(vocabulary.reachable.tolist(), pyarrow.bool_()),
        "undertrained": pyarrow.array(vocabulary.undertrained.tolist(), pyarrow.bool_()),
        "kept": pyarrow.array(vocabulary.mask.tolist(), pyarrow.bool_()),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def write_keys(path: Path, *, layers: Sequence[int], stats: Float32[np.ndarray, "L K 8"]) -> None:
    """One line a cell: layer, key, and `index_format.STATS`."""
    pyarrow = require_pyarrow()
    cells = stats.shape[1]
    columns = {
        "layer": pyarrow.array(np.repeat(np.array(layers, np.uint16), cells)),
        "key": pyarrow.array(np.tile(np.arange(cells, dtype=np.uint32), len(layers))),
        **{name: pyarrow.array(stats[..., place].reshape(-1)) for place, name in enumerate(STATS)},
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def read_columns(path: Path) -> dict[str, list[Any]]:
    """A table, column by column.

    Raises:
        ValueError: the file is damaged.
    """
    pyarrow = require_pyarrow()
    try:
        return pyarrow.parquet.read_table(path).to_pydict()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read ({error}); it is damaged: build the index again") from error
