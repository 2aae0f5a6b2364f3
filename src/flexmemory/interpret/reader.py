"""Read an index (docs/index-format.md): arrays are mapped, a lookup reads what it gives and no more.

Lists are exact over the tokens that `manifest.mask` speaks of; numbers are rounded to fp16 as stored.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt16

from flexmemory.interpret.index_format import CLUSTERS, LAYERS, NO_CLUSTER, STATS, TOKENS, ArraySpec, Manifest
from flexmemory.interpret.tables import read_columns
from flexmemory.interpret.tkv import Cell, Sign
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.storage import read_json, sha256_file

Tokens = list[tuple[int, float]]
"""(token id, number), the most extreme first."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class KeyFacts:
    """What coefficients of a cell are like over tokens."""

    layer: int
    key: int
    stats: dict[str, float]
    """By the names of `index_format.STATS`."""
    histogram: Int[np.ndarray, " bins"]
    """Tokens in equal bins from the smallest coefficient to the largest."""
    edges: tuple[float, float]
    """Those two."""


class MemoryIndex:
    """An index on disk, opened and found whole."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """See `open`."""
        self.path, self.manifest = path, manifest
        self.layers = manifest.layers
        shape = manifest.spec("key_stats").shape
        self.vocab_size, self.num_keys = manifest.spec("row_norms").shape[0], shape[1]
        self._place = {layer: place for place, layer in enumerate(manifest.layers)}
        self._arrays = {name: _mapped(path, name, manifest.spec(name)) for name in manifest.arrays}

    @classmethod
    def open(cls, folder: str | Path, *, checkpoint: Checkpoint | None = None) -> MemoryIndex:
        """Open an index; given a checkpoint, only if it is of that one.

        Raises:
            FileNotFoundError: there is no index at `folder`, or not a whole one.
            ValueError: it is incomplete or damaged, of another checkpoint or tokenizer, or of a newer format.
        """
        path = Path(folder)
        manifest = Manifest.read(path)
        if checkpoint is not None:
            for what in ("checkpoint", "tokenizer"):
                ours = getattr(manifest, f"{what}_fingerprint")
                theirs = checkpoint.fingerprint if what == "checkpoint" else checkpoint.tokenizer_fingerprint
                if ours != theirs:
                    raise ValueError(
                        f"{path} is of another {what} ({ours[:12] or 'none'}) than {checkpoint.path} has "
                        f"({theirs[:12] or 'none'}); index that one: flexmemory index {checkpoint.path} --out DIR"
                    )
        for name, entry in manifest.files.items():
            _check_size(path / name, entry["bytes"])
        try:
            return cls(path, manifest)
        except KeyError as error:
            raise ValueError(f"{path} is damaged: its manifest lacks {error}; build the index again") from error

    def verify(self) -> None:
        """Check every file against its recorded SHA-256.

        Raises:
            ValueError: a file differs.
        """
        recorded = {f"{name}.npy": entry for name, entry in self.manifest.arrays.items()} | self.manifest.files
        for name, entry in recorded.items():
            if sha256_file(self.path / name) != entry["sha256"]:
                raise ValueError(f"{self.path} is damaged: {name} does not match its checksum; build the index again")

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays and tables."""
        arrays = sum(self.manifest.spec(name).file_bytes for name in self._arrays)
        return arrays + sum(entry["bytes"] for entry in self.manifest.files.values())

    @property
    def names(self) -> tuple[str, ...]:
        """Arrays that are there."""
        return tuple(self._arrays)

    def array(self, name: str) -> np.ndarray:
        """An array, mapped and read-only.

        Raises:
            ValueError: the index does not hold it.
        """
        if name not in self._arrays:
            raise ValueError(f"{self.path} does not hold {name}; index again without leaving it out")
        return self._arrays[name]

    def place(self, layer: int) -> int:
        """Where a layer of the model is in arrays.

        Raises:
            ValueError: it is not in the index.
        """
        if layer not in self._place:
            raise ValueError(f"layer {layer} is not in the index, which has {' '.join(map(str, self.layers))}")
        return self._place[layer]

    def top_keys(self, token_id: int, *, layer: int, sign: Sign | None = None) -> list[Cell]:
        """The cells that matter most to a token's row, as `TokenMemory.top_keys`.

        With a `sign`, those of the list that have it: it may be short.

        Raises:
            ValueError: layer or token do not exist.
        """
        at = (self._token(token_id), self.place(layer))
        keys = self.array("token_keys_idx")[at].tolist()
        coefficients = self.array("token_keys_val")[at].tolist()
        norms = self.array("key_stats")[at[1], keys, STATS.index("value_norm")].tolist()
        return [
            Cell(layer, key, coefficient, abs(coefficient) * norm)
            for key, coefficient, norm in zip(keys, coefficients, norms, strict=True)
            if sign is None or sign * coefficient > 0
        ]

    def top_tokens(self, *, layer: int, key: int, sign: Sign = 1) -> Tokens:
        """The tokens with the largest (`sign` 1) or smallest coefficients of a cell.

        Raises:
            ValueError: layer or key do not exist.
        """
        return self._list(f"key_tokens_{_side(sign)}", self._key(layer, key))

    def value_tokens(self, *, layer: int, key: int, sign: Sign = 1) -> Tokens:
        """The tokens that a value promotes (`sign` 1) or suppresses most, by the logits of `TokenMemory.project`.

        Raises:
            ValueError: layer or key do not exist.
        """
        return self._list(f"value_logits_{_side(sign)}", self._key(layer, key))

    def neighbors(self, token_id: int, *, embedding: bool = False) -> Tokens:
        """The nearest tokens by cosine: of coefficients in the index's first layer, or of embeddings.

        Raises:
            ValueError: the token does not exist, or the index was built without neighbours.
        """
        return self._list("embedding_neighbors" if embedding else "neighbors", self._token(token_id))

    def key(self, *, layer: int, key: int) -> KeyFacts:
        """Statistics of a cell.

        Raises:
            ValueError: layer or key do not exist.
        """
        at = self._key(layer, key)
        low, high = self.array("key_hist_edges")[at].tolist()
        return KeyFacts(
            layer=layer,
            key=key,
            stats=dict(zip(STATS, self.array("key_stats")[at].tolist(), strict=True)),
            histogram=self.array("key_hist")[at].astype(np.int64),
            edges=(low, high),
        )

    def row_norms(self, token_id: int) -> Float[np.ndarray, " L"]:
        """Lengths of a token's rows, in the order of `layers`.

        Raises:
            ValueError: the token does not exist.
        """
        return self.array("row_norms")[self._token(token_id)].astype(np.float32)

    def labels(self, layer: int) -> UInt16[np.ndarray, " V"]:
        """The cluster of every token in a layer; `NO_CLUSTER` where the mask leaves it out.

        Raises:
            ValueError: that layer is not clustered.
        """
        if layer not in self.manifest.cluster_layers:
            layers = " ".join(map(str, self.manifest.cluster_layers)) or "none"
            raise ValueError(f"tokens are not clustered in layer {layer}; layers with clusters: {layers}")
        return self.array("cluster_labels")[self.manifest.cluster_layers.index(layer)]

    def cluster(self, token_id: int, *, layer: int) -> int | None:
        """A token's cluster in a layer, None where the mask leaves it out; errors as for `labels`."""
        label = int(self.labels(layer)[self._token(token_id)])
        return None if label == NO_CLUSTER else label

    @property
    def spaces(self) -> tuple[str, ...]:
        """Names of maps."""
        return tuple(name.removeprefix("map_") for name in self._arrays if name.startswith("map_"))

    @functools.cached_property
    def clusters(self) -> dict[str, Any]:
        """`clusters.json`: of each layer (as text) its clusters, in the order of their labels."""
        return read_json(self.path / CLUSTERS)

    @functools.cached_property
    def layer_facts(self) -> list[dict[str, Any]]:
        """`layers.json`: what each layer is like."""
        return read_json(self.path / LAYERS)["layers"]

    @functools.cached_property
    def tokens(self) -> dict[str, list[Any]]:
        """`tokens.parquet`, column by column.

        Raises:
            FileNotFoundError: the index was built without tables.
            ImportError: pyarrow is not installed.
        """
        if TOKENS not in self.manifest.files:
            raise FileNotFoundError(f"{self.path} was built without {TOKENS}")
        return read_columns(self.path / TOKENS)

    def _list(self, name: str, at: Any) -> Tokens:
        ids, numbers = self.array(f"{name}_idx")[at].tolist(), self.array(f"{name}_val")[at].tolist()
        return list(zip(ids, numbers, strict=True))

    def _token(self, token_id: int) -> int:
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id} is out of range: the vocabulary has {self.vocab_size} ids")
        return token_id

    def _key(self, layer: int, key: int) -> tuple[int, int]:
        if not 0 <= key < self.num_keys:
            raise ValueError(f"key {key} is out of range: layers have keys 0 to {self.num_keys - 1}")
        return self.place(layer), key


def _side(sign: Sign) -> str:
    return "pos" if sign > 0 else "neg"


def _check_size(path: Path, expected: int) -> None:
    size = path.stat().st_size if path.is_file() else None
    if size != expected:
        found = "is missing" if size is None else f"has {size} bytes, expected {expected}"
        raise ValueError(f"index {path.parent} is incomplete: {path.name} {found}; build it again")


def _mapped(folder: Path, name: str, spec: ArraySpec) -> np.ndarray:
    path = folder / f"{name}.npy"
    _check_size(path, spec.file_bytes)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}); it is damaged: build the index again") from error
    if (array.shape, array.dtype) != (spec.shape, np.dtype(spec.dtype)):
        raise ValueError(f"{path} holds {array.dtype} {array.shape}, the manifest says {spec.dtype} {spec.shape}")
    return array
