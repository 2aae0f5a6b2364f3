"""A ToL store opened for reading: found whole, and built from the checkpoint at hand."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from flexmemory.model.checkpoint import Checkpoint
from flexmemory.storage import sha256_file
from flexmemory.tol.codec import get_codec
from flexmemory.tol.coding import SliceTensors
from flexmemory.tol.counts import COUNTS, most_frequent, read_counts
from flexmemory.tol.format import Block, Manifest, ToLMismatchError, check_header, read_manifest
from flexmemory.tol.pages import read_exactly
from flexmemory.tol.scheme import Band, tensors_from_file

TENSORS = "tensors.safetensors"
"""What coded rows are decoded with (`tol.scheme.tensors_to_file`)."""
ORDER = "order.safetensors"
"""One tensor `order` [V] int32: the token at each place."""
READ_THREADS = min(8, os.cpu_count() or 1)
"""Threads that read and hash blocks; each holds one block in memory."""

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class ToLStore:
    """Token-wise lookups on disk. `open` makes one; `tol.tiers` reads rows from it."""

    path: Path
    manifest: Manifest
    tensors: tuple[tuple[SliceTensors, ...], ...] = ()
    """What each slice of each band is decoded with, where rows are coded in few bits."""
    order: Int64[Tensor, " V"] | None = None
    """The token at each place of the rows; None where that is its id."""

    @classmethod
    def open(
        cls, path: str | Path, *, checkpoint: Checkpoint | None = None, keep_layers: int | None = None
    ) -> ToLStore:
        """Open a store: its files are there, have their sizes and fit the manifest. Rows are not read.

        Args:
            path: The store's folder.
            checkpoint: The model that will use the rows; without it nothing tells whether they fit.
            keep_layers: Read only so many layers of each row, the first ones, which are the most important.

        Raises:
            FileNotFoundError: there is no whole store at `path`.
            ToLMismatchError: it was built from another checkpoint or with another tokenizer.
            ValueError: it is damaged, of a newer format or of an unknown codec.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        for shard in manifest.shards:
            file = folder / shard.file
            size = file.stat().st_size if file.is_file() else None
            if size != manifest.shard_bytes(shard):
                expected = manifest.shard_bytes(shard)
                found = "is missing" if size is None else f"has {size} bytes, expected {expected}"
                raise ValueError(f"ToL store {folder} is incomplete: {shard.file} {found}; build it again")
            check_header(manifest, shard, folder)
        if manifest.counts is not None and not (folder / COUNTS).is_file():
            raise ValueError(f"ToL store {folder} is incomplete: {COUNTS} is missing; build it again")
        if checkpoint is not None:
            _check_source(folder, manifest, checkpoint)
        tensors, order = _read_coded(folder, manifest)
        if keep_layers is not None:
            manifest = manifest.prefix(keep_layers)
        return cls(folder, manifest, tensors, order)

    @property
    def plain(self) -> bool:
        """Whether rows are numbers as they are, all alike."""
        return self.manifest.coded is None

    @property
    def bands(self) -> tuple[Band, ...]:
        """How rows are coded in few bits; empty where they are not."""
        return () if self.manifest.coded is None else self.manifest.coded.bands

    @functools.cached_property
    def positions(self) -> Int64[Tensor, " V"] | None:
        """The place of each token's row; None where that is its id."""
        return None if self.order is None else torch.argsort(self.order)

    def band_of(self, positions: Int64[Tensor, " U"]) -> Int64[Tensor, " U"]:
        """The band of the row at each place."""
        ends = torch.tensor([band.tokens for band in self.bands]).cumsum(0)
        return torch.bucketize(positions, ends, right=True)

    @property
    def decoded_dtype(self) -> torch.dtype:
        """Dtype of rows in memory: the codec's, or bf16 for rows that are coded in few bits."""
        return get_codec(self.codec).dtype if self.plain else torch.bfloat16

    @property
    def codec(self) -> str:
        """Name of the codec."""
        return self.manifest.codec

    @property
    def paths(self) -> list[Path]:
        """The files that hold rows, in the order of their tokens."""
        return [self.path / shard.file for shard in self.manifest.shards]

    @property
    def embedding(self) -> bool:
        """Whether a row begins with the token's input embedding."""
        return self.manifest.embedding

    @property
    def num_slices(self) -> int:
        """Slices of D numbers in a row: layers, and one for the embedding where it is carried."""
        return self.manifest.num_slices

    @property
    def layers(self) -> tuple[int, ...]:
        """The model's layers that a row holds, in the row's order."""
        return self.manifest.layers

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.manifest.hidden_size

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.manifest.vocab_size

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's rows."""
        return self.manifest.row_bytes

    @property
    def stride_bytes(self) -> int:
        """Bytes from one row to the next: the most, where bands differ."""
        return self.manifest.stride_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all rows with their padding."""
        return self.manifest.nbytes

    def counts(self) -> Int64[Tensor, " V"] | None:
        """How often each token occurs, checked, or None where that was not counted.

        Raises:
            ValueError: the file is damaged.
        """
        entry = self.manifest.counts
        return None if entry is None else read_counts(self.path, entry, vocab_size=self.vocab_size)

    def hot_ids(self, num_ids: int) -> Int64[Tensor, " H"]:
        """The `num_ids` most frequent ids, or all if they are fewer; ties by id.

        Raises:
            ValueError: the store has no counts, or they are damaged.
        """
        counts = self.counts()
        if counts is None:
            raise ValueError(
                f"ToL store {self.path} does not say how frequent tokens are; build it with --counts DATA, "
                "or let frequent rows be learnt from traffic"
            )
        return most_frequent(counts, num_ids)

    def read_block(self, block: Block) -> np.ndarray:
        """The bytes of a block, (tokens, stride) uint8, not checked.

        Raises:
            OSError: the file cannot be read, or ends early.
        """
        data = np.empty((block.tokens, block.stride_bytes), np.uint8)
        path = self.path / block.file
        descriptor = os.open(path, os.O_RDONLY)
        try:
            read_exactly(descriptor, [data.reshape(-1).data], offset=block.offset, path=path)
        finally:
            os.close(descriptor)
        return data

    def damaged_blocks(self) -> list[Block]:
        """The blocks that do not match their checksum.

        Raises:
            OSError: a file cannot be read.
        """
        intact = self._map_blocks(lambda block: block.matches(self.read_block(block)), label="checking rows")
        return [block for block, good in zip(self.manifest.blocks(), intact, strict=True) if not good]

    def read_table(self, out: Float[Tensor, "V slices D"]) -> None:
        """Fill `out`, on any device and of the codec's dtype, with every row of a plain store, checking all of them.

        Raises:
            OSError: a file cannot be read.
            ValueError: a block does not match its checksum.
        """
        codec = get_codec(self.codec)

        def load(block: Block) -> None:
            rows = out[block.first_token : block.first_token + block.tokens]
            codec.decode(torch.from_numpy(self._checked(block))[:, : self.row_bytes], rows)

        for _ in self._map_blocks(load, label="loading rows"):
            pass

    def read_packed(self, out: UInt8[Tensor, " bytes"], pitches: Sequence[int]) -> None:
        """Fill `out`, on any device, with every coded row as it is stored, checking all of them.

        Rows come in the order of their places, band after band, those of band b `pitches[b]` bytes apart.

        Raises:
            OSError: a file cannot be read.
            ValueError: a block does not match its checksum.
        """
        starts, tokens, at = [0], [0], 0
        for band, pitch in zip(self.bands, pitches, strict=True):
            at += band.tokens * pitch
            starts.append(at)
            tokens.append(tokens[-1] + band.tokens)
        assert out.shape == (at,)

        def load(block: Block) -> None:
            pitch, size = pitches[block.band], self.bands[block.band].row_bytes
            start = starts[block.band] + (block.first_token - tokens[block.band]) * pitch
            rows = out[start : start + block.tokens * pitch].view(block.tokens, pitch)
            rows[:, :size] = torch.from_numpy(self._checked(block))[:, :size]

        for _ in self._map_blocks(load, label="loading rows"):
            pass

    def _checked(self, block: Block) -> np.ndarray:
        data = self.read_block(block)
        if not block.matches(data):
            raise ValueError(f"ToL store {self.path} is damaged: {block} do not match their checksum; build it again")
        return data

    def _map_blocks(self, function: Callable[[Block], Result], *, label: str) -> Iterator[Result]:
        """`function` of every block, in order, on several threads (reading and hashing release the GIL)."""
        blocks = list(self.manifest.blocks())
        with concurrent.futures.ThreadPoolExecutor(READ_THREADS) as pool:
            yield from tqdm(pool.map(function, blocks), total=len(blocks), desc=label, unit="block", disable=None)


def _read_coded(
    folder: Path, manifest: Manifest
) -> tuple[tuple[tuple[SliceTensors, ...], ...], Int64[Tensor, " V"] | None]:
    """What rows in few bits are decoded with, and the order of rows, both checked."""
    coded = manifest.coded
    if coded is None:
        return (), None
    stored = _load(folder / TENSORS, coded.tensors_sha256)
    try:
        tensors = tensors_from_file(stored, bands=coded.bands, hidden_size=manifest.hidden_size)
        order = _load(folder / ORDER, coded.order_sha256)["order"].long() if coded.order_sha256 else None
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{folder} does not hold what its rows are decoded with ({error}); build it again") from error
    if order is not None and not torch.equal(order.sort().values, torch.arange(manifest.vocab_size)):
        raise ValueError(f"{folder / ORDER} is not an order of {manifest.vocab_size} tokens; build the store again")
    return tensors, order


def _load(path: Path, sha256: str) -> dict[str, Tensor]:
    if not path.is_file() or sha256_file(path) != sha256:
        reason = "does not match its checksum" if path.is_file() else "is missing"
        raise ValueError(f"ToL store {path.parent} is damaged: {path.name} {reason}; build it again")
    return load_file(path)


def _check_source(folder: Path, manifest: Manifest, checkpoint: Checkpoint) -> None:
    built_from = manifest.checkpoint_fingerprint
    if manifest.edits and checkpoint.fingerprint == manifest.edits[-1].fingerprint:
        built_from = checkpoint.fingerprint  # edited alike
    pairs = {
        "checkpoint": (built_from, checkpoint.fingerprint),
        "tokenizer": (manifest.tokenizer_fingerprint, checkpoint.tokenizer_fingerprint),
    }
    differing = [
        f"another {name} (fingerprint {built[:12] or 'none'}, {checkpoint.path} has {here[:12] or 'none'})"
        for name, (built, here) in pairs.items()
        if built != here
    ]
    if differing:
        raise ToLMismatchError(
            f"ToL store {folder} was built from {' and '.join(differing)}; use the checkpoint that it was built from, "
            "or build a store from this one with `flexmemory tol build`"
        )
