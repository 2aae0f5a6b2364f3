"""Time and memory of a token by architecture (Table 6), by the engine, with random weights of the paper's 1B shape."""

from __future__ import annotations

import dataclasses
import gc
import tempfile
from pathlib import Path
from typing import Any

import torch

from flexmemory.engine.bench import GROUP, copy_rate, measure_decode
from flexmemory.engine.subject import Subject, random_model, random_store
from flexmemory.presets import VARIANTS, get_preset
from flexmemory.reproduce.study import Results, Study
from flexmemory.tol.tiers import open_rows

CONTEXT = 2048
NUM_IDS = 8192
"""Tokens that have rows: which does not change what a step costs with rows in host memory."""


def measure(study: Study) -> None:
    """Each architecture, its rows in host memory, in bf16 on a GPU and fp32 on a CPU."""
    results = Results(study, "cost")
    family = "nano" if study.quick else "1b"
    for variant in VARIANTS:
        results.entry(f"{family}-{variant}", lambda variant=variant: _decode(study, family, variant))


def _decode(study: Study, family: str, variant: str) -> dict[str, Any]:
    device = torch.device(study.device)
    on_gpu = device.type == "cuda"
    config = get_preset(f"{family}-{variant}").model
    length = min(CONTEXT, config.max_seq_len)
    num_ids = min(NUM_IDS, config.vocab_size)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    stream = torch.randint(num_ids, (4 * length,), generator=torch.Generator().manual_seed(0))
    gc.collect()  # captured steps of the last model hold its memory, and are held in cycles
    if on_gpu:
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        tier = None
        if config.has_memory:
            store = random_store(Path(folder) / "store", config, num_ids=num_ids, embedding=False, codec="bf16")
            tier = open_rows(store, "host", device=device)
        model = random_model(config, device=device, dtype=dtype, num_ids=num_ids, embedding=True, int8=None)
        steps = max(GROUP, length // 8 // GROUP * GROUP)
        figures = measure_decode(
            Subject(model=model, tier=tier),
            stream,
            batch=1,
            context=length - steps // 2 - 4,
            steps=steps,
            copy_bytes_per_s=copy_rate(device),
        )
    return {"variant": variant, "context": length, **dataclasses.asdict(figures)}
