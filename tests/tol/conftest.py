"""Checkpoints and stores of nano models, with several shards and several blocks in each."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flexmemory.config import ModelConfig
from flexmemory.model.checkpoint import Checkpoint, save_checkpoint
from flexmemory.model.transformer import Transformer
from flexmemory.storage import read_json, write_json
from flexmemory.tokenizer import Tokenizer
from flexmemory.tol.build import build_store
from flexmemory.tol.codec import get_codec
from flexmemory.tol.contract import RowTier
from flexmemory.tol.format import MANIFEST
from flexmemory.tol.store import ToLStore
from tests.conftest import NANO, random_model

SIZES: dict[str, Any] = {"shard_bytes": 40_000, "block_bytes": 5_000, "chunk_tokens": 32}
"""bf16 at the nano size: blocks of 16 rows, chunks of 2 blocks, shards of 8 (the last of 4 shards is whole)."""


def write_checkpoint(folder: Path, model: Transformer, *, text: str | None = None) -> Checkpoint:
    """Save `model`, with a tokenizer trained on `text`."""
    folder.mkdir()
    save_checkpoint(folder, model, None if text is None else Tokenizer.train([text], vocab_size=300))
    return Checkpoint.open(folder)


@pytest.fixture
def checkpoint_of(tmp_path: Path) -> Callable[..., Checkpoint]:
    """`checkpoint_of(config, ...)`: the checkpoint of a random model."""

    def make(
        config: ModelConfig = NANO["nano-memory"],
        *,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        text: str | None = None,
        name: str = "checkpoint",
    ) -> Checkpoint:
        return write_checkpoint(tmp_path / name, random_model(config, seed=seed, dtype=dtype), text=text)

    return make


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A fp32 nano memory checkpoint. Not to be changed."""
    folder = tmp_path_factory.mktemp("nano") / "checkpoint"
    return write_checkpoint(folder, random_model(NANO["nano-memory"], dtype=torch.float32), text="one two")


@pytest.fixture(scope="session", params=["bf16", "fp32"])
def stored(request: pytest.FixtureRequest, nano: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> ToLStore:
    """A store of `nano`, in each codec. Not to be changed."""
    out = tmp_path_factory.mktemp("stored") / request.param
    return build_store(nano, out, codec=request.param, **SIZES)


@pytest.fixture(scope="session")
def _bf16_store(nano: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> ToLStore:
    return build_store(nano, tmp_path_factory.mktemp("bf16") / "store", **SIZES)


@pytest.fixture
def store(_bf16_store: ToLStore, tmp_path: Path) -> ToLStore:
    """A bf16 store of `nano` of the test's own."""
    return ToLStore.open(shutil.copytree(_bf16_store.path, tmp_path / "store"))


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flip_byte(path: Path, position: int) -> None:
    """Damage one byte of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def edit_manifest(store: ToLStore, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite a store's manifest."""
    values = read_json(store.path / MANIFEST)
    change(values)
    write_json(store.path / MANIFEST, values)


def whole_table(store: ToLStore) -> torch.Tensor:
    """Every row, read from the raw files."""
    shards = [(store.path / s.file).read_bytes()[s.data_offset :] for s in store.manifest.shards]
    data = torch.frombuffer(bytearray(b"".join(shards)), dtype=torch.uint8).view(store.vocab_size, store.stride_bytes)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[store.codec]
    return data[:, : store.row_bytes].contiguous().view(dtype).view(store.vocab_size, store.num_slices, -1)


def poisoned(tier: RowTier, count: int) -> torch.Tensor:
    """An output full of NaN for `count` rows."""
    return torch.full((count, tier.num_slices, tier.hidden_size), float("nan"), dtype=tier.dtype)


def rewrite(store: ToLStore, change) -> None:
    """Change the rows of shard 1, (tokens, slices, D), and make its checksums match again."""
    shard = store.manifest.shards[1]
    path = store.path / shard.file
    data = bytearray(path.read_bytes())
    raw = torch.frombuffer(data, dtype=torch.uint8)[shard.data_offset :].view(shard.tokens, store.stride_bytes)
    codec = get_codec(store.codec)
    rows = raw.view(codec.dtype).view(shard.tokens, store.num_slices, store.hidden_size)
    change(rows)
    path.write_bytes(data)
    block = store.manifest.block_rows
    digests = [
        hashlib.sha256(raw[first : first + block].numpy().data).hexdigest() for first in range(0, shard.tokens, block)
    ]
    edit_manifest(store, lambda manifest: manifest["shards"][1].update(blocks=digests))
