"""The index on disk: what `manifest.json` says, and the arrays beside it (docs/index-format.md).

    INDEX/
      manifest.json                          `Manifest`; written last
      token_keys_idx.npy, key_stats.npy ...  `array_specs`
      tokens.parquet, keys.parquet           for people and other tools
      layers.json, clusters.json

Dimension key: V vocabulary, L layers of the index, K cells, C layers that are clustered.
"""

from __future__ import annotations

import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import numpy as np

from flexmemory.storage import read_json

FORMAT = "flexmemory-index"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LAYERS = "layers.json"
CLUSTERS = "clusters.json"
TOKENS = "tokens.parquet"
KEYS = "keys.parquet"

STATS = ("mean", "std", "min", "max", "kurtosis", "active", "entropy", "value_norm")
"""Columns of `key_stats`."""
ACTIVE_SHARE = 0.01
"""A cell is active on a token where |c| is above this share of the layer's largest |c|."""
BINS = 64
NO_CLUSTER = 65_535
"""The label of tokens that the mask leaves out."""
NOWHERE = 65_535
"""Both coordinates, on a map, of tokens that the mask leaves out."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Keep:
    """How long lists are."""

    keys: int = 16
    """Cells of each token, both signs together."""
    tokens: int = 32
    """Tokens of each cell, on either side."""
    logits: int = 16
    """Tokens that each value promotes, and suppresses."""
    neighbors: int = 8
    """Nearest tokens of each token."""

    def __post_init__(self) -> None:
        """Reject empty lists."""
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"keep.{field.name} must be at least 1, got {getattr(self, field.name)}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """What an index holds; it says the shape of every array."""

    vocab_size: int
    num_keys: int
    layers: tuple[int, ...]
    kept_tokens: int
    """Tokens that the mask does not leave out."""
    keep: Keep
    neighbors: bool
    clusters: int
    """Clusters of a layer; 0 for none."""
    cluster_layers: tuple[int, ...]
    spaces: tuple[str, ...]
    """Maps: `layer0` and such, `embedding`."""


@dataclasses.dataclass(frozen=True, slots=True)
class ArraySpec:
    """An array in a .npy file, in C order."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        header = io.BytesIO()
        descr = np.lib.format.dtype_to_descr(np.dtype(self.dtype))
        np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": self.shape})
        return len(header.getvalue()) + math.prod(self.shape) * np.dtype(self.dtype).itemsize


def array_specs(contents: Contents) -> dict[str, ArraySpec]:
    """Every array of an index. Lists are shorter than asked for where there are fewer tokens or cells."""
    vocab, cells, layers, keep = contents.vocab_size, contents.num_keys, len(contents.layers), contents.keep
    key_id = "uint16" if cells <= NO_CLUSTER else "uint32"
    specs = {
        **_list("token_keys", (vocab, layers, min(keep.keys, cells)), key_id),
        "row_norms": ArraySpec((vocab, layers), "float16"),
    }
    for name, count in (("key_tokens", keep.tokens), ("value_logits", keep.logits)):
        for side in ("pos", "neg"):
            specs |= _list(f"{name}_{side}", (layers, cells, min(count, contents.kept_tokens)), "uint32")
    specs["key_stats"] = ArraySpec((layers, cells, len(STATS)), "float32")
    specs["key_hist"] = ArraySpec((layers, cells, BINS), "uint32")
    specs["key_hist_edges"] = ArraySpec((layers, cells, 2), "float32")
    if contents.neighbors:
        nearest = min(keep.neighbors, contents.kept_tokens - 1)
        for name in ("neighbors", "embedding_neighbors"):
            specs |= _list(name, (vocab, nearest), "uint32")
    if contents.clusters:
        specs["cluster_labels"] = ArraySpec((len(contents.cluster_layers), vocab), "uint16")
    for space in contents.spaces:
        specs[f"map_{space}"] = ArraySpec((vocab, 2), "uint16")
    return specs


def _list(name: str, shape: tuple[int, ...], ids: str) -> dict[str, ArraySpec]:
    return {f"{name}_idx": ArraySpec(shape, ids), f"{name}_val": ArraySpec(shape, "float16")}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Mask:
    """Which tokens statements are about."""

    rule: str
    """Which are left out, in words."""
    tokens: int
    """How many are left in."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CountsEntry:
    """The text whose tokens were counted."""

    source: str
    total: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What `manifest.json` says."""

    checkpoint_fingerprint: str
    tokenizer_fingerprint: str
    """Empty where the checkpoint has no tokenizer."""
    config: dict[str, Any]
    """The model's."""
    scope: str
    """What statements about tokens hold for (`TokenMemory.scope`)."""
    layers: tuple[int, ...]
    """The model's layers that arrays hold, in their order."""
    cluster_layers: tuple[int, ...]
    """Those of `cluster_labels`."""
    counts: CountsEntry | None
    mask: Mask
    keep: Keep
    seeds: dict[str, int]
    arrays: dict[str, dict[str, Any]]
    """`shape`, `dtype` and `sha256` (of the file) of each array."""
    files: dict[str, dict[str, Any]]
    """`bytes` and `sha256` of every other file."""
    flexmemory: str
    """Version that wrote it."""

    def spec(self, name: str) -> ArraySpec:
        """Shape and dtype of an array."""
        entry = self.arrays[name]
        return ArraySpec(tuple(entry["shape"]), entry["dtype"])

    def to_json(self) -> dict[str, Any]:
        """The content of the file."""
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of an index.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, of something else, or of a newer format.
        """
        if not (folder / MANIFEST).is_file():
            raise FileNotFoundError(_why_absent(folder))
        values = read_json(folder / MANIFEST)
        if values.pop("format", None) != FORMAT:
            raise ValueError(f"{folder} is not an index: its {MANIFEST} is of something else")
        version = values.pop("format_version", None)
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise ValueError(
                f"{folder} has index format {version}; this version reads up to {FORMAT_VERSION}: update flexmemory"
            )
        try:
            values["layers"], values["cluster_layers"] = tuple(values["layers"]), tuple(values["cluster_layers"])
            values["mask"], values["keep"] = Mask(**values["mask"]), Keep(**values["keep"])
            values["counts"] = None if values["counts"] is None else CountsEntry(**values["counts"])
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{folder / MANIFEST} is damaged ({error}); build the index again") from error


def partial_folder(folder: Path) -> Path:
    """Where an index is built until it is whole."""
    return folder.with_name(f"{folder.name}.partial")


def _why_absent(folder: Path) -> str:
    if partial_folder(folder).is_dir():
        return f"{folder} is not whole yet, see {partial_folder(folder).name}: run the same `flexmemory index` again"
    if folder.is_dir():
        return f"{folder} has no {MANIFEST}: it is not an index, or not a whole one"
    return f"{folder} does not exist; expected a folder written by `flexmemory index`"
