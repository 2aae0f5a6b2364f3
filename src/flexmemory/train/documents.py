"""Documents from files, folders and hub data sets, as one stream that can start anywhere.

A text file is one document; a line of a `.jsonl` file, a row of a `.parquet` file and a row of a hub data set is one
each. Order is that of the inputs; in a folder, that of the sorted paths.
"""

from __future__ import annotations

import bz2
import collections
import contextlib
import gzip
import importlib
import io
import itertools
import json
import logging
import lzma
import os
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, Literal, NamedTuple, NoReturn

TEXT_SUFFIXES = (".txt", ".md", ".py")
COMPRESSED_SUFFIXES = (".gz", ".xz", ".bz2", ".zst")
HUB = "hf:"
_READ_BYTES = 1 << 20
_PARQUET_ROWS = 256

logger = logging.getLogger(__name__)


class Source(NamedTuple):
    """A file, or a hub data set (whose size and time are 0)."""

    name: str
    size: int
    """Bytes on disk."""
    modified_ns: int


class Position(NamedTuple):
    """A place in the stream: this many documents into a part of source number `source`."""

    source: int = 0
    document: int = 0
    part: int = 0
    """The file of a hub data set, so that those before it need not be read again; of other sources 0."""


START = Position()


class Document(NamedTuple):
    """One text, possibly empty."""

    text: str
    after: Position
    """Where the stream goes on."""


def find_sources(inputs: Sequence[str | Path], *, exclude_dirs: Collection[str] = ()) -> list[Source]:
    """What `inputs` (files, folders, `hf:NAME`) hold; files of other types in folders are logged and left out.

    Links to folders are not followed inside folders.

    Args:
        inputs: Files, folders, or names of hub data sets.
        exclude_dirs: Names of folders to leave out, wherever they are.

    Raises:
        FileNotFoundError: an input is missing.
        ValueError: a file named as input is empty or of an unknown type, a file is named twice, or nothing is found.
    """
    sources: list[Source] = []
    for name in map(str, inputs):
        path = Path(name)
        if name.startswith(HUB):
            sources.append(Source(name, 0, 0))
        elif path.is_dir():
            sources += _in_folder(path, exclude_dirs)
        elif not path.exists():
            raise FileNotFoundError(f"no such file or folder: {name}")
        elif not _format(path):
            raise ValueError(f"{name} is of an unknown type; expected {_expected_types()}")
        elif path.stat().st_size == 0:
            raise ValueError(f"{name} is empty; leave it out or name a file that holds text")
        else:
            sources.append(_source(path))
    if not sources:
        raise ValueError(f"no documents in {', '.join(map(str, inputs)) or 'no input'}; expected {_expected_types()}")
    twice, count = collections.Counter(Path(source.name).absolute() for source in sources).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{twice} is in the inputs {count} times; name it once")
    return sources


def read_documents(
    sources: Sequence[Source], *, text_field: str = "text", start: Position = START
) -> Iterator[Document]:
    """The documents of `sources` from `start` on.

    Raises:
        ImportError: an optional package is missing.
        OSError: a source cannot be read.
        ValueError: a source is damaged, not UTF-8 text, shorter than `start`, or lacks `text_field`; the message says
            where.
    """
    for index, source in enumerate(sources[start.source :], start.source):
        begin = start if index == start.source else Position(index)
        for part, texts in _parts(source.name, text_field, first=begin.part):
            done = begin.document if part == begin.part else 0
            skipped = sum(1 for _ in itertools.islice(texts, done))
            if skipped < done:
                raise ValueError(
                    f"{source.name} has changed: it holds {skipped} documents where {done} were read before; remove "
                    "the .partial folder and start again"
                )
            for number, text in enumerate(texts, done + 1):
                yield Document(text, Position(index, number, part))


def _in_folder(folder: Path, exclude_dirs: Collection[str]) -> list[Source]:
    def refuse(error: OSError) -> NoReturn:
        raise error

    found: list[Path] = []
    other: collections.Counter[str] = collections.Counter()
    for parent, dirs, files in os.walk(folder, onerror=refuse):
        dirs[:] = [name for name in dirs if name not in exclude_dirs]
        for path in (Path(parent, name) for name in files):
            if path.is_file() and _format(path):
                found.append(path)
            else:
                other[path.suffix or "no suffix"] += 1
    if other:
        kinds = ", ".join(f"{suffix} {count}" for suffix, count in sorted(other.items()))
        logger.info("%s: %d files are of other types and left out (%s)", folder, other.total(), kinds)
    return [_source(path) for path in sorted(found)]


def _source(path: Path) -> Source:
    status = path.stat()
    return Source(str(path), status.st_size, status.st_mtime_ns)


