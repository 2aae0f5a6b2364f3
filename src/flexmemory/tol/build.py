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

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from flexmemory.model.checkpoint import Checkpoint
from flexmemory.model.transformer import Transformer
from flexmemory.storage import Progress, publish, write_json
from flexmemory.tol.codec import get_codec
from flexmemory.tol.counts import COUNTS, counts_file
from flexmemory.tol.format import (
    BLOCK_BYTES,
    MANIFEST,
    SHARD_BYTES,
    Manifest,
    Shard,
    partial_folder,
    plan,
    shard_header,
)
from flexmemory.tol.store import ToLStore

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
        codec: How numbers are written.
        embedding: Whether a row begins with the token's input embedding, so that no other table of it is needed.
        layers: Layers to keep, the most important first; by default all, in the model's order.
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
    counts_data, counts_entry = (None, None) if counts is None else counts_file(counts)
    manifest = dataclasses.replace(
        plan(
            checkpoint.config,
            codec=codec,
            embedding=embedding,
            layers=layers,
            shard_bytes=shard_bytes,
            block_bytes=block_bytes,
        ),
        checkpoint_fingerprint=checkpoint.fingerprint,
        tokenizer_fingerprint=checkpoint.tokenizer_fingerprint,
        counts=counts_entry,
    )
    chunk_rows = max(1, chunk_tokens // manifest.block_rows) * manifest.block_rows
    partial = partial_folder(out)
    # Chunks are part of the identity: GEMMs of another height round differently, and a resumed build shall not.
    identity = json.loads(json.dumps({"counts": None, **manifest.to_json(), "chunk_rows": chunk_rows}))
    with Progress.open(partial, identity) as progress:
        checksums = [digest for digests in progress.lines for digest in digests]
        _check_written(partial, manifest, checksums)
        _write_rows(checkpoint, partial, manifest, progress, checksums, chunk_rows=chunk_rows, device=device)
        if counts_data is not None:
            (partial / COUNTS).write_bytes(counts_data)
        write_json(partial / MANIFEST, manifest.with_blocks(checksums).to_json())
        publish(partial, out)
        (out / Progress.NAME).unlink()
    return ToLStore.open(out, checkpoint=checkpoint)


def load_for_rows(checkpoint: Checkpoint, *, device: torch.device | str) -> Transformer:
    """The model with what rows are computed from in fp32, or fp64 where it is stored so."""
    model = checkpoint.load(device=device)
    dtype = torch.promote_types(model.dtype, torch.float32)
    assert model.embedding is not None
    for module in (model.embedding, *model.memories):
        module.to(dtype)
    return model


def _write_rows(
    checkpoint: Checkpoint,
    partial: Path,
    manifest: Manifest,
    progress: Progress,
    checksums: list[str],
    *,
    chunk_rows: int,
    device: torch.device | str,
) -> None:
    """Write the rows that `checksums` does not cover yet; their checksums are appended to it and to `progress`."""
    start = min(len(checksums) * manifest.block_rows, manifest.vocab_size)
    if start == manifest.vocab_size:
        return
    if start:
        logger.info("%s: going on at token %d of %d", partial, start, manifest.vocab_size)
    model = load_for_rows(checkpoint, device=device)
    with tqdm(total=manifest.vocab_size, initial=start, desc="computing rows", unit="token", disable=None) as bar:
        for shard, first in _chunks(manifest, chunk_rows):
            if first < start:
                continue
            tokens = min(chunk_rows, shard.first_token + shard.tokens - first)
            data = _encoded_rows(model, manifest, first, first + tokens)
            digests = [
                hashlib.sha256(data[row : row + manifest.block_rows].data).hexdigest()
                for row in range(0, tokens, manifest.block_rows)
            ]
            try:
                _write_chunk(partial, manifest, shard, first, data)
                progress.append(digests)
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
def _encoded_rows(model: Transformer, manifest: Manifest, first: int, stop: int) -> np.ndarray:
    """Rows of tokens `first` .. `stop - 1` as on disk: (tokens, stride_bytes) uint8."""
    codec = get_codec(manifest.codec)
    token_ids = torch.arange(first, stop, device=model.device)
    rows = model.compute_rows(token_ids)[:, list(manifest.layers)]
    if manifest.embedding:
        rows = torch.cat((model.embed(token_ids)[:, None], rows), dim=1)
    finite = rows.to(codec.dtype).isfinite()
    if not finite.all():
        token, place, element = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"the row of token {first + token} in {manifest.slice_name(place)} is not finite "
            f"({float(rows[token, place, element])} at {element}, in codec {manifest.codec}); "
            "the checkpoint is damaged or its training diverged: build from another one"
        )
    data = codec.encode(rows)
    return F.pad(data, (0, manifest.stride_bytes - manifest.row_bytes)).cpu().numpy()


def _write_chunk(partial: Path, manifest: Manifest, shard: Shard, first: int, data: np.ndarray) -> None:
    path = partial / shard.file
    if first == shard.first_token:
        path.write_bytes(shard_header(manifest, shard))
    with path.open("r+b") as file:
        file.seek(shard.data_offset + (first - shard.first_token) * manifest.stride_bytes)
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
