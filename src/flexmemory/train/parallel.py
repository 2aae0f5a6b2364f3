"""One process or many: who we are, how weights are spread, what processes tell each other.

`torchrun --nproc-per-node 8 -m flexmemory train ...` starts one process per GPU. Weights, gradients and optimizer state
are spread over them by PyTorch's FSDP2, which also casts weights to bf16 once a step: so a single GPU takes the same
path. Every process calls each function here at the same point of the program.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from flexmemory.device import resolve_device

BUCKET = 64
"""Unique ids are padded to multiples of this, so that compiled functions see few shapes."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """The processes of a run, and this one's place among them."""

    device: torch.device
    """Where this process computes."""
    rank: int = 0
    """This process, counted from 0."""
    size: int = 1
    """Number of processes."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and messages for all."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.all_reduce(torch.zeros(()))  # on the CPU: no GPU has to be idle

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process."""
        return bool(self.sum(torch.tensor(float(flag))) > 0)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values


@contextlib.contextmanager
def join(device: str) -> Iterator[World]:
    """Be one of the processes that torchrun started, each with a GPU of its own if `device` is a GPU; or be alone.

    Raises:
        ValueError: there is no such device, or fewer GPUs than processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(device=resolve_device(device))
        return
    if device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    place = resolve_device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo")
    world = World(device=place, rank=dist.get_rank(), size=size)
    try:
        yield world
        world.barrier()  # a process that leaves early takes connections of the others with it
    finally:
        dist.destroy_process_group()


def spread(
    module: nn.Module,
    *,
    units: Sequence[nn.Module],
    brief_units: Sequence[nn.Module],
    methods: Sequence[str],
    bf16: bool,
    world: World,
) -> None:
    """Spread the weights of `module` over all processes; each unit is gathered when it runs, the rest at once.

    Args:
        module: All of the model; its `forward` and `methods` may be called.
        units: Submodules whose gathered weights stay for the whole step.
        brief_units: Submodules, also of units, whose weights are let go between their forward and backward pass.
        methods: Names of methods that compute with weights besides `forward`.
        bf16: Whether weights are gathered in bf16; gradients are summed in fp32 in any case.
        world: The processes.
    """
    if not dist.is_initialized():  # FSDP2 needs a group, also of one
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo",
            store=dist.HashStore(),
            rank=0,
            world_size=1,
        )
    mesh = dist.init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy()
    if bf16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in (*brief_units, *units, module):
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=unit in brief_units)
    for method in methods:
        register_fsdp_forward_method(module, method)


def set_last_backward(module: nn.Module, last: bool) -> None:
    """Say whether the next backward pass is the step's last, after which gradients are summed and weights let go.

    Until then gathered weights stay, and gradients add up where they are: one exchange of each a step.
    """
    if isinstance(module, FSDPModule):
        module.set_is_last_backward(last)
        module.set_requires_gradient_sync(last)
        module.set_reshard_after_backward(last)


@contextlib.contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """While entered, the weights of `module` that belong to none of its units are whole, for calls past its methods."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A spread tensor in one piece, in every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a spread tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def exchange_rate(world: World) -> float:
    """Bytes a second that a process receives from the others in an all-to-all exchange, measured now."""
    numbers = 2**26 if world.device.type == "cuda" else 2**20
    values = torch.zeros(numbers // world.size * world.size, device=world.device)
    received, seconds = torch.empty_like(values), []
    for _ in range(4):
        world.barrier()
        started = time.perf_counter()
        dist.all_to_all_single(received, values)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        seconds.append(time.perf_counter() - started)
    return values.nbytes * (1 - 1 / world.size) / min(seconds)


class RowExchange:
    """Each unique id's row computed by one process of the job, its owner (`id` modulo the number of processes).

    Ids of this process's table go to their owners; rows come back and, later, gradients of rows go to the owners.
    """

    def __init__(self, unique_ids: Tensor, *, world: World) -> None:
        """Plan the exchange for `unique_ids` (U,), on the CPU: no GPU waits."""
        assert unique_ids.device.type == "cpu"
        owners = unique_ids % world.size
        self._order = owners.argsort(stable=True)  # (U,) to the order in which they are sent
        counts = owners.bincount(minlength=world.size)
        asked = torch.empty_like(counts)
        dist.all_to_all_single(asked, counts)
        self._sent, self._asked = counts.tolist(), asked.tolist()
        ids = self._to_owners(unique_ids[self._order])
        owned, self._index = ids.unique(return_inverse=True)
        self.num_owned = len(owned)
        padding = -len(owned) % BUCKET or (0 if len(owned) else BUCKET)
        self.owned_ids = F.pad(owned, (0, padding), value=int(owned[-1]) if len(owned) else 0)
        """The ids that this process computes, padded to a multiple of 64."""

    def to(self, device: torch.device) -> RowExchange:
        """Ready for rows on `device`."""
        self._order, self._index = self._order.to(device), self._index.to(device)
        return self

    def rows(self, owned: Tensor) -> Tensor:
        """From the rows of `owned_ids` to those of the unique ids of this process (U, ...)."""
        received = torch.empty((len(self._order), *owned.shape[1:]), dtype=owned.dtype, device=owned.device)
        dist.all_to_all_single(received, owned[self._index], self._sent, self._asked)
        return torch.empty_like(received).index_copy_(0, self._order, received)

    def gradients(self, gradient: Tensor) -> Tensor:
        """From gradients of this process's rows (U, ...) to those of `owned_ids`, summed over all processes."""
        received = self._to_owners(gradient[self._order])
        shape = (len(self.owned_ids), *gradient.shape[1:])
        return torch.zeros(shape, dtype=gradient.dtype, device=gradient.device).index_add_(0, self._index, received)

    def _to_owners(self, values: Tensor) -> Tensor:
        received = torch.empty((sum(self._asked), *values.shape[1:]), dtype=values.dtype, device=values.device)
        dist.all_to_all_single(received, values, self._asked, self._sent)
        return received