def _format(path: Path) -> str | None:
    """The suffix that says how to read `path`, compression apart; None if it is no document."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return suffix
    if suffix in COMPRESSED_SUFFIXES:
        suffix = Path(path.stem).suffix.lower()
    return suffix if suffix in (*TEXT_SUFFIXES, ".jsonl") else None


def _expected_types() -> str:
    names, packed = ", ".join((*TEXT_SUFFIXES, ".jsonl")), ", ".join(COMPRESSED_SUFFIXES)
    return f"{names} (plain or with {packed}), .parquet, a folder of those, or {HUB}NAME"


def _parts(name: str, text_field: str, *, first: int) -> Iterator[tuple[int, Iterator[str]]]:
    """The parts of a source from number `first` on, each with its texts."""
    if name.startswith(HUB):
        rows = _open_hub(name)
        for part in range(first, rows.num_shards):
            yield part, _read_hub(rows.shard(rows.num_shards, part), text_field, f"{name} file {part}")
        return
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    path = Path(name)
    reader = readers.get(_format(path) or "")
    yield 0, reader(path, text_field) if reader else _read_text(path)


def _read_text(path: Path) -> Iterator[str]:
    with _open(path) as file:
        data = file.read()
    if b"\0" in data:
        raise ValueError(f"{path} is binary (byte {data.index(0)} is NUL), expected UTF-8 text")
    yield _decode(data, path)


def _read_jsonl(path: Path, text_field: str) -> Iterator[str]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            text = _decode(line, where)
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is not JSON ({error})") from error
            if not isinstance(record, dict):
                raise ValueError(f"{where} should be a JSON object, got {type(record).__name__}")
            yield _field(record, text_field, where)


def _read_parquet(path: Path, text_field: str) -> Iterator[str]:
    rows = itertools.chain.from_iterable(_parquet_values(path, text_field))
    for number, value in enumerate(rows, 1):
        yield _field({text_field: value}, text_field, f"{path} row {number}")


def _parquet_values(path: Path, text_field: str) -> Iterator[list[object]]:
    arrow, parquet = (_optional(name, needed_for=str(path)) for name in ("pyarrow", "pyarrow.parquet"))
    with _open(path) as file:
        try:
            table = parquet.ParquetFile(file)
            columns = table.schema_arrow.names
            if text_field not in columns:
                raise ValueError(f"{path} {_no_field(text_field, columns)}")
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=[text_field]):
                yield batch.column(0).to_pylist()
        except arrow.ArrowException as error:
            raise ValueError(f"{path} is cut short or damaged ({error})") from error


def _open_hub(name: str) -> Any:
    """The data set's rows as `datasets` streams them: nothing is downloaded before it is read."""
    datasets = _optional("datasets", needed_for=name)
    repository, _, split = name.removeprefix(HUB).partition(":")
    owner, _, rest = repository.partition("/")
    dataset, _, config = rest.partition("/")
    path, _, revision = f"{owner}/{dataset}".rstrip("/").partition("@")
    try:
        return datasets.load_dataset(
            path, config or None, split=split or "train", revision=revision or None, streaming=True
        )
    except (ValueError, OSError) as error:
        expected = f"{HUB}OWNER/NAME[@REVISION][/CONFIG][:SPLIT]"
        raise OSError(f"cannot open {name} ({error}); expected {expected}") from error


def _read_hub(rows: Iterable[dict[str, object]], text_field: str, where: str) -> Iterator[str]:
    for number, row in enumerate(rows, 1):
        yield _field(row, text_field, f"{where} row {number}")


def _field(record: dict[str, object], text_field: str, where: str) -> str:
    if text_field not in record:
        raise ValueError(f"{where} {_no_field(text_field, record)}")
    value = record[text_field]
    if not isinstance(value, str):
        raise ValueError(f"{where}: field {text_field!r} should be a string, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: field {text_field!r} is no Unicode text ({error})") from error
    return value


def _no_field(text_field: str, fields: Collection[str]) -> str:
    return f"has no field {text_field!r}, only {', '.join(map(repr, fields)) or 'none'}; name the field of the text"


def _decode(data: bytes, where: object) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text ({error.reason} at byte {error.start})") from error


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """The decompressed bytes of `path`; that the file is broken shows when the block reads it.

    Raises:
        ValueError: the compressed file is cut short or damaged.
    """
    openers = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": _open_zstd}
    try:
        with openers.get(path.suffix.lower(), open)(path, "rb") as file:
            yield file
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{path} is cut short or damaged ({error})") from error
    except OSError as error:
        if error.errno is not None:  # the disk's, not the decompressor's
            raise
        raise ValueError(f"{path} is cut short or damaged ({error})") from error


@contextlib.contextmanager
def _open_zstd(path: Path, mode: Literal["rb"]) -> Iterator[BinaryIO]:
    zstandard = _optional("zstandard", needed_for=str(path))
    with path.open(mode) as file:
        try:
            yield io.BufferedReader(_ChunkReader(_zstd_chunks(file, zstandard)), _READ_BYTES)
        except zstandard.ZstdError as error:
            raise EOFError(str(error)) from error


def _zstd_chunks(file: BinaryIO, zstandard: ModuleType) -> Iterator[bytes]:
    # The package's own readers take a truncated file for a whole one (0.25).
    data = file.read(_READ_BYTES)
    while data:
        frame = zstandard.ZstdDecompressor().decompressobj()
        while data and not frame.eof:
            yield frame.decompress(data)
            data = frame.unused_data or file.read(_READ_BYTES)
        if not frame.eof:
            raise EOFError("the last frame has no end")


class _ChunkReader(io.RawIOBase):
    """An iterator of bytes as a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride] - typeshed has a type of its own
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def _optional(module: str, *, needed_for: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{needed_for} needs {package}, which is missing: pip install 'flexmemory[train]'") from error
