"""Nano models of every kind, in transformers' clothes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from flexmemory.config import ModelConfig, to_dict
from flexmemory.hf import FlexMemoryConfig
from flexmemory.model.checkpoint import save_checkpoint
from flexmemory.tokenizer import Tokenizer
from tests.conftest import VARIED, random_model

transformers.utils.logging.disable_progress_bar()
MINI = Path(__file__).parents[2] / "models"
"""Two small English models with one tokenizer."""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """`checkpoint(name)`: a folder of this package with a random model of `VARIED`."""

    def write(name: str, *, dtype: torch.dtype = torch.float32, tokenizer: Tokenizer | None = None) -> Path:
        folder = tmp_path / name.replace("+", "-")
        folder.mkdir()
        save_checkpoint(folder, random_model(VARIED[name], dtype=dtype), tokenizer)
        return folder

    return write


@pytest.fixture
def load(checkpoint: Callable[..., Path]) -> Callable[..., Any]:
    """`load(name)`: that model, by transformers."""

    def read(name: str, *, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        return opened(checkpoint(name, dtype=dtype), **options)

    return read


def opened(folder: str | Path, **options: Any) -> Any:
    """The causal language model of a folder, as users open it, untyped as they use it."""
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def config_of(model: ModelConfig, **changes: Any) -> FlexMemoryConfig:
    """The configuration of a core model, with changes."""
    return FlexMemoryConfig(**(to_dict(model) | changes))
