"""A store in another codec from a store that is there, without the checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from flexmemory.tol.build import CHUNK_TOKENS, write_store
from flexmemory.tol.codec import CODECS as PLAIN_CODECS
from flexmemory.tol.disk import DiskRows
from flexmemory.tol.fit import fit
from flexmemory.tol.layout import layout_of
from flexmemory.tol.store import ToLStore


class StoreRows:
    """Rows read from a store, in the places that `tol.build.RowSource` gives them."""

    def __init__(self, store: ToLStore) -> None:
        """Read from `store`; what it does not hold is zero."""
        self._rows = DiskRows(store)
        self._places = [1 + layer for layer in store.layers]
        self._embedding = store.embedding
        self._slices = 1 + store.manifest.num_layers

    def __call__(self, token_ids: Int64[Tensor, " U"]) -> Float[Tensor, "U P D"]:
        """As `tol.build.RowSource`."""
        held = torch.empty((len(token_ids), self._rows.num_slices, self._rows.hidden_size), dtype=self._rows.dtype)
        self._rows.gather(token_ids, held)
        rows = torch.zeros((len(token_ids), self._slices, self._rows.hidden_size))
        rows[:, ([0] if self._embedding else []) + self._places] = held.float()
        return rows


def requantize(
    store: ToLStore,
    out: Path,
    *,
    codec: str,
    layers: Sequence[int] | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    device: torch.device | str = "cpu",
) -> ToLStore:
    """Write the rows of `store` in another codec to the new folder `out`; run again, it goes on where it was.

    What the first codec lost is lost: rows are those of `store`, not of the model. Counts go along, and say which
    tokens matter most.

    Args:
        store: Rows to read.
        out: The folder to make.
        codec: How numbers are to be written.
        layers: Layers to keep, the most important first; by default those of `store`, in its order.
        chunk_tokens: Rows to hold at once, rounded down to whole blocks (at least one).
        device: Where rows are encoded.

    Raises:
        FileExistsError: `out` exists.
        OSError: a file cannot be read or written.
        ValueError: `store` lacks a layer, or there is no such codec.
    """
    if out.exists():
        raise FileExistsError(f"{out} already exists; choose another folder or remove it")
    kept = store.layers if layers is None else tuple(layers)
    missing = sorted(set(kept) - set(store.layers))
    if missing:
        raise ValueError(f"{store.path} holds layers {list(store.layers)}; it lacks {missing}")
    source, counts = StoreRows(store), store.counts()
    scheme = None
    if codec not in PLAIN_CODECS:
        scheme = fit(
            codec,
            source,
            vocab_size=store.vocab_size,
            hidden_size=store.hidden_size,
            layers=kept,
            embedding=store.embedding,
            counts=counts,
            device=device,
        )
    manifest = layout_of(
        vocab_size=store.vocab_size,
        hidden_size=store.hidden_size,
        num_layers=store.manifest.num_layers,
        codec=codec,
        embedding=store.embedding,
        layers=kept,
        scheme=scheme,
    )
    manifest = dataclasses.replace(
        manifest,
        checkpoint_fingerprint=store.manifest.checkpoint_fingerprint,
        tokenizer_fingerprint=store.manifest.tokenizer_fingerprint,
        edits=store.manifest.edits,
    )
    write_store(out, manifest, source, scheme=scheme, counts=counts, chunk_tokens=chunk_tokens, device=device)
    return ToLStore.open(out)
