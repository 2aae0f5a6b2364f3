"""Does a MemoryLLM with four times the cells learn more, and at which learning rates: held-out perplexity, as JSON.

    python benchmarks/larger_k.py --data DATA --out OUT.json [--preset mini-memory] [--at-once 8]

Trains a preset and, if it is a memory model, the same with 4 K on the same tokens of a prepared folder, with one thing
changed at a time, the most telling runs first and several at once. Presets of other models show what is not peculiar
to memory. Results are written after each run; those there are not made again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from flexmemory.config import TrainConfig
from flexmemory.device import resolve_device
from flexmemory.model.init import new_model
from flexmemory.presets import get_preset
from flexmemory.provenance import provenance
from flexmemory.train.data import Prefetcher, SequentialBatches, ShuffledBatches, TokenDataset
from flexmemory.train.optimizer import Optimizer
from flexmemory.train.parallel import World
from flexmemory.train.schedule import learning_rate
from flexmemory.train.step import evaluate, take_step, training_model


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What a run changes of the preset and its recipe."""

    cells: int = 1
    """K, as a multiple."""
    lr: float = 1.0
    """Learning rate of everything, as a multiple of the recipe's."""
    memory_lr: float = 1.0
    embedding_lr: float = 1.0
    optimizer: str = "adamw"
    init: float = 1.0
    """Initial weights of FFN-M's down projection, as a multiple: 1/2 gives 4 K rows the size of those of K."""
    seed: int = 0
    """Of weights and of the order of data."""


SETTINGS = [
    Setting(cells=cells, **change)
    for change in (
        {},
        {"embedding_lr": 2.0},
        {"memory_lr": 0.5},
        {"memory_lr": 2.0},
        {"seed": 1},
        {"embedding_lr": 4.0},
        {"embedding_lr": 8.0},
        {"embedding_lr": 4.0, "memory_lr": 0.5},
        {"init": 0.5},
        {"lr": 0.5},
        {"lr": 2.0},
        {"memory_lr": 0.25},
        {"optimizer": "muon"},
        {"embedding_lr": 2.0, "seed": 1},
        {"memory_lr": 0.5, "seed": 1},
        {"optimizer": "muon", "seed": 1},
    )
    for cells in (1, 4)
]


def settings_of(preset: str) -> list[Setting]:
    """Those that mean something for a preset: all for a memory model."""
    if get_preset(preset).model.architecture == "memory":
        return SETTINGS
    return [setting for setting in SETTINGS if setting.cells == setting.memory_lr == setting.init == 1]


def recipe(setting: Setting, *, preset: str, total_tokens: int, batch_tokens: int) -> TrainConfig:
    """The recipe of a preset over fewer tokens in smaller steps, as `setting` changes it."""
    base = get_preset(preset).train
    return dataclasses.replace(
        base,
        total_tokens=total_tokens,
        batch_tokens=batch_tokens,
        micro_batch_size=batch_tokens // base.seq_len,
        warmup_steps=min(base.warmup_steps, total_tokens // batch_tokens // 5),
        lr=base.lr * setting.lr,
        memory_lr=setting.memory_lr,
        embedding_lr=setting.embedding_lr,
        optimizer=setting.optimizer,  # pyright: ignore[reportArgumentType] - a str of argparse's choices
        seed=setting.seed,
    )


def run(
    setting: Setting, *, preset: str, data: Path, total_tokens: int, batch_tokens: int, device_name: str, threads: int
) -> dict[str, Any]:
    """Train once; figures beside the setting."""
    started = time.perf_counter()
    torch.set_num_threads(threads)
    device, dataset = resolve_device(device_name), TokenDataset.open(data)
    config = recipe(setting, preset=preset, total_tokens=total_tokens, batch_tokens=batch_tokens)
    model_config = get_preset(preset).model
    model_config = dataclasses.replace(
        model_config,
        vocab_size=dataset.vocab_size,
        intermediate_size=setting.cells * model_config.intermediate_size,
    )
    model = new_model(model_config, seed=config.seed, device=device)
    if setting.init != 1:
        with torch.no_grad():
            for memory in model.memories:
                assert memory.ffn is not None
                memory.ffn.down.weight.mul_(setting.init)
    module = training_model(model, config=config, world=World(device=device))
    optimizer = Optimizer(model, config=config)
    losses, total = [], config.total_steps
    with Prefetcher(ShuffledBatches(dataset.train, config=config), numbers=range(total), pin_memory=False) as batches:
        for step in range(1, total + 1):
            lr = learning_rate(step, config=config)
            values = take_step(module, batches=[next(batches)], num_batches=1, optimizer=optimizer, lr=lr)
            losses.append(values.scalars[1])
    held_out = SequentialBatches(dataset.validation, config=config, max_tokens=len(dataset.validation))
    loss = evaluate(module, [held_out[number] for number in range(len(held_out))], num_counted=len(held_out))
    return {
        **dataclasses.asdict(setting),
        "held_out_ppl": math.exp(min(loss, 100.0)),
        "last_tenth_train_ppl": math.exp(min(torch.stack(losses[-max(1, total // 10) :]).mean().item(), 100.0)),
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    """Make what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", default="mini-memory")
    parser.add_argument("--total-tokens", type=int, default=25_165_824)
    parser.add_argument("--batch-tokens", type=int, default=65_536)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--settings", type=int, default=len(SETTINGS), help="how many of them, the first ones")
    parser.add_argument("--threads", type=int, default=2, help="of a run, where it is on a CPU")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    common: dict[str, Any] = {
        "preset": options.preset,
        "threads": options.threads,
        "data": options.data,
        "total_tokens": options.total_tokens,
        "batch_tokens": options.batch_tokens,
        "device_name": options.device,
    }
    results: dict[str, Any] = {
        "provenance": provenance(),
        "preset": options.preset,
        "total_tokens": options.total_tokens,
        "batch_tokens": options.batch_tokens,
        "lr": get_preset(options.preset).train.lr,
        "data": TokenDataset.open(options.data).fingerprint,
        "entries": [],
    }
    if options.out.exists():
        results["entries"] = json.loads(options.out.read_text())["entries"]
    names = [field.name for field in dataclasses.fields(Setting)]
    done = [Setting(**{name: entry[name] for name in names}) for entry in results["entries"]]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.at_once, mp_context=context) as pool:
        wanted = settings_of(options.preset)[: options.settings]
        runs = [pool.submit(run, setting, **common) for setting in wanted if setting not in done]
        for finished in as_completed(runs):
            figures = finished.result()
            results["entries"].append(figures)
            options.out.write_text(json.dumps(results, indent=1) + "\n")
            said = (
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in figures.items()
            )
            print(", ".join(said), flush=True)


if __name__ == "__main__":
    main()
