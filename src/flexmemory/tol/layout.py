"""Where everything goes in a store that is to be written: bands, files, blocks under one checksum."""

from __future__ import annotations

from collections.abc import Sequence

from flexmemory.config import ModelConfig
from flexmemory.tol.codec import get_codec
from flexmemory.tol.format import (
    DATA_OFFSET,
    PAGE_BYTES,
    Coded,
    Manifest,
    Shard,
    check_layers,
    require,
    shard_name,
)
from flexmemory.tol.scheme import Scheme

SHARD_BYTES = 4 * 2**30
"""Rows of one file, at most."""
BLOCK_BYTES = 8 * 2**20
"""Rows under one checksum, at most: with a power of two of rows a block is 4 to 8 MiB."""


def layout(
    config: ModelConfig,
    *,
    codec: str = "bf16",
    embedding: bool = False,
    layers: Sequence[int] | None = None,
    scheme: Scheme | None = None,
    shard_bytes: int = SHARD_BYTES,
    block_bytes: int = BLOCK_BYTES,
) -> Manifest:
    """The store of a model, before any of its rows is computed: no fingerprints, no checksums.

    Args:
        config: The model.
        codec: How numbers are written.
        embedding: Whether a row begins with the token's input embedding.
        layers: Layers to keep, the most important first; by default all, in the model's order.
        scheme: How rows are coded in few bits, which says the same as `codec`, `embedding` and `layers`, and more.
        shard_bytes: Bytes of rows in one file, at most (at least one row).
        block_bytes: Bytes of rows under one checksum, at most (at least one row).

    Raises:
        ValueError: the model is dense, or codec, layers or sizes are impossible.
    """
    if not config.has_memory:
        raise ValueError("a dense model has no memory to look up; ToL needs a memory or flex architecture")
    return layout_of(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        codec=codec,
        embedding=embedding,
        layers=layers,
        scheme=scheme,
        shard_bytes=shard_bytes,
        block_bytes=block_bytes,
    )


def layout_of(
    *,
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    codec: str,
    embedding: bool,
    layers: Sequence[int] | None,
    scheme: Scheme | None,
    shard_bytes: int = SHARD_BYTES,
    block_bytes: int = BLOCK_BYTES,
) -> Manifest:
    """As `layout`, for a model of which only sizes are known: V, D and L.

    Raises:
        ValueError: codec, layers or sizes are impossible.
    """
    require(shard_bytes > 0, f"shard_bytes must be positive, got {shard_bytes}")
    require(block_bytes > 0, f"block_bytes must be positive, got {block_bytes}")
    if scheme is not None:
        codec, embedding, layers = scheme.codec, scheme.embedding, scheme.layers
    kept = tuple(range(num_layers)) if layers is None else tuple(layers)
    check_layers(kept, num_layers)
    if scheme is None:
        row_bytes = get_codec(codec).row_bytes(embedding + len(kept), hidden_size)
        parts = [(vocab_size, stride_of(row_bytes))]
    else:
        # No padding: it would be bytes that a budget could spend better.
        parts = [(band.tokens, max(1, band.row_bytes)) for band in scheme.bands]
        require(scheme.vocab_size == vocab_size, f"the scheme is of {scheme.vocab_size} tokens")
        require(scheme.hidden_size == hidden_size, f"the scheme is of {scheme.hidden_size} numbers a layer")
    stride = max(stride for _, stride in parts)
    fitting = max(1, min(block_bytes, shard_bytes) // stride)
    block_rows = 1 << (fitting.bit_length() - 1)
    shards, first = [], 0
    for band, (tokens, band_stride) in enumerate(parts):
        shard_rows = max(1, shard_bytes // (block_rows * band_stride)) * block_rows
        for start in range(0, tokens, shard_rows):
            count = min(shard_rows, tokens - start)
            file = shard_name(len(shards))
            shards.append(
                Shard(file=file, first_token=first, tokens=count, data_offset=DATA_OFFSET, blocks=(), band=band)
            )
            first += count
    coded = None
    if scheme is not None:
        coded = Coded(
            bands=scheme.bands,
            strides=tuple(stride for _, stride in parts),
            tensors_sha256="",
            order_sha256="",
            errors=tuple((0.0,) * scheme.num_slices for _ in scheme.bands),
        )
    return Manifest(
        codec=codec,
        embedding=embedding,
        layers=kept,
        num_layers=num_layers,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        stride_bytes=stride,
        checkpoint_fingerprint="",
        tokenizer_fingerprint="",
        block_rows=block_rows,
        shards=tuple(shards),
        coded=coded,
    )


def stride_of(row_bytes: int) -> int:
    """`row_bytes` rounded up to whole pages where that costs under 5 %, else as it is."""
    padded = -(-row_bytes // PAGE_BYTES) * PAGE_BYTES
    return padded if 20 * (padded - row_bytes) < row_bytes else row_bytes
