"""Token shards that grow, and can go on from their last commit."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexmemory.storage import Progress, sha256_file
from flexmemory.train.documents import START, Position

SPLITS = ("train", "validation")


@dataclasses.dataclass(kw_only=True)
class Split:
    """What a split holds."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    """UTF-8 bytes of its documents."""

    def shards(self, name: str, *, shard_tokens: int) -> Iterator[tuple[str, int]]:
        """File name and tokens of each shard of this split, called `name`."""
        for number, start in enumerate(range(0, self.tokens, shard_tokens)):
            yield _file_name(name, number), min(shard_tokens, self.tokens - start)


@dataclasses.dataclass(kw_only=True)
class State:
    """How far the work is."""

    tokenizer: str
    """Fingerprint of the tokenizer."""
    position: Position = START
    empty: int = 0
    """Empty documents left out."""
    splits: dict[str, Split] = dataclasses.field(default_factory=lambda: {name: Split() for name in SPLITS})

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> State:
        """Read what `dataclasses.asdict` gave."""
        splits = {name: Split(**split) for name, split in values["splits"].items()}
        return cls(**{**values, "position": Position(*values["position"]), "splits": splits})

    @property
    def documents(self) -> int:
        """Documents of all splits."""
        return sum(split.documents for split in self.splits.values())

    @property
    def tokens(self) -> int:
        """Tokens of all splits."""
        return sum(split.tokens for split in self.splits.values())

    @property
    def bytes(self) -> int:
        """Bytes of all splits."""
        return sum(split.bytes for split in self.splits.values())


class ShardWriter:
    """Appends tokens to the shards of a folder, on from where its progress file says."""

    def __init__(
        self, folder: Path, progress: Progress, *, tokenizer: str, dtype: np.dtype[Any], shard_tokens: int
    ) -> None:
        """Bring the shards of `folder` back to the last commit.

        Raises:
            ValueError: a shard is missing or shorter than it was.
        """
        self.state = State.from_json(progress.lines[-1]) if progress.lines else State(tokenizer=tokenizer)
        self._folder = folder
        self._progress = progress
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._written: set[Path] = set()
        shards = self._shards()
        for path in set(folder.glob("*.bin")) - shards.keys():
            path.unlink()
        for path, size in shards.items():
            if not path.is_file() or path.stat().st_size < size:
                raise ValueError(f"{path} is not as it was written; remove {folder} and start again")
            os.truncate(path, size)

    def append(self, name: str, ids: NDArray[Any]) -> None:
        """Append `ids`, (N,), to the split called `name`."""
        split = self.state.splits[name]
        while len(ids):
            number, used = divmod(split.tokens, self._shard_tokens)
            path = self._folder / _file_name(name, number)
            part, ids = np.split(ids, [self._shard_tokens - used])
            data = memoryview(part.astype(self._dtype).tobytes())
            with path.open("ab", buffering=0) as file:
                while data:
                    data = data[file.write(data) :]
            self._written.add(path)
            split.tokens += len(part)

    def commit(self) -> None:
        """Make what is written safe, and a place to go on from."""
        for path in self._written:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        self._written.clear()
        self._progress.append(dataclasses.asdict(self.state))

    def describe(self) -> dict[str, Any]:
        """The splits as the manifest has them.

        Raises:
            ValueError: a shard is not of its size.
        """
        for path, size in self._shards().items():
            if path.stat().st_size != size:
                raise ValueError(f"{path} is not as it was written; remove {self._folder} and start again")
        return {
            name: {
                **dataclasses.asdict(split),
                "shards": [
                    {"file": file, "tokens": tokens, "sha256": sha256_file(self._folder / file)}
                    for file, tokens in split.shards(name, shard_tokens=self._shard_tokens)
                ],
            }
            for name, split in self.state.splits.items()
        }

    def _shards(self) -> dict[Path, int]:
        """All shards and their bytes."""
        return {
            self._folder / file: tokens * self._dtype.itemsize
            for name, split in self.state.splits.items()
            for file, tokens in split.shards(name, shard_tokens=self._shard_tokens)
        }


def _file_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.bin"
