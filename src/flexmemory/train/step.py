"""One optimizer step on one device.

A micro-batch computes memory rows once per unique id: exact, and less work than once per position, because a row
depends on the token alone. Master weights are fp32; for bf16 they are cast inside the step, so that gradients flow
back to them through the cast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flexmemory.config import TrainConfig
from flexmemory.model.memory import MemoryRows
from flexmemory.model.transformer import Transformer
from flexmemory.train.data import Batch
from flexmemory.train.loss import next_token_loss

LossFunction = Callable[[Batch], tuple[Tensor, Tensor]]
"""From a batch to the loss to minimise and the cross entropy in it."""


class BatchLoss(nn.Module):
    """A model and its loss as one module."""

    def __init__(self, model: Transformer, *, z_loss: float) -> None:
        """Share the parameters of `model`."""
        super().__init__()
        self.model = model
        self.z_loss = z_loss

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss to minimise and the cross entropy in it."""
        rows = None
        if self.model.config.has_memory:
            rows = MemoryRows(self.model.compute_rows(batch.unique_ids), batch.index)
        return next_token_loss(self.model(batch.token_ids, rows), batch.targets, z_loss=self.z_loss)


def loss_function(model: Transformer, *, config: TrainConfig) -> LossFunction:
    """The loss of a micro-batch, in the precision and compiled or not as `config` says for the model's device."""
    on_gpu = next(model.parameters()).is_cuda
    module = BatchLoss(model, z_loss=config.z_loss)

    def in_bf16(batch: Batch) -> tuple[Tensor, Tensor]:
        parameters = {name: parameter.bfloat16() for name, parameter in module.named_parameters()}
        return torch.func.functional_call(module, parameters, (batch,))

    use_bf16 = config.precision == "bf16" or (config.precision == "auto" and on_gpu)
    function: LossFunction = in_bf16 if use_bf16 else module
    if config.compile == "on" or (config.compile == "auto" and on_gpu):
        torch.compiler.reset()  # it counts compilations over all models of a process, and gives up at the eighth
        return torch.compile(function, fullgraph=True)
    return function


class StepValues(NamedTuple):
    """What a step measured."""

    scalars: Tensor
    """(3,), on the device: loss, cross entropy, gradient norm before clipping."""
    num_unique: int
    """Distinct ids, summed over micro-batches."""


def take_step(
    loss_of: LossFunction,
    *,
    batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    lr: float,
    config: TrainConfig,
) -> StepValues:
    """Accumulate gradients over the step's `batches`, clip them, update; nothing here waits for the device."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    device = parameters[0].device
    totals = torch.zeros(2, device=device)
    num_unique = 0
    for batch in batches:
        num_unique += batch.num_unique
        loss, cross_entropy = loss_of(batch.to(device))
        (loss / config.micro_steps).backward()
        totals += torch.stack((loss.detach(), cross_entropy.detach())) / config.micro_steps
    norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return StepValues(torch.cat((totals, norm[None])), num_unique)


def evaluate(loss_of: LossFunction, *, batches: Iterable[Batch], device: torch.device) -> float:
    """Mean cross entropy over all positions of `batches`, in nats, by the compute path of training."""
    total, positions = torch.zeros((), device=device, dtype=torch.float64), 0
    with torch.no_grad():
        for batch in batches:
            total += loss_of(batch.to(device))[1] * batch.token_ids.numel()
            positions += batch.token_ids.numel()
    return float(total) / positions
