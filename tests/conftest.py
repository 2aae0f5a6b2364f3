"""Shared shapes and fixtures: small models of every kind."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from flexmemory.config import ModelConfig
from flexmemory.model.init import new_model
from flexmemory.model.transformer import Transformer
from flexmemory.presets import PRESETS

NANO = {name: preset.model for name, preset in PRESETS.items() if name.startswith("nano-")}
VARIED: dict[str, ModelConfig] = {
    **NANO,
    "grouped-query": dataclasses.replace(NANO["nano-flex3"], num_kv_heads=2),
    "untied": dataclasses.replace(NANO["nano-memory"], tie_embeddings=False),
    "square-1": dataclasses.replace(NANO["nano-flex1"], ffn_c="square"),
    "square-2": dataclasses.replace(NANO["nano-flex2"], ffn_c="square"),
    "table": dataclasses.replace(NANO["nano-memory"], memory_kind="table", intermediate_size=0),
    "ffn+table": dataclasses.replace(NANO["nano-flex1"], memory_kind="ffn+table"),
}
"""Every architecture and option, at the nano size."""
WITH_MEMORY = {name: config for name, config in VARIED.items() if config.has_memory}

torch.set_num_threads(1)  # nano models gain nothing from threads, and lose much where cores are shared


def random_model(config: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Transformer:
    """A model whose every tensor is random and of order one, so that no term can hide."""
    model = new_model(config, seed=seed).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            scale = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(noise * scale + (parameter.ndim == 1))
    return model.eval()


@pytest.fixture
def tokens() -> Callable[..., torch.Tensor]:
    """`tokens(batch, length)`: random ids of the nano vocabulary, with repeats."""

    def draw(batch: int, length: int, *, vocab_size: int = 512, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(vocab_size, (batch, length), generator=generator)
        ids[:, length // 2] = ids[:, 0]  # repeats in every sequence
        return ids

    return draw
