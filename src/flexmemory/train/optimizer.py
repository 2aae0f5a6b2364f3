"""AdamW, its parameter groups, and its state by parameter name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flexmemory.config import TrainConfig

_STATE = ("step", "exp_avg", "exp_avg_sq")


def make_optimizer(model: nn.Module, *, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over `model`; one fused kernel on a GPU.

    Matrices decay. Norms do not, nor do embeddings, a head tied to one, and free tables: a row of those moves only
    when its token occurs, and decay would erase rare tokens.
    """
    lookups = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: dict[bool, list[tuple[str, nn.Parameter]]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[parameter.ndim > 1 and id(parameter) not in lookups].append((name, parameter))
    return torch.optim.AdamW(
        [{"params": params, "weight_decay": config.weight_decay * decays} for decays, params in groups.items()],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        fused=next(model.parameters()).is_cuda,
    )


def optimizer_tensors(optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """The state as `PARAMETER.exp_avg`, `PARAMETER.exp_avg_sq` and `PARAMETER.step`."""
    state = optimizer.state_dict()["state"]
    return {f"{name}.{key}": state[i][key] for i, name in enumerate(_names(optimizer)) for key in _STATE}


def load_optimizer_tensors(optimizer: torch.optim.AdamW, tensors: Mapping[str, Tensor]) -> None:
    """Restore what `optimizer_tensors` gave; learning rate and decay stay those of `optimizer`.

    Raises:
        ValueError: `tensors` are not of this model's parameters.
    """
    names = _names(optimizer)
    odd = tensors.keys() ^ {f"{name}.{key}" for name in names for key in _STATE}
    if odd:
        raise ValueError(f"the optimizer state does not fit the model: see tensors {', '.join(sorted(odd)[:5])}")
    packed = optimizer.state_dict()
    packed["state"] = {i: {key: tensors[f"{name}.{key}"] for key in _STATE} for i, name in enumerate(names)}
    optimizer.load_state_dict(packed)


def _names(optimizer: torch.optim.AdamW) -> list[str]:
    return [name for group in optimizer.state_dict()["param_groups"] for name in group["param_names"]]
