"""Build a ToL store: every token's rows, computed once, chunk by chunk (Sec. 2.3.2).

Work happens in `OUT.partial`, which is renamed when whole. Beside the shards it holds `progress.jsonl`: what is being
built, then one line of checksums per chunk, each written when the chunk is safe on disk. A build that was interrupted
goes on after the last of them and ends with the bytes of one that was not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from flexmemory.model.checkpoint import Checkpoint
from flexmemory.model.transformer import Transformer
from flexmemory.storage import Progress, publish, write_json
from flexmemory.tol.codec import CODECS as PLAIN_CODECS
from flexmemory.tol.codec import get_codec
from flexmemory.tol.counts import COUNTS, counts_file
from flexmemory.tol.fit import fit
from flexmemory.tol.format import (
    MANIFEST,
    Manifest,
    Shard,
    partial_folder,
    shard_header,
)
from flexmemory.tol.layout import BLOCK_BYTES, SHARD_BYTES, layout
from flexmemory.tol.scheme import Scheme, as_stored, tensors_to_file
from flexmemory.tol.store import ORDER, TENSORS, ToLStore

CHUNK_TOKENS = 1024
"""Rows computed at once: 200 MB of fp32 at L 24, D 2048."""

logger = logging.getLogger(__name__)


def build_store(
    checkpoint: Checkpoint,
    out: Path,
    *,
    codec: str = "bf16",
    embedding: bool = False,
    layers: Sequence[int] | None = None,
    scheme: Scheme | None = None,
    counts: Int64[Tensor, " V"] | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    shard_bytes: int = SHARD_BYTES,
    block_bytes: int = BLOCK_BYTES,
    device: torch.device | str = "cpu",
) -> ToLStore:
    """Compute all rows of a checkpoint and write them to the new folder `out`.

    Rows are computed in fp32 (fp64 if the checkpoint is), whatever the dtype of the weights, then encoded. Run again
    after an interruption, it goes on where it was.

    Args:
        checkpoint: A memory or flex model.
        out: The folder to make.
        codec: How numbers are written (`tol.coding.CODECS`).
        embedding: Whether a row begins with the token's input embedding, so that no other table of it is needed.
        layers: Layers to keep, the most important first; by default all, in the model's order.
        scheme: How rows are written, instead of the three above (`tol.plan`).
        counts: How often each token occurs (`train.frequency`), to be stored beside the rows.
        chunk_tokens: Rows to compute at once, rounded down to whole blocks (at least one).
        shard_bytes: Bytes of rows in one file, at most.
        block_bytes: Bytes of rows under one checksum, at most.
        device: Where rows are computed.

    Raises:
        FileExistsError: `out` exists.
        OSError: a file could not be written, for instance because the disk is full; nothing that was done is lost.
        ValueError: the model is dense, a row is not finite, an argument is impossible, or `OUT.partial` holds an
            unfinished build of something else.
    """
    if out.exists():
        raise FileExistsError(f"{out} already exists; choose another folder or remove it")
    vocab_size = checkpoint.config.vocab_size
    if counts is not None and (counts.shape != (vocab_size,) or counts.dtype != torch.int64):
        raise ValueError(f"counts must be int64 of [{vocab_size}], got {counts.dtype} of {list(counts.shape)}")
    source = ModelRows(checkpoint, device=device)
    if scheme is None and codec not in PLAIN_CODECS:
        scheme = fit(
            codec,
            source,
            vocab_size=vocab_size,
            hidden_size=checkpoint.config.hidden_size,
            layers=range(checkpoint.config.num_layers) if layers is None else layers,
            embedding=embedding,
            counts=counts,
            device=device,
        )
    manifest = dataclasses.replace(
        layout(
            checkpoint.config,
            codec=codec,
            embedding=embedding,
            layers=layers,
            scheme=scheme,
            shard_bytes=shard_bytes,
            block_bytes=block_bytes,
        ),
        checkpoint_fingerprint=checkpoint.fingerprint,
        tokenizer_fingerprint=checkpoint.tokenizer_fingerprint,
    )
    write_store(out, manifest, source, scheme=scheme, counts=counts, chunk_tokens=chunk_tokens, device=device)
    return ToLStore.open(out, checkpoint=checkpoint)


def write_store(
    out: Path,
    manifest: Manifest,
    source: RowSource,
    *,
    scheme: Scheme | None,
    counts: Int64[Tensor, " V"] | None,
    chunk_tokens: int = CHUNK_TOKENS,
    device: torch.device | str = "cpu",
) -> None:
    """Write the rows that `source` gives as `manifest` and `scheme` say, to the new folder `out`.

    Raises:
        OSError: a file could not be written; nothing that was done is lost.
        ValueError: a row is not finite, or `OUT.partial` holds an unfinished build of something else.
    """
    files: dict[str, bytes] = {}
    if counts is not None:
        files[COUNTS], entry = counts_file(counts)
        manifest = dataclasses.replace(manifest, counts=entry)
    if scheme is not None:
        files[TENSORS] = save(tensors_to_file(scheme.tensors, encoder=False))
        scheme = dataclasses.replace(scheme, tensors=as_stored(scheme))  # what rows are decoded with
        if scheme.order is not None:
            files[ORDER] = save({"order": scheme.order.to(torch.int32)})
        assert manifest.coded is not None
        coded = dataclasses.replace(
            manifest.coded, tensors_sha256=_sha256(files[TENSORS]), order_sha256=_sha256(files.get(ORDER, b""))
        )
        manifest = dataclasses.replace(manifest, coded=coded)
        scheme = scheme.moved(device)
    chunk_rows = max(1, chunk_tokens // manifest.block_rows) * manifest.block_rows
    partial = partial_folder(out)
    # Chunks are part of the identity: GEMMs of another height round differently, and a resumed build shall not.
    identity = json.loads(json.dumps({"counts": None, **manifest.to_json(), "chunk_rows": chunk_rows}))
    with Progress.open(partial, identity) as progress:
        checksums = [digest for line in progress.lines for digest in line["blocks"]]
        _check_written(partial, manifest, checksums)
        _write_rows(source, partial, manifest, scheme, progress, checksums, chunk_rows=chunk_rows)
        for name, data in files.items():
            (partial / name).write_bytes(data)
        manifest = _with_errors(manifest, progress.lines).with_blocks(checksums)
        write_json(partial / MANIFEST, manifest.to_json())
        publish(partial, out)
        (out / Progress.NAME).unlink()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if data else ""


def _with_errors(manifest: Manifest, lines: Sequence[dict[str, Any]]) -> Manifest:
    """The manifest with the largest errors that chunks had."""
    if manifest.coded is None:
        return manifest
    errors = [list(band) for band in manifest.coded.errors]
    for line in lines:
        errors[line["band"]] = [max(pair) for pair in zip(errors[line["band"]], line["errors"], strict=True)]
    return dataclasses.replace(
        manifest, coded=dataclasses.replace(manifest.coded, errors=tuple(tuple(band) for band in errors))
    )


def load_for_rows(checkpoint: Checkpoint, *, device: torch.device | str) -> Transformer:
    """The model with what rows are computed from in fp32, or fp64 where it is stored so."""
    model = checkpoint.load(device=device)
    dtype = torch.promote_types(model.dtype, torch.float32)
    assert model.embedding is not None
    for module in (model.embedding, *model.memories):
        module.to(dtype)
    return model


@runtime_checkable
class RowSource(Protocol):
    """Where rows to be written come from."""

    def __call__(self, token_ids: Int64[Tensor, " U"]) -> Float[Tensor, "U P D"]:
        """The rows of `token_ids` (on the CPU) in at least fp32, on any device: the embedding, then all layers."""
        ...


class ModelRows:
    """Rows computed by a model, which is loaded when the first are asked for."""

    def __init__(self, checkpoint: Checkpoint, *, device: torch.device | str) -> None:
        """Compute on `device`."""
        self._checkpoint, self._device = checkpoint, device
        self._model: Transformer | None = None

    @torch.inference_mode()
    def __call__(self, token_ids: Int64[Tensor, " U"]) -> Float[Tensor, "U P D"]:
        """As `RowSource`."""
        if self._model is None:
            self._model = load_for_rows(self._checkpoint, device=self._device)
        ids = token_ids.to(self._model.device)
        return torch.cat((self._model.embed(ids)[:, None], self._model.compute_rows(ids)), dim=1)


def _write_rows(
    source: RowSource,
    partial: Path,
    manifest: Manifest,
    scheme: Scheme | None,
    progress: Progress,
    checksums: list[str],
    *,
    chunk_rows: int,
) -> None:
    """Write the rows that `checksums` does not cover yet; their checksums are appended to it and to `progress`."""
    done, chunks = len(progress.lines), list(_chunks(manifest, chunk_rows))
    if done == len(chunks):
        return
    start = chunks[done][1]
    if start:
        logger.info("%s: going on at token %d of %d", partial, start, manifest.vocab_size)
    with tqdm(total=manifest.vocab_size, initial=start, desc="computing rows", unit="token", disable=None) as bar:
        for shard, first in chunks[done:]:
            tokens = min(chunk_rows, shard.first_token + shard.tokens - first)
            data, errors = _encoded_rows(source, manifest, scheme, shard, first, first + tokens)
            digests = [
                hashlib.sha256(data[row : row + manifest.block_rows].data).hexdigest()
                for row in range(0, tokens, manifest.block_rows)
            ]
            try:
                _write_chunk(partial, manifest, shard, first, data)
                line = {"blocks": digests, "band": shard.band, "errors": errors}
                progress.append(line)
                progress.lines.append(line)
            except OSError as error:
                raise OSError(
                    f"cannot write {partial} ({error.strerror}); free some space and run the same build again: "
                    f"it goes on at token {first} of {manifest.vocab_size}"
                ) from error
            checksums += digests
            bar.update(tokens)


def _chunks(manifest: Manifest, chunk_rows: int) -> Iterator[tuple[Shard, int]]:
    """The first token of every chunk, with its shard; no chunk spans two."""
    for shard in manifest.shards:
        for first in range(shard.first_token, shard.first_token + shard.tokens, chunk_rows):
            yield shard, first


@torch.inference_mode()
def _encoded_rows(
    source: RowSource, manifest: Manifest, scheme: Scheme | None, shard: Shard, first: int, stop: int
) -> tuple[np.ndarray, list[float]]:
    """Rows at places `first` .. `stop - 1` as on disk, (tokens, stride) uint8, and each slice's largest error."""
    places = torch.arange(first, stop)
    token_ids = places if scheme is None or scheme.order is None else scheme.order[places]
    slices = ([0] if manifest.embedding else []) + [1 + layer for layer in manifest.layers]
    rows = source(token_ids)[:, slices]
    dtype = get_codec(manifest.codec).dtype if scheme is None else torch.float32
    finite = rows.to(dtype).isfinite()
    if not finite.all():
        token, place, element = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"the row of token {int(token_ids[token])} in {manifest.slice_name(place)} is not finite "
            f"({float(rows[token, place, element])} at {element}, in codec {manifest.codec}); "
            "the checkpoint is damaged or its training diverged: build from another one"
        )
    errors: list[float] = []
    if scheme is None:
        data = get_codec(manifest.codec).encode(rows)
    else:
        data = scheme.encode(rows, shard.band)
        errors = (scheme.decode(data, shard.band) - rows).abs().amax(dim=(0, 2)).tolist()
    return F.pad(data, (0, manifest.stride_of(shard) - data.shape[1])).cpu().numpy(), errors


def _write_chunk(partial: Path, manifest: Manifest, shard: Shard, first: int, data: np.ndarray) -> None:
    path = partial / shard.file
    if first == shard.first_token:
        path.write_bytes(shard_header(manifest, shard))
    with path.open("r+b") as file:
        file.seek(shard.data_offset + (first - shard.first_token) * manifest.stride_of(shard))
        file.write(data.data)
        file.flush()
        os.fsync(file.fileno())


def _check_written(partial: Path, manifest: Manifest, checksums: Sequence[str]) -> None:
    """Refuse to go on from blocks that are no longer what was written."""
    try:
        damaged = ToLStore(partial, manifest.with_blocks(checksums)).damaged_blocks()
    except OSError as error:
        raise OSError(f"cannot go on with {partial} ({error}); remove it and build again") from error
    if damaged:
        raise ValueError(f"{partial} was changed since it was written ({damaged[0]}); remove it and build again")
