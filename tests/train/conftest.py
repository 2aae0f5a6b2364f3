"""Prepared data and small recipes for the tests of training."""

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flexmemory.config import ModelConfig, TrainConfig
from flexmemory.presets import get_preset
from flexmemory.storage import sha256_file, write_json
from flexmemory.tokenizer import Tokenizer
from flexmemory.train.data import TokenDataset

VOCAB_SIZE = 320
OPTIMIZER_FILE = "optimizer/shard-00001-model-00001-of-00001.safetensors"
"""What one process writes of the optimizer's state."""


def assert_same_state(checkpoint: Path, expected: Path) -> None:
    """Weights and optimizer of two training checkpoints of one process are equal bit for bit."""
    assert (checkpoint / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    found, state = (load_file(folder / OPTIMIZER_FILE) for folder in (checkpoint, expected))
    assert found.keys() == state.keys()
    for name, tensor in found.items():  # the file itself has a header without a fixed order
        assert torch.equal(tensor, state[name]), name


def structured_text(*, sentences: int, seed: int) -> list[str]:
    """Documents of a tiny language: who does what to whom follows from the words before."""
    rng = random.Random(seed)
    nouns = ["fox", "crow", "miller", "river", "lantern", "bishop", "kettle", "harbour"]
    colours = dict(zip(nouns, ["red", "black", "old", "slow", "bright", "pale", "iron", "quiet"], strict=True))
    verbs = {noun: rng.sample(["follows", "forgets", "carries", "answers", "repairs", "avoids"], 2) for noun in nouns}
    documents = []
    for _ in range(sentences // 8):
        noun = rng.choice(nouns)
        lines = []
        for _ in range(8):
            other = nouns[(nouns.index(noun) + rng.randint(1, 2)) % len(nouns)]
            lines.append(f"the {colours[noun]} {noun} {rng.choice(verbs[noun])} the {colours[other]} {other}.")
            noun = other
        documents.append(" ".join(lines))
    return documents


def write_prepared(
    folder: Path, *, tokenizer: Tokenizer, splits: dict[str, list[list[int]]], dtype: str = "uint16", **manifest: object
) -> Path:
    """A prepared data folder; `splits` gives the ids of each shard."""
    folder.mkdir(parents=True)
    tokenizer.save(folder)
    entries = {}
    for split, shards in splits.items():
        described = []
        for number, ids in enumerate(shards):
            file = folder / f"{split}-{number:05d}.bin"
            np.array(ids, dtype=dtype).tofile(file)
            described.append({"file": file.name, "tokens": len(ids), "sha256": sha256_file(file)})
        tokens = [token for ids in shards for token in ids]
        size = len(tokenizer.decode(tokens).encode())
        documents = tokens.count(tokenizer.boundary_id)
        entries[split] = {"documents": documents, "tokens": len(tokens), "bytes": size, "shards": described}
    values = {
        "format": "flexmemory-tokens",
        "format_version": 1,
        "dtype": dtype,
        "vocab_size": tokenizer.vocab_size,
        "boundary_id": tokenizer.boundary_id,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "splits": entries,
        "inputs": ["made by the test"],
    }
    write_json(folder / "manifest.json", {**values, **manifest})
    return folder


def encode(tokenizer: Tokenizer, documents: list[str]) -> list[int]:
    """Documents as one list of ids, each after a boundary."""
    return [token for text in documents for token in (tokenizer.boundary_id, *tokenizer.encode(text))]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(structured_text(sentences=400, seed=0), vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Some 7,000 training tokens in two shards and 300 for validation."""
    train = encode(tokenizer, structured_text(sentences=800, seed=0))
    validation = encode(tokenizer, structured_text(sentences=32, seed=1))
    cut = len(train) // 3
    splits = {"train": [train[:cut], train[cut:]], "validation": [validation]}
    return write_prepared(tmp_path_factory.mktemp("data") / "prepared", tokenizer=tokenizer, splits=splits)


@pytest.fixture(scope="session")
def dataset(prepared: Path) -> TokenDataset:
    return TokenDataset.open(prepared)


def nano(name: str = "memory", **changes: object) -> ModelConfig:
    """A nano model with the vocabulary of `tokenizer`."""
    return dataclasses.replace(get_preset(f"nano-{name}").model, **{"vocab_size": VOCAB_SIZE, **changes})


def recipe(*, steps: int, **changes: object) -> TrainConfig:
    """A short recipe: 2 micro-batches of 2 sequences of 32 tokens a step."""
    values = {
        "total_tokens": steps * 128, "batch_tokens": 128, "seq_len": 32, "micro_batch_size": 2, "log_every": 4,
        "eval_every": 10, "save_every": 10, "eval_tokens": 256,
    }  # fmt: skip
    return dataclasses.replace(get_preset("nano-base").train, **{**values, **changes})
