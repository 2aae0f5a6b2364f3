"""Prepared tokens as batches: any batch is a pure function of its number.

A folder written by `flexmemory prepare` holds token shards. `TokenDataset` opens it, `TokenStream` reads a split as one
stream and `MixedStreams` those of several folders, `ShuffledBatches` and `SequentialBatches` cut them into numbered
batches, `Prefetcher` prepares these ahead in a thread. Dimension key: B batch, T tokens, U unique ids (padded), N flat
tokens.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from flexmemory.config import TrainConfig
from flexmemory.storage import read_json
from flexmemory.tokenizer import Tokenizer
from flexmemory.train.interleave import Interleaving

FORMAT = "flexmemory-tokens"
FORMAT_VERSION = 1
_DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """Token ids, what follows each, and the distinct ids with each position's place among them; all int64."""

    token_ids: Int[Tensor, "B T"]
    targets: Int[Tensor, "B T"]
    """The next token of each position."""
    unique_ids: Int[Tensor, " U"]
    """Sorted; padded by repeats of the last id, which `index` never names."""
    index: Int[Tensor, "B T"]
    """Positions in `unique_ids`."""

    @classmethod
    def of(cls, windows: Sequence[NDArray[np.int64]], *, vocab_size: int) -> Batch:
        """Windows of T + 1 ids below `vocab_size` as a batch."""
        tokens = np.stack(windows)  # (B, T+1)
        token_ids, targets = tokens[:, :-1], tokens[:, 1:]
        present = np.zeros(vocab_size, dtype=np.bool_)  # flags instead of np.unique, which sorts
        present[token_ids] = True
        unique = np.flatnonzero(present)
        index = (np.cumsum(present) - 1)[token_ids]
        # Few distinct lengths, so that torch.compile sees few shapes and kernels see sizes they like.
        bucket = 64 * max(1, token_ids.size // 16_384)
        unique = np.pad(unique, (0, -len(unique) % bucket), mode="edge")
        return cls(*(torch.from_numpy(array).contiguous() for array in (token_ids, targets, unique, index)))

    @property
    def num_unique(self) -> int:
        """Distinct ids, padding apart."""
        return int(self.index.max()) + 1

    def pin_memory(self) -> Batch:
        """This batch in memory that a GPU reads by itself."""
        return self._map(Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        """This batch on `device`, without waiting where its memory is pinned.

        PyTorch's pinned-memory allocator does not reuse a block before copies from it are done.
        """
        return self._map(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def split(self, batch_size: int) -> Iterator[Batch]:
        """The batch in parts of `batch_size` sequences, which share its unique ids."""
        parts = (tensor.split(batch_size) for tensor in (self.token_ids, self.targets, self.index))
        for token_ids, targets, index in zip(*parts, strict=True):
            yield Batch(token_ids, targets, self.unique_ids, index)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(*map(function, (self.token_ids, self.targets, self.unique_ids, self.index)))


class TokenStream:
    """The tokens of one split, memory-mapped shards read as one stream."""

    def __init__(
        self, shards: Sequence[NDArray[Any]], *, vocab_size: int, num_bytes: int, name: str = "the data"
    ) -> None:
        """Chain `shards`, each (N,) of ids below `vocab_size`, which stand for `num_bytes` of UTF-8 text.

        Messages call the stream `name`.
        """
        self.name = name
        self.vocab_size = vocab_size
        self.num_bytes = num_bytes
        self._shards = list(shards)
        self._ends = list(itertools.accumulate(len(shard) for shard in shards))

    def __len__(self) -> int:
        """Tokens in the stream."""
        return self._ends[-1] if self._ends else 0

    def num_windows(self, seq_len: int) -> int:
        """Sequences of `seq_len` tokens, each with a token to predict after its last."""
        return max(0, len(self) - 1) // seq_len

    def read(self, start: int, length: int) -> NDArray[np.int64]:
        """Tokens `start` to `start + length - 1`, across shards."""
        assert 0 <= start <= start + length <= len(self)
        pieces = []
        number = bisect.bisect_right(self._ends, start)
        while length > 0:
            shard = self._shards[number]
            piece = shard[start - self._ends[number] + len(shard) :][:length]
            pieces.append(piece.astype(np.int64))
            start, length, number = start + len(piece), length - len(piece), number + 1
        return np.concatenate(pieces) if len(pieces) > 1 else pieces[0]

    def window(self, number: int, *, seq_len: int) -> NDArray[np.int64]:
        """Window `number` of `seq_len + 1` tokens: it starts at token `number * seq_len`.

        Raises:
            ValueError: it holds an id outside the vocabulary.
        """
        tokens = self.read(number * seq_len, seq_len + 1)
        if tokens.max() >= self.vocab_size:
            raise ValueError(
                f"{self.name} holds token id {tokens.max()}, but its vocabulary has {self.vocab_size} ids: a shard is "
                "damaged, prepare the data again"
            )
        return tokens

    def batch(self, windows: Sequence[int], *, seq_len: int) -> Batch:
        """The windows of these numbers as a batch."""
        return Batch.of([self.window(number, seq_len=seq_len) for number in windows], vocab_size=self.vocab_size)


class MixedStreams:
    """The windows of several streams as one numbered sequence, each stream in its share of every part of it."""

    def __init__(self, streams: Sequence[TokenStream], *, weights: Sequence[int] | None = None) -> None:
        """Mix `streams` of one vocabulary by `weights`, by default each by its number of windows."""
        self.streams = tuple(streams)
        self.weights = weights
        self.vocab_size = max(stream.vocab_size for stream in streams)

    def __len__(self) -> int:
        """Tokens in all streams."""
        return sum(map(len, self.streams))

    def num_windows(self, seq_len: int) -> int:
        """Windows in all streams."""
        return sum(stream.num_windows(seq_len) for stream in self.streams)

    def interleaving(self, seq_len: int) -> Interleaving:
        """Which stream each sequence is from."""
        return Interleaving(self.weights or [stream.num_windows(seq_len) for stream in self.streams])


class TokenDataset:
    """A prepared data folder, opened and found whole."""

    def __init__(self, folder: Path, manifest: dict[str, Any], splits: dict[str, TokenStream]) -> None:
        """See `open`."""
        self.folder = folder
        self.vocab_size: int = manifest["vocab_size"]
        self.train = splits["train"]
        self.validation = splits["validation"] if len(splits["validation"]) else None
        self._manifest = manifest

    @classmethod
    def open(cls, folder: str | Path) -> TokenDataset:
        """Open a folder that `flexmemory prepare` wrote.

        Raises:
            FileNotFoundError: there is no prepared data.
            ValueError: it is incomplete, of a newer format, or not prepared data.
        """
        path = Path(folder)
        if not (path / "manifest.json").is_file():
            raise FileNotFoundError(f"no prepared data in {path}: expected manifest.json; run `flexmemory prepare`")
        manifest = read_json(path / "manifest.json")
        if manifest.get("format") != FORMAT:
            raise ValueError(f"{path} is not prepared data (manifest format {manifest.get('format')!r})")
        try:
            if manifest["format_version"] > FORMAT_VERSION:
                raise ValueError(
                    f"{path} has data format {manifest['format_version']}; this version reads up to {FORMAT_VERSION}: "
                    "update flexmemory"
                )
            splits = {name: _open_split(path, manifest, name) for name in ("train", "validation")}
            return cls(path, manifest, splits)
        except KeyError as error:
            raise ValueError(f"{path}/manifest.json lacks {error}; prepare the data again") from error

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what defines the token streams: ids, their order and the tokenizer; not file names."""
        shards = [
            [shard["tokens"], shard["sha256"]]
            for split in ("train", "validation")
            for shard in self._manifest["splits"][split]["shards"]
        ]
        keys = ("dtype", "vocab_size", "boundary_id", "tokenizer_fingerprint")
        content = json.dumps([[self._manifest[key] for key in keys], shards])
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def tokenizer_fingerprint(self) -> str:
        """`Tokenizer.fingerprint` of the tokenizer that made the tokens."""
        return self._manifest["tokenizer_fingerprint"]

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens.

        Raises:
            ValueError: the folder's tokenizer is another one.
        """
        tokenizer = Tokenizer.load(self.folder)
        if tokenizer.fingerprint != self.tokenizer_fingerprint:
            raise ValueError(f"{self.folder}/tokenizer.json is not the tokenizer that made the tokens; prepare again")
        return tokenizer


def _open_split(folder: Path, manifest: dict[str, Any], split: str) -> TokenStream:
    if manifest["dtype"] not in _DTYPES:
        raise ValueError(f"{folder} holds tokens of dtype {manifest['dtype']!r}, expected {' or '.join(_DTYPES)}")
    dtype = _DTYPES[manifest["dtype"]]
    shards = []
    for entry in manifest["splits"][split]["shards"]:
        file, expected = folder / entry["file"], entry["tokens"] * dtype.itemsize
        size = file.stat().st_size if file.is_file() else None
        if size != expected:
            found = "is missing" if size is None else f"has {size} bytes, expected {expected}"
            raise ValueError(f"prepared data {folder} is incomplete: {file.name} {found}; prepare the data again")
        if size:
            shards.append(np.asarray(np.memmap(file, dtype=dtype, mode="r")))  # as a plain array, cheaper to slice
    num_bytes = manifest["splits"][split]["bytes"]
    return TokenStream(shards, vocab_size=manifest["vocab_size"], num_bytes=num_bytes, name=f"{split} of {folder}")


@runtime_checkable
class Batches(Protocol):
    """Batches by number."""

    def __getitem__(self, number: int, /) -> Batch:
        """Batch `number`."""
        ...


class ShuffledBatches:
    """Training batches without end: every window once an epoch, in an order of its own each epoch.

    Batch n holds sequences n B to n B + B - 1 of the run, whatever was read before it. Of several streams, each has
    epochs of its own.
    """

    def __init__(
        self, tokens: TokenStream | MixedStreams, *, config: TrainConfig, batch_size: int | None = None
    ) -> None:
        """Cut `tokens` as `config` says, into batches of `batch_size` sequences (by default micro-batches).

        Raises:
            ValueError: a stream has fewer tokens than one sequence needs.
        """
        self._tokens = _mixed(tokens)
        self._config = config
        self._batch_size = config.micro_batch_size if batch_size is None else batch_size
        for stream in self._tokens.streams:
            if stream.num_windows(config.seq_len) == 0:
                raise ValueError(
                    f"{stream.name} holds {len(stream)} tokens, need at least seq_len + 1 = {config.seq_len + 1}; "
                    "prepare more text or lower seq_len"
                )
        self._interleaving = self._tokens.interleaving(config.seq_len)
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}
        """Of a stream: the epoch last read, and its order of windows."""

    def __getitem__(self, number: int, /) -> Batch:
        """Batch `number`, counted from the start of the run."""
        size = self._batch_size
        windows = [self._window(sequence) for sequence in range(number * size, (number + 1) * size)]
        return Batch.of(windows, vocab_size=self._tokens.vocab_size)

    @property
    def per_step(self) -> int:
        """Batches in an optimizer step."""
        return self._config.batch_tokens // (self._batch_size * self._config.seq_len)

    def _window(self, sequence: int) -> NDArray[np.int64]:
        source, number = self._interleaving.place(sequence)
        stream = self._tokens.streams[source]
        num_windows = stream.num_windows(self._config.seq_len)
        epoch, position = divmod(number, num_windows)
        known, order = self._orders.get(source, (None, None))
        if order is None or known != epoch:
            # The first stream's order is what it is alone; others of the same size have orders of their own.
            seed = (self._config.seed, epoch, source) if source else (self._config.seed, epoch)
            order = _permutation(num_windows, seed=seed)
            self._orders[source] = epoch, order
        return stream.window(int(order[position]), seq_len=self._config.seq_len)


def _mixed(tokens: TokenStream | MixedStreams) -> MixedStreams:
    return MixedStreams([tokens]) if isinstance(tokens, TokenStream) else tokens


def _permutation(count: int, *, seed: Sequence[int]) -> NDArray[np.int64]:
    # Sorting raw bits: unlike Generator.permutation, numpy promises never to change them.
    return np.argsort(np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count), kind="stable")


class SequentialBatches:
    """The first windows of a split in order, each once, of every stream its share; the last batch may be smaller."""

    def __init__(self, tokens: TokenStream | MixedStreams, *, config: TrainConfig, max_tokens: int) -> None:
        """Cut at most `max_tokens` of `tokens`, at least one window."""
        self._tokens = _mixed(tokens)
        self._interleaving = self._tokens.interleaving(config.seq_len)
        self._config = config
        self._num_windows = min(tokens.num_windows(config.seq_len), max(1, max_tokens // config.seq_len))

    def __len__(self) -> int:
        """Number of batches."""
        return -(-self._num_windows // self._config.micro_batch_size)

    def __getitem__(self, number: int, /) -> Batch:
        """Batch `number`."""
        size = self._config.micro_batch_size
        sequences = range(number * size, min((number + 1) * size, self._num_windows))
        places = [self._interleaving.place(sequence) for sequence in sequences]
        windows = [self._tokens.streams[source].window(n, seq_len=self._config.seq_len) for source, n in places]
        return Batch.of(windows, vocab_size=self._tokens.vocab_size)


class Prefetcher:
    """Iterates over numbered batches, a few prepared ahead by one background thread; a context manager."""

    def __init__(self, batches: Batches, *, numbers: Iterable[int], pin_memory: bool, depth: int = 4) -> None:
        """Prepare `batches[n]` for n in `numbers`, at most `depth` ahead of the reader."""
        self.wait_s = 0.0
        """Seconds that the reader has waited for batches."""
        self._batches = batches
        self._pin_memory = pin_memory
        self._numbers = iter(numbers)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._ahead: deque[Future[Batch]] = deque()
        for number in itertools.islice(self._numbers, depth):
            self._ahead.append(self._pool.submit(self._prepare, number))

    def _prepare(self, number: int) -> Batch:
        batch = self._batches[number]
        return batch.pin_memory() if self._pin_memory else batch

    def __iter__(self) -> Iterator[Batch]:
        """This iterator."""
        return self

    def __next__(self) -> Batch:
        """The next batch; an error of the thread is raised here."""
        if not self._ahead:
            raise StopIteration
        started = time.perf_counter()
        batch = self._ahead.popleft().result()
        self.wait_s += time.perf_counter() - started
        for number in itertools.islice(self._numbers, 1):
            self._ahead.append(self._pool.submit(self._prepare, number))
        return batch

    def __enter__(self) -> Prefetcher:
        """This prefetcher."""
        return self

    def __exit__(self, *_: object) -> None:
        """Drop what is prepared and end the thread."""
        self._pool.shutdown(cancel_futures=True)
