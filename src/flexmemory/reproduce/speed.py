"""How fast base, memory and flex-3 train, each alone on the machine: what "equal training time" is measured by."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from flexmemory.device import resolve_device
from flexmemory.model.init import new_model
from flexmemory.reproduce.runs import Run, Size
from flexmemory.reproduce.study import Results, Study
from flexmemory.train.data import Batch, Prefetcher, ShuffledBatches
from flexmemory.train.optimizer import Optimizer
from flexmemory.train.parallel import World
from flexmemory.train.step import TrainingModel, take_step, training_model

VARIANTS = ("base", "memory", "flex3")
WARM_STEPS, STEPS = 8, 24


def measure(study: Study) -> None:
    """One after the other; nothing else should run."""
    results = Results(study, "speed")
    for size in study.sizes:
        for variant in VARIANTS:
            results.entry(f"{size.family}-{variant}", lambda size=size, variant=variant: _timed(study, size, variant))


def _timed(study: Study, size: Size, variant: str) -> dict[str, Any]:
    """Whole optimizer steps as `flexmemory train` takes them."""
    device = resolve_device(study.device)
    run = Run(size=size, variant=variant, tokens=size.tokens, lr=size.lrs[0])
    config = dataclasses.replace(run.config, rows_per="step")
    model = new_model(run.model(study.train_data.vocab_size), seed=0, device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    module = training_model(model, config=config, world=World(device=device))
    optimizer = Optimizer(model, config=config)
    rows_shared_by = config.batch_tokens // config.seq_len  # sequences
    batch_size = rows_shared_by if model.config.has_memory else config.micro_batch_size
    batches = ShuffledBatches(study.train_data.train, config=config, batch_size=batch_size)
    numbers = range((WARM_STEPS + STEPS) * batches.per_step)
    with Prefetcher(batches, numbers=numbers, pin_memory=device.type == "cuda") as prefetched:
        _steps(module, optimizer, prefetched, count=WARM_STEPS, per_step=batches.per_step)
        started = time.perf_counter()
        _steps(module, optimizer, prefetched, count=STEPS, per_step=batches.per_step)
        step_s = (time.perf_counter() - started) / STEPS
    return {
        "size": size.family,
        "variant": variant,
        "step_s": step_s,
        "tokens_per_s": config.batch_tokens / step_s,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def _steps(module: TrainingModel, optimizer: Optimizer, batches: Iterator[Batch], *, count: int, per_step: int) -> None:
    """Take steps as training does, which waits for the device at the end alone."""
    taken = [
        take_step(module, batches=islice(batches, per_step), num_batches=per_step, optimizer=optimizer, lr=1e-4)
        for _ in range(count)
    ]
    taken[-1].scalars.cpu()
