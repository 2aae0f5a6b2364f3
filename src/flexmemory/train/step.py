"""One optimizer step, in one process or many.

Memory rows depend on the token alone, so they are computed once per unique id, and exactly so for a whole optimizer
step: see train/rows.py. Master weights are fp32; FSDP2 spreads them over the processes and casts them to bf16 once a
step (train/parallel.py), also on a single GPU. In fp32 in one process nothing is spread or cast.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from flexmemory.config import TrainConfig
from flexmemory.model.accounting import row_training_bytes
from flexmemory.model.memory import Rows
from flexmemory.model.transformer import MemoryBlock, Transformer
from flexmemory.train.cost import rows_job_pays
from flexmemory.train.data import Batch
from flexmemory.train.loss import LogitsLoss, distillation, head_loss, logits_loss_and_gradient
from flexmemory.train.optimizer import Optimizer
from flexmemory.train.parallel import RowExchange, World, exchange_rate, set_last_backward, spread
from flexmemory.train.phases import Phases
from flexmemory.train.rows import TrainedRows

ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""Fastest first (docs/log.md); the first that knows the device and the head's width is taken."""
KEPT_ROWS = 1.25
"""Rows whose activations are kept, at most, as a multiple of the positions of a micro-batch."""
logger = logging.getLogger(__name__)


class Teacher:
    """A model to learn from: not a part of what is trained."""

    def __init__(self, model: Transformer) -> None:
        """Learn from `model`, which is on the device and in the dtype of the run's computing."""
        self._model = model.requires_grad_(False)
        self.loss: LogitsLoss = distillation(model.head.weight)

    @torch.no_grad()
    def targets(self, token_ids: Tensor) -> Tensor:
        """What its head reads at each position, for `loss`."""
        return self._model.hidden_states(token_ids)


class TrainingModel(nn.Module):
    """A model and its loss: what is compiled, spread over processes, and called in a step."""

    def __init__(self, model: Transformer, *, config: TrainConfig, world: World) -> None:
        """Share the parameters of `model`; see `training_model`."""
        super().__init__()
        self.model = model
        self.config = config
        self.world = world
        self.phases = Phases(world.device)
        self.logits_loss: LogitsLoss = logits_loss_and_gradient
        self.teacher: Teacher | None = None
        """Whose predictions are learnt instead of the text's next tokens."""
        self.rows_per = config.rows_per
        """What rows are computed once per; `auto` counts as the step until `choose_rows` has chosen."""
        self.kept_layers = model.config.num_layers
        """Layers whose FFN-M keeps its activations for the backward pass; the others compute them again."""

    @property
    def micro_steps(self) -> int:
        """Forward passes of this process in an optimizer step."""
        return self.config.micro_steps // self.world.size

    def layers_to_keep(self, num_unique: int) -> int:
        """Layers whose FFN-M is to keep its activations of `num_unique` ids.

        The dense model keeps its FFN's for each position of a micro-batch: keep not many more.
        """
        share = KEPT_ROWS * self.config.micro_batch_size * self.config.seq_len / num_unique
        return int(min(1.0, share) * self.model.config.num_layers)

    def compute_rows(self, unique_ids: Tensor) -> Tensor:
        """Rows and embeddings of `unique_ids` (U,) as one table (U, L + 1, D)."""
        embeddings = self.model.embed(unique_ids)
        rows = [memory(unique_ids, embeddings) for memory in self.model.memories]
        return torch.stack([*rows, embeddings], dim=1)

    def rows(self, batch: Batch) -> TrainedRows | None:
        """The rows of a batch's unique ids, on the device of the model; None for a dense model."""
        if not self.model.config.has_memory:
            return None
        device, exchange = self.world.device, None
        if self.rows_per == "job" and self.world.size > 1:
            exchange = RowExchange(batch.unique_ids, world=self.world).to(device)
        self.kept_layers = self.layers_to_keep(len(batch.unique_ids))
        with self.phases.phase("rows"):
            unique_ids = batch.unique_ids.to(device)
            return TrainedRows(self.compute_rows, unique_ids, num_unique=batch.num_unique, exchange=exchange)

    def forward(self, batch: Batch, rows: Rows | None, share: float = 1.0) -> tuple[Tensor, Tensor]:
        """`share` times the loss to minimise, and `share` times the cross entropy in it.

        With a teacher, where gradients are wanted, both are the divergence from it.
        """
        targets, logits_loss = batch.targets, self.logits_loss
        with sdpa_kernel(ATTENTION, set_priority=True):
            hidden = self.model.hidden_states(batch.token_ids, rows)
            if self.teacher is not None and torch.is_grad_enabled():
                targets, logits_loss = self.teacher.targets(batch.token_ids), self.teacher.loss
        with self.phases.phase("head"):
            return head_loss(
                hidden,
                self.model.head.weight,
                targets,
                z_loss=self.config.z_loss,
                share=share,
                logits_loss=logits_loss,
            )


