"""What the explorer shows of an index: one record a token, a key, a layer; the same for a live server and an export.

Records hold ids and numbers; texts of tokens are sent once, for the whole vocabulary. Arrays that a page needs whole
(maps, cluster labels, norms, statistics of keys) are raw little-endian bytes. Dimension key: V vocabulary, L layers,
K keys.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from flexmemory.interpret.index_format import NO_CLUSTER, STATS
from flexmemory.interpret.reader import MemoryIndex

QUANTILES = (0, 5, 25, 50, 75, 95, 100)
"""Of a layer's row norms, in percent."""
Pairs = list[list[Any]]
"""[[id, number], ...]"""
LISTED = 8
"""Keys and tokens that stick out, of a layer."""


class Records:
    """Reads an index for the page."""

    def __init__(self, index: MemoryIndex) -> None:
        """Show `index`."""
        self.index = index

    def meta(self) -> dict[str, Any]:
        """What the page must know before anything else."""
        index, manifest = self.index, self.index.manifest
        return {
            "fingerprint": manifest.checkpoint_fingerprint,
            "config": manifest.config,
            "flexmemory": manifest.flexmemory,
            "scope": manifest.scope,
            "vocab_size": index.vocab_size,
            "layers": list(index.layers),
            "num_keys": index.num_keys,
            "mask": dataclasses.asdict(manifest.mask),
            "counts": None if manifest.counts is None else dataclasses.asdict(manifest.counts),
            "spaces": sorted(index.spaces),
            "cluster_layers": list(manifest.cluster_layers),
            "statistics": list(STATS),
            "no_cluster": NO_CLUSTER,
        }

    def tokens(self) -> dict[str, Any]:
        """Every token's text for reading, its kind, whether the mask keeps it, and its count."""
        table = self.index.tokens
        kinds = sorted(set(table["kind"]))
        place = {kind: i for i, kind in enumerate(kinds)}
        return {
            "shown": list(table["shown"]),
            "kinds": kinds,
            "kind": [place[kind] for kind in table["kind"]],
            "kept": "".join("01"[bool(kept)] for kept in table["kept"]),
            "counts": None if table["count"][0] is None else list(table["count"]),
        }

    def token(self, token_id: int) -> dict[str, Any]:
        """What the index says of one token.

        Raises:
            ValueError: there is no such token.
        """
        index, table = self.index, self.index.tokens
        norms = index.row_norms(token_id)
        keys = index.array("token_keys_idx")[token_id].astype(np.int64)  # (L, T)
        coefficients = index.array("token_keys_val")[token_id].astype(np.float32)
        weights = np.abs(coefficients) * np.take_along_axis(self._value_norms, keys, axis=1)
        return {
            "id": token_id,
            "bytes": table["bytes"][token_id].hex(" "),
            "reachable": table["reachable"][token_id],
            "undertrained": table["undertrained"][token_id],
            "norms": rounded(norms),
            "keys": [
                [list(cell) for cell in zip(*row, strict=True)]
                for row in zip(keys.tolist(), rounded(coefficients), rounded(weights), strict=True)
            ],
            "near": self._pairs("neighbors", token_id),
            "near_embedding": self._pairs("embedding_neighbors", token_id),
            "clusters": {str(layer): index.cluster(token_id, layer=layer) for layer in index.manifest.cluster_layers},
        }

    def key(self, layer: int, key: int) -> dict[str, Any]:
        """What the index says of one key and its value.

        Raises:
            ValueError: there is no such key.
        """
        facts = self.index.key(layer=layer, key=key)
        at = (self.index.place(layer), key)
        return {
            "layer": layer,
            "key": key,
            "positive": self._pairs("key_tokens_pos", at),
            "negative": self._pairs("key_tokens_neg", at),
            "promoted": self._pairs("value_logits_pos", at),
            "suppressed": self._pairs("value_logits_neg", at),
            "statistics": rounded(list(facts.stats.values())),
            "histogram": facts.histogram.tolist(),
            "edges": rounded(facts.edges, digits=6),
        }

    def layers(self) -> dict[str, Any]:
        """Quantiles of row norms, extremes of keys, and what was measured, by layer."""
        kept = np.flatnonzero(self.index.tokens["kept"])
        layers = []
        for place, layer in enumerate(self.index.layers):
            column = dict(zip(STATS, np.asarray(self.index.array("key_stats")[place]).T, strict=True))
            norms = self.index.array("row_norms")[kept, place].astype(np.float32)
            largest = np.maximum(column["max"], -column["min"])
            longest, extreme = np.argsort(-norms)[:LISTED], np.argsort(-largest)[:LISTED]
            layers.append({
                "layer": layer,
                "norms": rounded(np.percentile(norms, QUANTILES)),
                "longest": pairs(kept[longest], norms[longest]),
                "extreme": pairs(extreme, largest[extreme]),
                "kurtosis": rounded(np.percentile(column["kurtosis"], (50, 95, 100))),
                "active": rounded(np.percentile(column["active"], (5, 50, 95))),
            })  # fmt: skip
        return {"quantiles": list(QUANTILES), "layers": layers, "facts": self.index.layer_facts}

    def clusters(self) -> dict[str, Any]:
        """Of each layer that is clustered (as text) its clusters, in the order of their labels."""
        return self.index.clusters

    def binary(self, kind: str, name: str) -> bytes:
        """An array as bytes: `map` (V, 2) and `labels` (V,) of uint16, `norms` (V,) and `keys` (K, 8) of float32.

        Raises:
            ValueError: there is none of that name.
        """
        match kind:
            case "map" if name in self.index.spaces:
                found = np.asarray(self.index.array(f"map_{name}"), dtype="<u2")
            case "labels" if name.isdecimal():
                found = np.asarray(self.index.labels(int(name)), dtype="<u2")
            case "norms" if name.isdecimal():
                found = np.asarray(self.index.array("row_norms")[:, self.index.place(int(name))], dtype="<f4")
            case "keys" if name.isdecimal():
                found = np.asarray(self.index.array("key_stats")[self.index.place(int(name))], dtype="<f4")
            case _:
                raise ValueError(f"there is no array {kind}/{name}")
        return found.tobytes()

    @functools.cached_property
    def _value_norms(self) -> np.ndarray:
        return np.ascontiguousarray(self.index.array("key_stats")[..., STATS.index("value_norm")])

    def _pairs(self, name: str, at: Any) -> Pairs:
        """A list of the index; empty where it was built without."""
        if f"{name}_idx" not in self.index.names:
            return []
        return pairs(self.index.array(f"{name}_idx")[at], self.index.array(f"{name}_val")[at])


def pairs(ids: np.ndarray, numbers: np.ndarray) -> Pairs:
    """[[id, number], ...]."""
    return [[place, number] for place, number in zip(ids.tolist(), rounded(numbers), strict=True)]


def rounded(numbers: np.ndarray | Sequence[float], *, digits: int = 4) -> list[Any]:
    """Nested lists of numbers of `digits` significant digits, short as JSON; what is not finite is None."""
    array = np.asarray(numbers, dtype=np.float64)
    flat = [float(f"{number:.{digits}g}") if math.isfinite(number) else None for number in array.ravel().tolist()]
    return np.array(flat, dtype=object).reshape(array.shape).tolist()


def to_json(value: Any) -> bytes:
    """Compact JSON; NaN is a mistake."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
