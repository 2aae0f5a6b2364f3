"""The optimizer: parameter groups by role, AdamW or Muon, clipping, and state by parameter name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from flexmemory.config import TrainConfig
from flexmemory.train.parallel import World, local

_STATE = {"AdamW": ("step", "exp_avg", "exp_avg_sq"), "Muon": ("momentum_buffer",)}
_HIDDEN = ("attention", "ffn", "memory")
"""Roles of matrices between vectors of the model's width."""


class Optimizer:
    """AdamW over a model, or Muon for its hidden matrices and AdamW for the rest.

    Parameters are grouped by role: `attention`, `ffn` (of a dense model, or FFN-C), `memory` (FFN-M), `table` (free
    tables), `embedding` (with a head tied to it), `head`, `norm`. Matrices decay. Norms do not, nor do embeddings, a
    head tied to one, and free tables: a row of those moves only when its token occurs, and decay would erase rare
    tokens.
    """

    def __init__(self, model: nn.Module, *, config: TrainConfig, world: World | None = None) -> None:
        """Optimize the parameters that `model` has now; `world` says who else holds parts of them."""
        self._size = 1 if world is None else world.size
        self._roles: dict[str, dict[str, nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            self._roles.setdefault(_role(name, parameter), {})[name] = parameter
        muon = [role for role in self._roles if config.optimizer == "muon" and role in _HIDDEN]
        groups = {role: self._group(role, config) for role in self._roles}
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [group for role, group in groups.items() if role not in muon],
                lr=config.lr,
                betas=(config.beta1, config.beta2),
                fused=next(model.parameters()).is_cuda,
            )
        ]
        if muon:
            # Updates as large as AdamW's, so that both take the same rate.
            part = torch.optim.Muon([groups[role] for role in muon], lr=config.lr, adjust_lr_fn="match_rms_adamw")
            self.parts.append(part)

    def _group(self, role: str, config: TrainConfig) -> dict[str, object]:
        scale = {"embedding": config.embedding_lr, "memory": config.memory_lr}.get(role, 1.0)
        decay = config.weight_decay if role in (*_HIDDEN, "head") else 0.0
        return {"params": list(self._roles[role].items()), "weight_decay": decay, "lr_scale": scale, "role": role}

    @property
    def roles(self) -> list[str]:
        """The groups, in the order of the norms that `step` gives."""
        return list(self._roles)

    def step(self, *, lr: float, clip_norm: float) -> Tensor:
        """Clip gradients, update, and drop them; (1 + number of groups,): their norms before, whole and by group."""
        squares = []
        for parameters in self._roles.values():
            gradients = [local(parameter.grad) for parameter in parameters.values() if parameter.grad is not None]
            squares.append(torch.nn.utils.get_total_norm(gradients).float() ** 2)
        summed = torch.stack(squares)
        if self._size > 1:
            torch.distributed.all_reduce(summed)
        norms = torch.cat((summed.sum()[None], summed)).sqrt()
        factor = (clip_norm / (norms[0] + 1e-6)).clamp(max=1.0)
        for parameters in self._roles.values():
            for parameter in parameters.values():
                if parameter.grad is not None:
                    local(parameter.grad).mul_(factor)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr * group["lr_scale"]
            part.step()
            part.zero_grad()
        return norms

    def tensors(self) -> dict[str, Tensor]:
        """The state as `PARAMETER.exp_avg`, `PARAMETER.exp_avg_sq`, `PARAMETER.step` or `PARAMETER.momentum_buffer`.

        Of a parameter that was never updated it is what it starts from.
        """
        found = {}
        for part, keys, names in self._parts():
            state = part.state_dict()["state"]
            for number, (name, parameter) in enumerate(names.items()):
                for key in keys:
                    fresh = torch.zeros(()) if key == "step" else torch.zeros_like(parameter)
                    found[f"{name}.{key}"] = state[number][key] if number in state else fresh
        return found

    def check_names(self, names: Iterable[str]) -> None:
        """Refuse state with other names than this optimizer's.

        Raises:
            ValueError: `names` are not of this model's parameters or of another optimizer.
        """
        odd = set(names) ^ self.tensors().keys()
        if odd:
            raise ValueError(f"the optimizer state does not fit the model: see tensors {', '.join(sorted(odd)[:5])}")

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` gave; learning rates and decay stay those of this optimizer.

        Raises:
            ValueError: `tensors` are not of this model's parameters or of another optimizer.
        """
        self.check_names(tensors)
        for part, keys, names in self._parts():
            packed = part.state_dict()
            packed["state"] = {
                number: {key: tensors[f"{name}.{key}"] for key in keys} for number, name in enumerate(names)
            }
            part.load_state_dict(packed)

    def _parts(self) -> Iterator[tuple[torch.optim.Optimizer, tuple[str, ...], dict[str, nn.Parameter]]]:
        for part in self.parts:
            names = {}
            for group in part.param_groups:
                names |= self._roles[group["role"]]
            yield part, _STATE[type(part).__name__], names


def _role(name: str, parameter: nn.Parameter) -> str:
    if parameter.ndim == 1:
        return "norm"
    parts = name.split(".")
    if parts[0] in ("embedding", "head"):
        return parts[0]
    if "memory" in parts:
        return "table" if "table" in parts else "memory"
    return "attention" if "attention" in parts else "ffn"