def uses_bf16(config: TrainConfig, device: torch.device) -> bool:
    """Whether a run on `device` computes in bf16."""
    return config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")


def training_model(model: Transformer, *, config: TrainConfig, world: World | None = None) -> TrainingModel:
    """`model` as a run trains it: compiled, in bf16, and spread over `world`, each where the run asks for it.

    Its parameters may be others afterwards: make the optimizer later.
    """
    world = world or World(device=model.device)
    module = TrainingModel(model, config=config, world=world)
    if config.compile == "on" or (config.compile == "auto" and world.device.type == "cuda"):
        _compile(module)
    _recompute_memories(module)
    bf16 = uses_bf16(config, world.device)
    if bf16 or world.size > 1:
        memories = [block.memory for block in model.blocks if isinstance(block, MemoryBlock) and block.memory]
        # An embedding of its own gets its gradient from the table alone, so it cannot be summed with the head's.
        own = [] if model.config.tie_embeddings or model.embedding is None else [model.embedding]
        spread(
            module,
            units=[*model.blocks, *own],
            brief_units=memories,
            methods=["compute_rows"],
            bf16=bf16,
            world=world,
        )
    return module


def _compile(module: TrainingModel) -> None:
    """Compile what blocks, their memories and the loss compute: one graph of each serves all layers."""
    torch.compiler.reset()  # it counts compilations over all models of a process, and gives up at the eighth

    def compiled(function: Callable[..., Any], *, dynamic: bool | None = None) -> Any:
        return torch.compile(function, fullgraph=True, dynamic=dynamic)

    for block in module.model.blocks:
        block.forward = compiled(block.forward)
        if isinstance(block, MemoryBlock) and block.memory is not None:
            block.memory.forward = compiled(block.memory.forward, dynamic=True)  # unique ids vary in number
    if module.world.device.type == "cuda":
        from flexmemory.train.kernels import logits_loss_in_place  # Triton is there where a GPU is

        module.logits_loss = logits_loss_in_place
    else:
        module.logits_loss = compiled(logits_loss_and_gradient)


def _recompute_memories(module: TrainingModel) -> None:
    """Let memories compute their activations again in the backward pass, but for the first `module.kept_layers`."""

    def recomputing(forward: Callable[..., Any], layer: int) -> Callable[..., Any]:
        def choose(*inputs: Tensor) -> Any:
            if layer < module.kept_layers or not torch.is_grad_enabled():
                return forward(*inputs)
            return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)

        return choose

    for layer, block in enumerate(module.model.blocks):
        if isinstance(block, MemoryBlock) and block.memory is not None:
            block.memory.forward = recomputing(block.memory.forward, layer)


def rows_fit(module: TrainingModel, *, num_unique: int, free_bytes: int) -> bool:
    """Whether the rows of `num_unique` ids may be computed at once: by an estimate, and with half of memory kept free.

    The other half is for gradients, optimizer state and a micro-batch's activations.
    """
    number = 2 if uses_bf16(module.config, module.world.device) else 4
    needed = row_training_bytes(
        module.model.config,
        num_unique=num_unique,
        bytes_per_number=number,
        kept_layers=module.layers_to_keep(num_unique),
    )
    fits = needed < free_bytes // 2
    logger.info(
        "rows of %s unique ids a step take about %.2f GB of %.2f GB free: computed once per %s",
        f"{num_unique:,}",
        needed / 1e9,
        free_bytes / 1e9,
        "step" if fits else "micro-batch",
    )
    return fits


