"""Files that are whole or absent: atomic folders, work that can be resumed, JSON, checksums."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty hidden folder that becomes `path` when the block ends; on any error nothing is left.

    Raises:
        FileExistsError: `path` already exists.
    """
    if path.exists():
        raise FileExistsError(f"{path} already exists; choose another folder or remove it")
    partial = path.parent / f".{path.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        publish(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def publish(partial: Path, final: Path) -> None:
    """Flush every file of folder `partial` to disk, then rename it to `final`."""
    for item in (*(p for p in partial.rglob("*") if p.is_file()), partial):
        _flush(item)
    partial.rename(final)
    _flush(final.parent)


def publish_file(path: Path, data: bytes) -> None:
    """Write the new file `path`, which is there with all of `data` or not at all.

    Raises:
        FileExistsError: it exists.
    """
    if path.exists():
        raise FileExistsError(f"{path} already exists; choose another file or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    _flush(partial)
    partial.rename(path)
    _flush(path.parent)


def link_files(source: Path, folder: Path, *, leave_out: Container[str] = ()) -> None:
    """Give `folder` the files of folder `source`, as hard links: nothing is copied, and neither may be written to.

    Args:
        source: Where files are.
        folder: Where they shall be too; copied where the file system has no links, or is another one.
        leave_out: Paths, relative to `source` and with slashes, not to link.
    """
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source).as_posix()
        if not path.is_file() or name in leave_out:
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path.resolve(), folder / name)
        except OSError:
            shutil.copyfile(path, folder / name)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Progress:
    """The progress file of a folder in the making: JSON lines, first what is being made, then what was done of it.

    It is locked while it is open, and a line is on disk when `append` returns.
    """

    NAME = "progress.jsonl"

    def __init__(self, file: BinaryIO, lines: list[Any]) -> None:
        """See `open`."""
        self.lines = lines
        self._file = file

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: Path, identity: Mapping[str, Any]) -> Iterator[Progress]:
        """Open or begin the work called `identity` in `folder`; `lines` is what was done of it.

        Raises:
            ValueError: `folder` holds other work of which something is done, or another process is at it.
        """
        path = folder / cls.NAME
        remedy = f"finish that, remove {folder}, or choose another --out"
        if folder.exists() and not path.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} exists and is not unfinished work; {remedy}")
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"another process is writing to {folder}; wait for it or stop it") from error
            file.seek(0)
            content = file.read()
            whole = content.rfind(b"\n") + 1  # a line cut short by a crash never counted
            lines = [json.loads(line) for line in content[:whole].splitlines()]
            if lines and lines[0] != identity:
                if len(lines) > 1:
                    keys = ", ".join(key for key in identity if lines[0].get(key) != identity[key])
                    raise ValueError(f"{folder} is unfinished work of another kind ({keys} differ); {remedy}")
                lines, whole = [], 0
            file.truncate(whole)
            progress = cls(file, lines[1:])
            if not lines:
                progress.append(identity)
            yield progress

    def append(self, line: Any) -> None:
        """Record `line`."""
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` to `path`, replacing it in one step."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); it is damaged or not ours") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} should hold a JSON object, got {type(value).__name__}")
    return value


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
