"""The ToL store on disk: what `manifest.json` says, and where each byte of a row is (docs/tol-format.md).

    STORE/
      manifest.json             `Manifest`; written last
      rows-00000.safetensors    one tensor `rows` [tokens, stride_bytes] uint8, token-major, for a range of tokens
      rows-00001.safetensors    ...
      counts.safetensors        how often each token occurs, where the store has it (`tol.counts`)

Eq. 2.9 of the paper says what a row is; Fig. 12 why the first layers come first in it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flexmemory.config import ModelConfig
from flexmemory.storage import read_json
from flexmemory.tol.codec import get_codec

FORMAT = "flexmemory-tol"
FORMAT_VERSION = 2
MANIFEST = "manifest.json"
PAGE_BYTES = 4096
DATA_OFFSET = PAGE_BYTES
"""Where rows start in a file that we write: one page holds the safetensors header."""
SHARD_BYTES = 4 * 2**30
"""Rows of one file, at most."""
BLOCK_BYTES = 8 * 2**20
"""Rows under one checksum, at most: with a power of two of rows a block is 4 to 8 MiB."""


class ToLMismatchError(ValueError):
    """A store was built from another checkpoint, or with another tokenizer, than the one at hand."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One file of a store."""

    file: str
    """Name inside the store's folder."""
    first_token: int
    """Id of its first row."""
    tokens: int
    """Rows in it."""
    data_offset: int
    """Byte at which its first row starts."""
    blocks: tuple[str, ...]
    """SHA-256 of each block of `Manifest.block_rows` rows, padding included; the last block may be shorter."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Consecutive rows under one checksum."""

    file: str
    """The shard that holds it."""
    offset: int
    """Byte at which it starts in the file."""
    first_token: int
    """Id of its first row."""
    tokens: int
    """Rows in it."""
    sha256: str
    """Hexadecimal SHA-256 of its bytes."""

    def matches(self, data: np.ndarray) -> bool:
        """Whether `data` has the recorded checksum."""
        return hashlib.sha256(data.data).hexdigest() == self.sha256

    def __str__(self) -> str:
        return f"tokens {self.first_token} to {self.first_token + self.tokens - 1} in {self.file}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """What the manifest says of `tol.counts.COUNTS`."""

    sha256: str
    """Of the file."""
    total: int
    """Tokens counted."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a store holds. Letters of docs/notation.md: V, D, L."""

    codec: str
    """How numbers are written (`tol.codec`)."""
    embedding: bool
    """Whether a row begins with the token's input embedding."""
    layers: tuple[int, ...]
    """The model's layers in a row, in the row's order: the first is the last to drop."""
    num_layers: int
    """L of the model, of which `layers` are kept."""
    hidden_size: int
    """D."""
    vocab_size: int
    """V."""
    stride_bytes: int
    """Bytes from one row to the next."""
    checkpoint_fingerprint: str
    """`Checkpoint.fingerprint` of the weights that the rows were computed from."""
    tokenizer_fingerprint: str
    """`Checkpoint.tokenizer_fingerprint`, empty where there is no tokenizer."""
    block_rows: int
    """Rows under one checksum."""
    shards: tuple[Shard, ...]
    """The files, in the order of their tokens."""
    counts: Counts | None = None
    """How often tokens occur, where that was counted."""

    def __post_init__(self) -> None:
        """Reject manifests that contradict themselves."""
        for name in ("num_layers", "hidden_size", "vocab_size", "stride_bytes", "block_rows"):
            value = getattr(self, name)
            _require(isinstance(value, int) and value > 0, f"{name} must be a positive integer, got {value!r}")
        _require(isinstance(self.embedding, bool), f"embedding must be true or false, got {self.embedding!r}")
        check_layers(self.layers, self.num_layers)
        _require(
            self.stride_bytes >= self.row_bytes,
            f"stride_bytes ({self.stride_bytes}) must be at least the {self.row_bytes} bytes of a row",
        )
        next_token = 0
        for number, shard in enumerate(self.shards):
            _require(shard.file == shard_name(number), f"shard {number} must be {shard_name(number)}, got {shard.file}")
            _require(shard.first_token == next_token and shard.tokens > 0, f"{shard.file} must start at {next_token}")
            _require(
                shard.data_offset >= 8, f"{shard.file}: data_offset {shard.data_offset} leaves no room for a header"
            )
            next_token += shard.tokens
        _require(next_token == self.vocab_size, f"shards hold {next_token} tokens, expected {self.vocab_size}")

    @property
    def num_slices(self) -> int:
        """Slices of D numbers in a row: the embedding, if it is there, and the layers that are kept."""
        return self.embedding + len(self.layers)

    def slice_name(self, place: int) -> str:
        """What slice `place` of a row is, in words."""
        if self.embedding and place == 0:
            return "the embedding"
        return f"layer {self.layers[place - self.embedding]}"

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's rows, before padding."""
        return get_codec(self.codec).row_bytes(self.num_slices, self.hidden_size)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows with their padding, headers apart."""
        return self.vocab_size * self.stride_bytes

    def shard_bytes(self, shard: Shard) -> int:
        """Size of a shard's file."""
        return shard.data_offset + shard.tokens * self.stride_bytes

    def blocks(self) -> Iterator[Block]:
        """Every block, in the order of its tokens."""
        for shard in self.shards:
            for number, sha256 in enumerate(shard.blocks):
                first = number * self.block_rows
                yield Block(
                    file=shard.file,
                    offset=shard.data_offset + first * self.stride_bytes,
                    first_token=shard.first_token + first,
                    tokens=min(self.block_rows, shard.tokens - first),
                    sha256=sha256,
                )

    def with_blocks(self, checksums: Sequence[str]) -> Manifest:
        """This manifest with the checksums of its first blocks, one after the other, and no others."""
        shards, rest = [], tuple(checksums)
        for shard in self.shards:
            count = -(-shard.tokens // self.block_rows)
            shards.append(dataclasses.replace(shard, blocks=rest[:count]))
            rest = rest[count:]
        assert not rest
        return dataclasses.replace(self, shards=tuple(shards))

    def to_json(self) -> dict[str, Any]:
        """The content of `manifest.json`."""
        values = dataclasses.asdict(self)
        if self.counts is None:
            del values["counts"]
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **values}