def choose_rows(
    module: TrainingModel, first: Batch, *, matmul_flops_per_s: float, free_bytes: int
) -> Literal["job", "step", "micro-batch"]:
    """What `rows_per="auto"` means for a run whose first share of a step is `first`.

    The job's ids are counted and the speed of an exchange measured, by all processes together.
    """
    world = module.world
    fits = rows_fit(module, num_unique=first.num_unique, free_bytes=free_bytes)
    if world.any(not fits):
        return "micro-batch"
    if world.size == 1:
        return "step"
    occurs = torch.zeros(module.model.config.vocab_size)
    occurs[first.unique_ids] = 1.0
    job_ids = int((world.sum(occurs) > 0).sum())
    choice = rows_job_pays(
        module.model.config,
        rank_ids=first.num_unique,
        job_ids=job_ids,
        world_size=world.size,
        matmul_flops_per_s=matmul_flops_per_s,
        exchange_bytes_per_s=exchange_rate(world),
    )
    pays = not world.any(not choice.pays)
    logger.info(
        "%s unique ids in all processes, %s in one: computing each once in the job saves %.1f ms a step and exchanging "
        "rows takes %.1f ms: once per %s",
        f"{job_ids:,}",
        f"{first.num_unique:,}",
        1e3 * choice.saved_s,
        1e3 * choice.exchange_s,
        "job" if pays else "step",
    )
    return "job" if pays else "step"


class StepValues(NamedTuple):
    """What a step measured."""

    scalars: Tensor
    """On the device: loss and cross entropy of this process's share, then gradient norms before clipping: the whole,
    and one for each group of the optimizer."""
    num_unique: int
    """Rows computed by this process, padding apart: distinct ids, summed over its tables."""


def take_step(
    module: TrainingModel, *, batches: Iterable[Batch], num_batches: int, optimizer: Optimizer, lr: float
) -> StepValues:
    """Accumulate gradients over the step's `batches`, clip them, update; nothing here waits for a GPU.

    Each of the `num_batches` batches has one table of rows; together they are this process's share of the step.
    """
    totals = torch.zeros(2, device=module.world.device)
    num_unique = 0
    for number, batch in enumerate(batches, start=1):
        values, computed = accumulate(module, batch, last=number == num_batches)
        totals += values
        num_unique += computed
    with module.phases.phase("optimizer"):
        norms = optimizer.step(lr=lr, clip_norm=module.config.clip_norm)
    return StepValues(torch.cat((totals / module.world.size, norms)), num_unique)


def accumulate(module: TrainingModel, batch: Batch, *, last: bool = True) -> tuple[Tensor, int]:
    """Add the gradients of a batch; (2,), its share of this process's loss and cross entropy, and rows computed.

    `last` says that no other batch follows in the step: gradients are summed over processes at its end.
    """
    rows = module.rows(batch)
    there = batch.to(module.world.device)
    totals = torch.zeros(2, device=module.world.device)
    parts = list(there.split(module.config.micro_batch_size))
    for number, part in enumerate(parts, start=1):
        with module.phases.phase("batches"):
            set_last_backward(module, last and rows is None and number == len(parts))
            loss, cross_entropy = module(part, rows and rows.at(part.index), 1 / module.micro_steps)
            loss.backward()
        totals += torch.stack((loss.detach(), cross_entropy))
    if rows is not None:
        with module.phases.phase("rows"):
            set_last_backward(module, last)
            rows.backward()
    return totals, 0 if rows is None else rows.num_computed


def evaluate(module: TrainingModel, batches: Iterable[Batch], *, num_counted: int) -> float:
    """Mean cross entropy over all positions of the batches of all processes, in nats, by the compute path of training.

    Of this process's `batches` the first `num_counted` count; others keep it in step with processes that have more.
    """
    totals = torch.zeros(2, device=module.world.device, dtype=torch.float64)
    with torch.no_grad(), module.phases.paused():
        for number, batch in enumerate(batches):
            rows = module.rows(batch)
            there = batch.to(module.world.device)
            _, cross_entropy = module(there, rows and rows.at(there.index))
            if number < num_counted:
                positions = batch.token_ids.numel()
                totals += torch.stack((cross_entropy.double() * positions, totals.new_tensor(positions)))
    total, positions = module.world.sum(totals).tolist()
    return total / positions
