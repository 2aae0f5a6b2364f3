"""How fast base, memory and flex-3 train, each alone on the machine: what "equal training time" is measured by."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import torch

from flexmemory.device import resolve_device
from flexmemory.model.init import new_model
from flexmemory.reproduce.runs import Run, Size
from flexmemory.reproduce.study import Results, Study
from flexmemory.train.data import Prefetcher, ShuffledBatches
from flexmemory.train.optimizer import Optimizer
from flexmemory.train.parallel import World
from flexmemory.train.step import take_step, training_model

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
    module = training_model(model, config=config, world=World(device=device))
    optimizer = Optimizer(model, config=config)
    per_step = config.batch_tokens // config.seq_len // config.micro_batch_size
    shared = per_step == 1 or not model.config.has_memory
    batch_size = config.micro_batch_size if shared else config.batch_tokens // config.seq_len
    batches = ShuffledBatches(study.train_data.train, config=config, batch_size=batch_size)
    seconds = []
    numbers = range((WARM_STEPS + STEPS) * batches.per_step)
    with Prefetcher(batches, numbers=numbers, pin_memory=device.type == "cuda") as prefetched:
        for _ in range(WARM_STEPS + STEPS):
            started = time.perf_counter()
            taken = [next(prefetched) for _ in range(batches.per_step)]
            values = take_step(module, batches=taken, num_batches=len(taken), optimizer=optimizer, lr=1e-4)
            float(values.scalars[0])  # waits for the device
            seconds.append(time.perf_counter() - started)
    step_s = statistics.median(seconds[WARM_STEPS:])
    return {
        "size": size.family,
        "variant": variant,
        "step_s": step_s,
        "tokens_per_s": config.batch_tokens / step_s,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }
