"""Build, verify and read the lookups of a large model with random weights: seconds, bytes and rates, as JSON.

    python benchmarks/tol_build.py 1b-memory --folder FOLDER --out benchmarks/results/tol_build.json

Speed does not depend on the weights' values. Beside each rate stands a bound measured in the same run: the matrix rate
of the device for computing rows, the rate of writing and hashing plain bytes for storing them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import torch

from flexmemory.device import resolve_device
from flexmemory.model.checkpoint import Checkpoint, save_checkpoint
from flexmemory.model.init import new_model
from flexmemory.presets import get_preset
from flexmemory.provenance import provenance
from flexmemory.storage import atomic_folder
from flexmemory.tol.build import build_store
from flexmemory.tol.tiers import open_rows
from flexmemory.tol.verify import verify_store

GATHERED = (1, 64, 1024)


def timed(function):
    start = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def fp32_matmul_rate(device: torch.device) -> float:
    """FLOP/s of a large fp32 product."""
    a = torch.randn(4096, 4096, device=device)
    a @ a
    _, seconds = timed(lambda: [a @ a for _ in range(10)])
    return 10 * 2 * 4096**3 / seconds


def write_rate(folder: Path) -> float:
    """Bytes per second of writing plain bytes to a file and flushing it."""
    block = os.urandom(1 << 26)
    path = folder / "plain"

    def write():
        with path.open("wb") as file:
            for _ in range(32):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())

    _, seconds = timed(write)
    path.unlink()
    return 32 * len(block) / seconds


def hash_rate() -> float:
    """Bytes per second of SHA-256 on one core."""
    block = os.urandom(1 << 28)
    _, seconds = timed(lambda: hashlib.sha256(block).digest())
    return len(block) / seconds


def gather_rates(store, where: str, device: torch.device) -> dict[str, float]:
    """Median microseconds to gather random rows onto the device."""
    tier, seconds = timed(lambda: open_rows(store, where, device=device))
    figures = {"open_s": seconds}
    for count in GATHERED:
        out = torch.empty(count, store.num_slices, store.hidden_size, dtype=tier.dtype, device=device)
        times = []
        for seed in range(21):
            ids = torch.randperm(store.vocab_size, generator=torch.Generator().manual_seed(seed))[:count]
            times.append(timed(lambda ids=ids, out=out: tier.gather(ids, out))[1])
        figures[f"gather_{count}_us"] = 1e6 * sorted(times)[len(times) // 2]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset")
    parser.add_argument("--folder", type=Path, required=True, help="scratch space; needs the model and its lookups")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = resolve_device(args.device)
    config = get_preset(args.preset).model
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    with atomic_folder(args.folder / "checkpoint") as partial:
        save_checkpoint(partial, new_model(config, seed=0).to(torch.bfloat16), None)
    checkpoint = Checkpoint.open(args.folder / "checkpoint")
    bounds = {"fp32_matmul_flops": fp32_matmul_rate(device), "write_bytes_s": write_rate(args.folder)}
    bounds["sha256_bytes_s"] = hash_rate()
    store, build_s = timed(lambda: build_store(checkpoint, args.folder / "tol", device=device))
    _, verify_s = timed(lambda: verify_store(args.folder / "tol", checkpoint=checkpoint))
    flops = 6 * config.hidden_size * config.intermediate_size * config.num_layers * config.vocab_size
    results = {
        "preset": args.preset,
        "bytes": store.nbytes,
        "build_s": build_s,
        "build_bound_s": flops / bounds["fp32_matmul_flops"] + store.nbytes / bounds["write_bytes_s"],
        "verify_s": verify_s,
        "tiers": {where: gather_rates(store, where, device) for where in ("disk", "host", "device")},
        "bounds": bounds,
        "provenance": provenance(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
