"""The ToL store on disk: what `manifest.json` says, and where each byte of a row is (docs/tol-format.md).

    STORE/
      manifest.json             `Manifest`; written last
      rows-00000.safetensors    one tensor `rows` [tokens, stride_bytes] uint8, token-major, for a range of tokens
      rows-00001.safetensors    ...
      counts.safetensors        how often each token occurs, where the store has it (`tol.counts`)
      tensors.safetensors       what rows are decoded with, where they are coded in few bits (`tol.scheme`)
      order.safetensors         which token is where, where rows are in the order of frequency

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

from flexmemory.storage import read_json
from flexmemory.tol.codec import CODECS, get_codec
from flexmemory.tol.edited import Edited
from flexmemory.tol.scheme import Band, bands_from_json, bands_to_json

FORMAT = "flexmemory-tol"
FORMAT_VERSION = 4
"""The version of stores with edited rows; those without are written as versions that older readers know."""
CODED_VERSION = 3
PLAIN_VERSION = 2
"""The version of stores whose rows are numbers as they are, all alike."""
MANIFEST = "manifest.json"
PAGE_BYTES = 4096
DATA_OFFSET = PAGE_BYTES
"""Where rows start in a file that we write: one page holds the safetensors header."""


class ToLMismatchError(ValueError):
    """A store was built from another checkpoint, or with another tokenizer, than the one at hand."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One file of a store."""

    file: str
    """Name inside the store's folder."""
    first_token: int
    """Place of its first row, which is the token's id unless the store has an order."""
    tokens: int
    """Rows in it."""
    data_offset: int
    """Byte at which its first row starts."""
    blocks: tuple[str, ...]
    """SHA-256 of each block of `Manifest.block_rows` rows, padding included; the last block may be shorter."""
    band: int = 0
    """The band that its rows are of."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Consecutive rows under one checksum."""

    file: str
    """The shard that holds it."""
    offset: int
    """Byte at which it starts in the file."""
    first_token: int
    """Place of its first row, as in `Shard`."""
    tokens: int
    """Rows in it."""
    sha256: str
    """Hexadecimal SHA-256 of its bytes."""
    stride_bytes: int
    """Bytes from one of its rows to the next."""
    band: int
    """The band that its rows are of."""

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
class Coded:
    """What the manifest says of rows that are coded in few bits."""

    bands: tuple[Band, ...]
    """How rows are written; the first band's come first."""
    strides: tuple[int, ...]
    """Bytes from one row of each band to the next."""
    tensors_sha256: str
    """Of `tol.store.TENSORS`."""
    order_sha256: str
    """Of `tol.store.ORDER`; empty where rows are in the order of ids."""
    errors: tuple[tuple[float, ...], ...]
    """For each band and slice, the largest error that any number has."""

    def prefix(self, slices: int) -> Coded:
        """The same of the first slices of rows alone."""
        bands = tuple(dataclasses.replace(band, slices=band.slices[:slices]) for band in self.bands)
        return dataclasses.replace(self, bands=bands, errors=tuple(errors[:slices] for errors in self.errors))


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
    coded: Coded | None = None
    """How rows are coded in few bits; None where they are numbers as they are, in `codec`."""
    edits: tuple[Edited, ...] = ()
    """How rows were edited, the first edit first."""

    def __post_init__(self) -> None:
        """Reject manifests that contradict themselves."""
        for name in ("num_layers", "hidden_size", "vocab_size", "stride_bytes", "block_rows"):
            value = getattr(self, name)
            require(isinstance(value, int) and value > 0, f"{name} must be a positive integer, got {value!r}")
        require(isinstance(self.embedding, bool), f"embedding must be true or false, got {self.embedding!r}")
        check_layers(self.layers, self.num_layers)
        require(
            self.stride_bytes >= self.row_bytes,
            f"stride_bytes ({self.stride_bytes}) must be at least the {self.row_bytes} bytes of a row",
        )
        if self.coded is not None:
            slices = {len(part) for part in (*[band.slices for band in self.coded.bands], *self.coded.errors)}
            require(slices == {self.num_slices}, f"bands have {slices} slices, expected {self.num_slices}")
            bands = len(self.coded.bands)
            require(len(self.coded.strides) == len(self.coded.errors) == bands, "bands, strides and errors differ")
            for number, band in enumerate(self.coded.bands):
                held = sum(shard.tokens for shard in self.shards if shard.band == number)
                require(band.tokens == held, f"band {number} has {band.tokens} tokens, its shards hold {held}")
        elif self.codec not in CODECS:
            get_codec(self.codec)  # raises
        next_token = 0
        for number, shard in enumerate(self.shards):
            require(shard.file == shard_name(number), f"shard {number} must be {shard_name(number)}, got {shard.file}")
            require(shard.first_token == next_token and shard.tokens > 0, f"{shard.file} must start at {next_token}")
            require(
                shard.data_offset >= 8, f"{shard.file}: data_offset {shard.data_offset} leaves no room for a header"
            )
            next_token += shard.tokens
        require(next_token == self.vocab_size, f"shards hold {next_token} tokens, expected {self.vocab_size}")

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
        """Bytes of one token's rows, before padding: the most, where bands differ."""
        if self.coded is not None:
            return max(band.row_bytes for band in self.coded.bands)
        return get_codec(self.codec).row_bytes(self.num_slices, self.hidden_size)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows with their padding, headers apart."""
        return sum(shard.tokens * self.stride_of(shard) for shard in self.shards)

    def stride_of(self, shard: Shard) -> int:
        """Bytes from one row of a shard to the next."""
        return self.stride_bytes if self.coded is None else self.coded.strides[shard.band]

    def shard_bytes(self, shard: Shard) -> int:
        """Size of a shard's file."""
        return shard.data_offset + shard.tokens * self.stride_of(shard)

    def prefix(self, num_layers: int) -> Manifest:
        """The same store of which only the first layers of each row are read.

        Raises:
            ValueError: rows have fewer layers, or none are wanted.
        """
        if not 0 < num_layers <= len(self.layers):
            raise ValueError(f"rows have {len(self.layers)} layers; {num_layers} of them cannot be kept")
        return dataclasses.replace(
            self,
            layers=self.layers[:num_layers],
            coded=self.coded and self.coded.prefix(self.embedding + num_layers),
        )

    def blocks(self) -> Iterator[Block]:
        """Every block, in the order of its tokens."""
        for shard in self.shards:
            for number, sha256 in enumerate(shard.blocks):
                first = number * self.block_rows
                yield Block(
                    file=shard.file,
                    offset=shard.data_offset + first * self.stride_of(shard),
                    first_token=shard.first_token + first,
                    tokens=min(self.block_rows, shard.tokens - first),
                    sha256=sha256,
                    stride_bytes=self.stride_of(shard),
                    band=shard.band,
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
        del values["coded"]
        version = CODED_VERSION if self.coded is not None else PLAIN_VERSION
        if self.edits:
            version = FORMAT_VERSION
        else:
            del values["edits"]
        if self.coded is None:
            for shard in values["shards"]:
                del shard["band"]
            return {"format": FORMAT, "format_version": version, **values}
        coded = {**dataclasses.asdict(self.coded), "bands": bands_to_json(self.coded.bands)}
        return {"format": FORMAT, "format_version": version, **values, "coded": coded}


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
    stride = manifest.stride_of(shard)
    return {"dtype": "U8", "shape": [shard.tokens, stride], "data_offsets": [0, shard.tokens * stride]}


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
        counts, coded = values.pop("counts", None), values.pop("coded", None)
        edits = tuple(Edited.from_json(edit) for edit in values.pop("edits", ()))
        shards = tuple(Shard(**{**shard, "blocks": tuple(shard["blocks"])}) for shard in values.pop("shards"))
        manifest = Manifest(
            **{**values, "layers": tuple(values["layers"])},
            shards=shards,
            counts=None if counts is None else Counts(**counts),
            coded=None if coded is None else _coded(coded),
            edits=edits,
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: missing, unknown or ill-typed entry ({error})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for shard in manifest.shards:
        count = -(-shard.tokens // manifest.block_rows)
        require(len(shard.blocks) == count, f"{path}: {shard.file} has {len(shard.blocks)} checksums, expected {count}")
    return manifest


def _coded(values: dict[str, Any]) -> Coded:
    return Coded(
        **{
            **values,
            "bands": bands_from_json(values["bands"]),
            "strides": tuple(values["strides"]),
            "errors": tuple(tuple(errors) for errors in values["errors"]),
        }
    )


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


def require(condition: bool, message: str) -> None:
    """Raise a ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)
