"""Initial weights: one function sets every tensor of a model."""

from __future__ import annotations

import torch
from torch import nn

from flexmemory.config import ModelConfig
from flexmemory.model.memory import LayerMemory
from flexmemory.model.transformer import Transformer

INIT_STD = 0.02


def initial_scales(model: Transformer) -> dict[nn.Parameter, tuple[float, float]]:
    """Mean and standard deviation of the normal distribution that each parameter starts from.

    Matrices and embeddings have std 0.02; those that write to the residual stream are smaller by sqrt(2 L), so that its
    variance does not grow with depth (GPT-2's rule). Norms are 1. Free tables are 0: a model starts from what its other
    parts do.
    """
    residual_std = INIT_STD / (2 * model.config.num_layers) ** 0.5
    tables = {m.table.weight for m in model.modules() if isinstance(m, LayerMemory) and m.table is not None}
    scales = {}
    for name, parameter in model.named_parameters():
        if parameter in tables:
            scales[parameter] = (0.0, 0.0)
        elif parameter.ndim == 1:
            scales[parameter] = (1.0, 0.0)
        else:
            scales[parameter] = (0.0, residual_std if name.endswith((".output.weight", ".down.weight")) else INIT_STD)
    return scales


def init_weights(model: Transformer, *, seed: int) -> None:
    """Fill `model` in place by `initial_scales`, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter, (mean, std) in initial_scales(model).items():
            if std == 0:
                parameter.fill_(mean)
            else:
                values = torch.empty(parameter.shape, dtype=torch.float32).normal_(mean, std, generator=generator)
                parameter.copy_(values)


def new_model(config: ModelConfig, *, seed: int, device: torch.device | str = "cpu") -> Transformer:
    """A freshly initialised fp32 model on `device`."""
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device=device)
    model.tie_head()
    init_weights(model, seed=seed)
    return model