def plan(
    config: ModelConfig,
    *,
    codec: str = "bf16",
    embedding: bool = False,
    layers: Sequence[int] | None = None,
    shard_bytes: int = SHARD_BYTES,
    block_bytes: int = BLOCK_BYTES,
) -> Manifest:
    """The store of a model, before any of its rows is computed: no fingerprints, no checksums.

    Args:
        config: The model.
        codec: How numbers are written.
        embedding: Whether a row begins with the token's input embedding.
        layers: Layers to keep, the most important first; by default all, in the model's order.
        shard_bytes: Bytes of rows in one file, at most (at least one row).
        block_bytes: Bytes of rows under one checksum, at most (at least one row).

    Raises:
        ValueError: the model is dense, or codec, layers or sizes are impossible.
    """
    if not config.has_memory:
        raise ValueError("a dense model has no memory to look up; ToL needs a memory or flex architecture")
    _require(shard_bytes > 0, f"shard_bytes must be positive, got {shard_bytes}")
    _require(block_bytes > 0, f"block_bytes must be positive, got {block_bytes}")
    kept = tuple(range(config.num_layers)) if layers is None else tuple(layers)
    check_layers(kept, config.num_layers)
    stride = stride_of(get_codec(codec).row_bytes(embedding + len(kept), config.hidden_size))
    fitting = max(1, min(block_bytes, shard_bytes) // stride)
    block_rows = 1 << (fitting.bit_length() - 1)
    shard_rows = max(1, shard_bytes // (block_rows * stride)) * block_rows
    shards = tuple(
        Shard(
            file=shard_name(number),
            first_token=first,
            tokens=min(shard_rows, config.vocab_size - first),
            data_offset=DATA_OFFSET,
            blocks=(),
        )
        for number, first in enumerate(range(0, config.vocab_size, shard_rows))
    )
    return Manifest(
        codec=codec,
        embedding=embedding,
        layers=kept,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        stride_bytes=stride,
        checkpoint_fingerprint="",
        tokenizer_fingerprint="",
        block_rows=block_rows,
        shards=shards,
    )


def stride_of(row_bytes: int) -> int:
    """`row_bytes` rounded up to whole pages where that costs under 5 %, else as it is."""
    padded = -(-row_bytes // PAGE_BYTES) * PAGE_BYTES
    return padded if 20 * (padded - row_bytes) < row_bytes else row_bytes


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"rows-{number:05d}.safetensors"


def shard_header(manifest: Manifest, shard: Shard) -> bytes:
    """The bytes before a shard's rows: length, safetensors JSON, spaces up to the data."""
    text = json.dumps({"rows": _tensor_entry(manifest, shard)}, separators=(",", ":")).encode()
    length = shard.data_offset - 8
    assert len(text) <= length
    return length.to_bytes(8, "little") + text.ljust(length)


def check_header(manifest: Manifest, shard: Shard, folder: Path) -> None:
    """Compare a shard's safetensors header with the manifest.

    Raises:
        ValueError: they differ.
    """
    path = folder / shard.file
    with path.open("rb") as file:
        head = file.read(shard.data_offset)
    try:
        entries = json.loads(head[8:])
    except ValueError as error:
        raise ValueError(
            f"{path} has no valid safetensors header ({error}); it is damaged: build the store again"
        ) from error
    expected = _tensor_entry(manifest, shard)
    found = entries.get("rows") if isinstance(entries, dict) else entries
    if int.from_bytes(head[:8], "little") != shard.data_offset - 8 or found != expected:
        raise ValueError(f"{path} has the header {found}, expected {expected} up to byte {shard.data_offset}")


def _tensor_entry(manifest: Manifest, shard: Shard) -> dict[str, Any]:
    size = shard.tokens * manifest.stride_bytes
    return {"dtype": "U8", "shape": [shard.tokens, manifest.stride_bytes], "data_offsets": [0, size]}


def read_manifest(folder: Path) -> Manifest:
    """Read and check `manifest.json`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, not of a ToL store, of a newer format, or contradicts itself.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(_why_absent(folder))
    values = read_json(path)
    if values.pop("format", None) != FORMAT:
        raise ValueError(f"{folder} is not a ToL store: its {MANIFEST} does not say {FORMAT!r}")
    version = values.pop("format_version", None)
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"{folder} has ToL format {version!r}; this version reads up to {FORMAT_VERSION}: update flexmemory"
        )
    if version == 1:
        values.setdefault("embedding", False)
    try:
        counts = values.pop("counts", None)
        shards = tuple(Shard(**{**shard, "blocks": tuple(shard["blocks"])}) for shard in values.pop("shards"))
        manifest = Manifest(
            **{**values, "layers": tuple(values["layers"])},
            shards=shards,
            counts=None if counts is None else Counts(**counts),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: missing, unknown or ill-typed entry ({error})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for shard in manifest.shards:
        count = -(-shard.tokens // manifest.block_rows)
        _require(
            len(shard.blocks) == count, f"{path}: {shard.file} has {len(shard.blocks)} checksums, expected {count}"
        )
    return manifest


def check_layers(layers: Sequence[int], num_layers: int) -> None:
    """Refuse layers that the model lacks, repeated layers, and none at all.

    Raises:
        ValueError: as said.
    """
    if not layers or len(set(layers)) < len(layers) or not set(layers) <= set(range(num_layers)):
        raise ValueError(f"layers must be distinct numbers from 0 to {num_layers - 1}, got {list(layers)}")


def partial_folder(folder: Path) -> Path:
    """Where a store is built until it is whole."""
    return folder.with_name(f"{folder.name}.partial")


def _why_absent(folder: Path) -> str:
    if partial_folder(folder).is_dir():
        return (
            f"{folder} is not whole yet, see {partial_folder(folder).name}: run the same `flexmemory tol build` again"
        )
    if folder.is_dir():
        return f"{folder} has no {MANIFEST}: it is not a ToL store, or not a whole one"
    return f"{folder} does not exist; expected a folder written by `flexmemory tol build`"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
