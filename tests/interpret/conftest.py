"""Indexes of nano models."""

import pytest
import torch

from flexmemory.interpret.index import IndexOptions, build_index
from flexmemory.interpret.reader import MemoryIndex
from flexmemory.model.checkpoint import Checkpoint
from tests.conftest import NANO, random_model
from tests.tol.conftest import write_checkpoint

OPTIONS = IndexOptions(working_bytes=2**21, maps="pca")
"""Chunks of the nano vocabulary (512 tokens, 128 cells) are halves of it."""


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A fp64 nano memory checkpoint with a tokenizer. Not to be changed."""
    folder = tmp_path_factory.mktemp("nano") / "checkpoint"
    return write_checkpoint(folder, random_model(NANO["nano-memory"]), text="one two two three")


@pytest.fixture(scope="session")
def counts() -> torch.Tensor:
    """Occurrences of the nano vocabulary: every third token has none."""
    return torch.where(torch.arange(512) % 3 == 0, 0, torch.arange(512))


@pytest.fixture(scope="session")
def indexed(nano: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> MemoryIndex:
    """The index of `nano`. Not to be changed."""
    out = tmp_path_factory.mktemp("indexed") / "index"
    return build_index(nano, out, options=OPTIONS)
