"""Training speed and memory of dense, memory and flex models side by side, as JSON.

    python benchmarks/train.py --data DATA --out benchmarks/results/train.json [--sizes 1b] [--batch-tokens 131072]

Whole optimizer steps as `flexmemory train` takes them, on real text prepared by `flexmemory prepare`: the median of
several after some to warm up, one model after the other in one process. Weights are random, which changes no speed.
Beside each rate stand the matrix rate of the device, measured just before, the model's operations by count, and a
bound: the rate of a step that spends time on nothing but attention's kernels, measured alone, and matrix products at
the matrix rate. FFN-M counts once per unique id there, and all other work is free.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from flexmemory.config import ModelConfig, TrainConfig
from flexmemory.device import matmul_rate, resolve_device
from flexmemory.model.accounting import attention_flops_per_token, train_flops_per_token
from flexmemory.model.transformer import Transformer
from flexmemory.presets import get_preset
from flexmemory.provenance import provenance
from flexmemory.train.data import Prefetcher, ShuffledBatches, TokenDataset
from flexmemory.train.optimizer import Optimizer
from flexmemory.train.parallel import World
from flexmemory.train.step import ATTENTION, StepValues, TrainingModel, take_step, training_model, uses_bf16


def random_model(config: ModelConfig, device: torch.device) -> Transformer:
    """A model with random weights, made on the device."""
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device=device)
    model.tie_head()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(0, 0.02)
    return model


def steps(module: TrainingModel, dataset: TokenDataset, *, count: int) -> Iterator[tuple[StepValues, float]]:
    """Values and seconds of `count` steps."""
    config = module.config
    batch_size = config.micro_batch_size
    if module.model.config.has_memory and config.rows_per != "micro-batch":
        batch_size = config.batch_tokens // config.seq_len
    batches = ShuffledBatches(dataset.train, config=config, batch_size=batch_size)
    numbers = range(count * batches.per_step)
    optimizer = Optimizer(module.model, config=config)
    on_gpu = module.world.device.type == "cuda"
    with Prefetcher(batches, numbers=numbers, pin_memory=on_gpu) as source:
        for _ in range(count):
            started = time.perf_counter()
            own = (next(source) for _ in range(batches.per_step))
            values = take_step(module, batches=own, num_batches=batches.per_step, optimizer=optimizer, lr=1e-4)
            if on_gpu:
                torch.cuda.synchronize()
            yield values, time.perf_counter() - started


def attention_seconds(model: ModelConfig, config: TrainConfig, device: torch.device) -> float:
    """Seconds that attention's kernels take in a step, forward and backward.

    Heads lie in memory as the model has them. It is the median over rounds of a micro-batch's time in one layer, times
    layers and micro-batches.
    """
    rounds, calls = (5, 10) if device.type == "cuda" else (3, 1)
    dtype = torch.bfloat16 if uses_bf16(config, device) else torch.float32
    counts = (model.num_heads, model.num_kv_heads, model.num_kv_heads)
    heads = torch.randn(config.micro_batch_size, config.seq_len, sum(counts), model.head_size, device=device).to(dtype)
    inputs = [part.transpose(1, 2).detach().requires_grad_() for part in heads.split(counts, dim=2)]  # (B, H, T, E)
    gradient = torch.randn_like(inputs[0])
    seconds = []
    with sdpa_kernel(ATTENTION, set_priority=True):
        for number in range(rounds + 1):
            started = time.perf_counter()
            for _ in range(calls):
                attended = scaled_dot_product_attention(
                    *inputs, is_causal=True, enable_gqa=model.num_heads != model.num_kv_heads
                )
                torch.autograd.grad(attended, inputs, gradient)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number > 0:  # the first warms up
                seconds.append((time.perf_counter() - started) / calls)
    return statistics.median(seconds) * model.num_layers * config.micro_steps


def measure(
    name: str,
    *,
    dataset: TokenDataset,
    batch_tokens: int,
    device: torch.device,
    warm_up: int,
    count: int,
    rows_per: str,
) -> dict[str, Any]:
    """Figures of one model at one step size."""
    preset = get_preset(name)
    model_config = dataclasses.replace(preset.model, vocab_size=max(dataset.vocab_size, 4096))
    config = dataclasses.replace(
        preset.train, batch_tokens=batch_tokens, total_tokens=batch_tokens * 100, rows_per=rows_per, warmup_steps=0
    )
    rate = matmul_rate(device, bf16=uses_bf16(config, device))
    attention_s = attention_seconds(model_config, config, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    module = training_model(random_model(model_config, device), config=config, world=World(device=device))
    seconds, shares = [], []
    for number, (values, duration) in enumerate(steps(module, dataset, count=warm_up + count)):
        if number == warm_up - 1:
            module.phases.take()
        if number >= warm_up:
            seconds.append(duration)
            shares.append(values.num_unique / batch_tokens)
    phases = {key: value / count for key, value in module.phases.take().items()}
    share = statistics.mean(shares)
    flops = train_flops_per_token(model_config, unique_share=share, seq_len=config.seq_len)
    scores = attention_flops_per_token(model_config, seq_len=config.seq_len)
    tokens_per_s = batch_tokens / statistics.median(seconds)
    figures = {
        "size": name.partition("-")[0],
        "variant": name.partition("-")[2].replace("base", "dense"),
        "batch_tokens": batch_tokens,
        "rows_per": rows_per if model_config.has_memory else None,
        "tokens_per_s": tokens_per_s,
        "step_s": seconds,
        "unique_share": share,
        "flops_per_token": flops,
        "matmul_flops_per_s": rate,
        "mfu": tokens_per_s * flops / rate,
        "attention_s": attention_s,
        "matmul_flops": batch_tokens * (flops - scores),
        "phases_s": phases,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }
    del module
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return figures


def set_bounds(entries: list[dict[str, Any]]) -> None:
    """Give each entry the seconds of its matrix products and its bound, at the highest matrix rate of the run."""
    rate = max(entry["matmul_flops_per_s"] for entry in entries)
    for entry in entries:
        entry["matmul_s"] = entry["matmul_flops"] / rate
        entry["bound_tokens_per_s"] = entry["batch_tokens"] / (entry["attention_s"] + entry["matmul_s"])


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", default=["1b"])
    parser.add_argument("--variants", nargs="+", default=["base", "memory", "flex3"])
    parser.add_argument("--batch-tokens", nargs="+", type=int, default=[131_072, 524_288])
    parser.add_argument("--rows-per", default="step", choices=["step", "micro-batch"])
    parser.add_argument("--warm-up", type=int, default=2, help="steps before those that are measured, at least 1")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device, dataset = resolve_device(options.device), TokenDataset.open(options.data)
    results: dict[str, Any] = {"provenance": provenance(), "entries": []}
    if options.out.exists():
        results["entries"] = json.loads(options.out.read_text())["entries"]
    for size in options.sizes:
        for batch_tokens in options.batch_tokens:
            for variant in options.variants:
                figures = measure(
                    f"{size}-{variant}",
                    dataset=dataset,
                    batch_tokens=batch_tokens,
                    device=device,
                    warm_up=options.warm_up,
                    count=options.steps,
                    rows_per=options.rows_per,
                )
                results["entries"].append(figures)
                set_bounds(results["entries"])
                options.out.write_text(json.dumps(results, indent=1) + "\n")
                peak = (figures["peak_memory_bytes"] or 0) / 1e9
                phases = {key: round(value, 3) for key, value in figures["phases_s"].items()}
                print(
                    f"{size}-{variant:8} {batch_tokens:8,} a step: {figures['tokens_per_s']:10,.0f} tokens/s, "
                    f"MFU {figures['mfu']:.3f} of {figures['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s, "
                    f"bound {figures['bound_tokens_per_s']:,.0f} tokens/s, {peak:.1f} GB, "
                    f"unique {figures['unique_share']:.3f}, {phases}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
