"""One optimizer step on one device.

Memory rows depend on the token alone, so they are computed once per unique id, and exactly so for a whole optimizer
step: its table of rows is computed once and detached, each micro-batch's backward pass adds to the table's gradient,
and one backward pass through FFN-M follows. That is the gradient of the sum, because the loss reaches FFN-M only
through the table. Master weights are fp32; for bf16 they are cast inside the step, so that gradients flow back to them
through the cast.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from flexmemory.config import TrainConfig
from flexmemory.model.accounting import row_training_bytes
from flexmemory.model.memory import MemoryRows
from flexmemory.model.transformer import Transformer
from flexmemory.train.data import Batch
from flexmemory.train.loss import next_token_loss

Table = Float[Tensor, "U L D"]
logger = logging.getLogger(__name__)


class RowTable(nn.Module):
    """The rows of a model as a function of its parameters."""

    def __init__(self, model: Transformer) -> None:
        """Share the parameters of `model`."""
        super().__init__()
        self.model = model

    def forward(self, unique_ids: Int[Tensor, " U"]) -> Table:
        """Rows of each id in every layer."""
        return self.model.compute_rows(unique_ids)


class BatchLoss(nn.Module):
    """A model and its loss as a function of parameters and rows."""

    def __init__(self, model: Transformer, *, z_loss: float) -> None:
        """Share the parameters of `model`."""
        super().__init__()
        self.model = model
        self.z_loss = z_loss

    def forward(self, batch: Batch, table: Table | None) -> tuple[Tensor, Tensor]:
        """The loss to minimise and the cross entropy in it."""
        rows = None if table is None else MemoryRows(table, batch.index)
        return next_token_loss(self.model(batch.token_ids, rows), batch.targets, z_loss=self.z_loss)


class StepFunctions(NamedTuple):
    """What a step computes, in the precision and compiled or not as the run asks."""

    table_of: Callable[[Tensor], Table] | None
    """From unique ids (U,) to their rows; None for a dense model."""
    loss_of: Callable[[Batch, Table | None], tuple[Tensor, Tensor]]
    """From a batch and the rows of its unique ids to the loss to minimise and the cross entropy in it."""

    def table(self, batch: Batch) -> Table | None:
        """The rows of a batch's unique ids."""
        return None if self.table_of is None else self.table_of(batch.unique_ids)


def uses_bf16(config: TrainConfig, device: torch.device) -> bool:
    """Whether a run on `device` computes in bf16."""
    return config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")


def rows_fit(model: Transformer, *, config: TrainConfig, num_unique: int, free_bytes: int) -> bool:
    """Whether the rows of `num_unique` ids may be computed at once: by an estimate, and with half of memory kept free.

    The other half is for gradients, optimizer state and a micro-batch's activations.
    """
    number = 2 if uses_bf16(config, model.embedding.weight.device) else 4
    needed = row_training_bytes(model.config, num_unique=num_unique, bytes_per_number=number)
    fits = needed < free_bytes // 2
    logger.info(
        "rows of %s unique ids a step take about %.2f GB of %.2f GB free: computed once per %s",
        f"{num_unique:,}",
        needed / 1e9,
        free_bytes / 1e9,
        "step" if fits else "micro-batch",
    )
    return fits


def step_functions(model: Transformer, *, config: TrainConfig) -> StepFunctions:
    """The functions of a run's steps for the device that `model` is on."""
    device = model.embedding.weight.device
    compiled = config.compile == "on" or (config.compile == "auto" and device.type == "cuda")
    if compiled:
        torch.compiler.reset()  # it counts compilations over all models of a process, and gives up at the eighth

    def prepared(module: nn.Module, names: Collection[str]) -> Callable[..., Any]:
        def in_bf16(*inputs: object) -> Any:
            cast = {name: parameter.bfloat16() for name, parameter in module.named_parameters() if name in names}
            return torch.func.functional_call(module, cast, inputs)

        function = in_bf16 if uses_bf16(config, device) else module
        return torch.compile(function, fullgraph=True) if compiled else function

    loss = BatchLoss(model, z_loss=config.z_loss)
    names = {name for name, _ in loss.named_parameters()}
    memory = {name for name in names if ".memory." in name}
    table_of = prepared(RowTable(model), memory | {"model.embedding.weight"}) if memory else None
    return StepFunctions(table_of, prepared(loss, names - memory))


class StepValues(NamedTuple):
    """What a step measured."""

    scalars: Tensor
    """(3,), on the device: loss, cross entropy, gradient norm before clipping."""
    num_unique: int
    """Rows computed, padding apart: distinct ids, summed over the step's tables."""


def take_step(
    functions: StepFunctions,
    *,
    batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    lr: float,
    config: TrainConfig,
) -> StepValues:
    """Accumulate gradients over the step's `batches`, clip them, update; nothing here waits for the device.

    Each batch has one table of rows; together they hold the step's sequences.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    device = parameters[0].device
    totals = torch.zeros(2, device=device)
    num_unique = 0
    for batch in batches:
        num_unique += batch.num_unique
        totals += accumulate(functions, batch.to(device), config=config)
    norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return StepValues(torch.cat((totals, norm[None])), num_unique)


def accumulate(functions: StepFunctions, batch: Batch, *, config: TrainConfig) -> Tensor:
    """Add the gradients of a batch; (2,): its share of the step's loss and cross entropy."""
    table = functions.table(batch)
    leaf = None if table is None else table.detach().requires_grad_()
    gradient = None if table is None else torch.zeros_like(table, dtype=torch.promote_types(table.dtype, torch.float32))
    totals = torch.zeros(2, device=batch.token_ids.device)
    for part in batch.split(config.micro_batch_size):
        loss, cross_entropy = functions.loss_of(part, leaf)
        (loss / config.micro_steps).backward()
        totals += torch.stack((loss.detach(), cross_entropy.detach())) / config.micro_steps
        if leaf is not None:
            assert gradient is not None
            assert leaf.grad is not None
            gradient += leaf.grad
            leaf.grad = None
    if table is not None:
        assert gradient is not None
        table.backward(gradient.to(table.dtype))
    return totals


def evaluate(functions: StepFunctions, *, batches: Iterable[Batch], device: torch.device) -> float:
    """Mean cross entropy over all positions of `batches`, in nats, by the compute path of training."""
    total, positions = torch.zeros((), device=device, dtype=torch.float64), 0
    with torch.no_grad():
        for batch in batches:
            there = batch.to(device)
            total += functions.loss_of(there, functions.table(there))[1] * batch.token_ids.numel()
            positions += batch.token_ids.numel()
    return float(total) / positions
