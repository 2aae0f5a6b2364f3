"""A program for test_parallel.py, run by torchrun: gradients of one step, spread over the processes.

spread_gradients.py DATA OUT DEVICE
"""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from flexmemory.config import ModelConfig, TrainConfig
from flexmemory.train.data import ShuffledBatches, TokenDataset
from flexmemory.train.optimizer import Optimizer
from flexmemory.train.parallel import World, join, whole
from flexmemory.train.step import accumulate, training_model
from tests.conftest import random_model
from tests.train.conftest import nano, recipe

CASES: dict[str, tuple[ModelConfig, TrainConfig]] = {
    "base": (nano("base"), recipe(steps=2, batch_tokens=256, micro_batch_size=1)),
    "memory-step": (nano("memory"), recipe(steps=2, batch_tokens=256, micro_batch_size=1, rows_per="step")),
    "memory-job": (
        nano("memory", memory_kind="ffn+table"),
        recipe(steps=2, batch_tokens=256, micro_batch_size=1, rows_per="job"),
    ),
    "flex-micro-batch": (
        nano("flex3", tie_embeddings=False),
        recipe(steps=2, batch_tokens=256, micro_batch_size=1, rows_per="micro-batch"),
    ),
}


def gradients(world: World, *, data: Path) -> dict[str, torch.Tensor]:
    """Loss, gradients and norms of every case in fp64."""
    tensors, dataset = {}, TokenDataset.open(data)
    for case, (model_config, config) in CASES.items():
        module = training_model(random_model(model_config).to(world.device), config=config, world=world)
        once = config.rows_per in ("step", "job") and model_config.has_memory
        batch_size = config.batch_tokens // config.seq_len // world.size if once else config.micro_batch_size
        batches = ShuffledBatches(dataset.train, config=config, batch_size=batch_size)
        own = batches.per_step // world.size
        loss = torch.zeros(2, device=world.device)
        for number in range(own):
            values, _ = accumulate(module, batches[world.rank * own + number], last=number == own - 1)
            loss += values / world.size
        tensors[f"{case}.loss"] = world.sum(loss).cpu()
        for name, parameter in module.model.named_parameters():
            assert parameter.grad is not None
            tensors[f"{case}.{name}"] = whole(parameter.grad).clone().cpu()
        norms = Optimizer(module.model, config=config, world=world).step(lr=0.0, clip_norm=1.0)
        tensors[f"{case}.norms"] = norms.cpu()
    return tensors


if __name__ == "__main__":
    with join(sys.argv[3]) as world:
        found = gradients(world, data=Path(sys.argv[1]))
        if world.is_main:
            save_file(found, sys.argv[2])
    os._exit(0)  # as `flexmemory` under torchrun: shutting the interpreter down can abort
