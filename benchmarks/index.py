"""Index a model of a preset's shape with random weights: seconds of each step, bytes, peak memory, as JSON.

    python benchmarks/index.py 1b-memory --folder FOLDER --out benchmarks/results/index.json

Speed does not depend on the weights' values, but for the iterations of K-means. Beside the seconds stand those that the
matrix products alone would take at this device's fp32 rate, measured in the same run. Maps are made by principal
components, tables are left out: neither openTSNE nor pyarrow is needed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import torch

from flexmemory.device import matmul_rate, peak_memory, resolve_device
from flexmemory.interpret.index import IndexOptions, build_index
from flexmemory.model.checkpoint import Checkpoint, save_checkpoint
from flexmemory.model.init import new_model
from flexmemory.presets import get_preset
from flexmemory.provenance import provenance
from flexmemory.storage import Progress, atomic_folder


class Clock:
    """When each step of a build was done, by what it records."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.started = self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self.last = now - self.last, now
        if self.device.type == "cuda":
            self.peak_bytes[name] = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)


def timed_build(checkpoint: Checkpoint, out: Path, *, device: torch.device, options: IndexOptions):
    """The index, and a clock with a lap for each step (the first is opening and loading)."""
    clock, append = Clock(device), Progress.append

    def recorded(progress, line):
        append(progress, line)
        clock.lap(line.get("step", "load"))

    Progress.append = recorded
    try:
        index = build_index(checkpoint, out, options=options, device=device)
    finally:
        Progress.append = append
    clock.lap("checksums and publishing")
    return index, clock


def product_flops(config, index) -> float:
    """Of the matrix products: two passes and one of rows a layer, values on the vocabulary, neighbours once."""
    vocab, width, cells, layers = config.vocab_size, config.hidden_size, config.intermediate_size, len(index.layers)
    per_layer = 2 * vocab * width * cells * (2 + 2 + 3) + 2 * vocab * width * cells
    return layers * per_layer + 2 * vocab**2 * (width + cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset")
    parser.add_argument("--folder", type=Path, required=True, help="scratch space: the checkpoint and its index")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = resolve_device(args.device)
    config = get_preset(args.preset).model
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    with atomic_folder(args.folder / "checkpoint") as partial:
        save_checkpoint(partial, new_model(config, seed=0).to(torch.bfloat16), None)
    rate = matmul_rate(device, bf16=False)
    options = IndexOptions(tables=False, maps="pca")
    index, clock = timed_build(
        Checkpoint.open(args.folder / "checkpoint"), args.folder / "index", device=device, options=options
    )
    started = time.perf_counter()
    index.verify()
    verify_s = time.perf_counter() - started
    layers = [clock.seconds[f"layer {layer}"] for layer in index.layers]
    results = {
        "preset": args.preset,
        "device": str(device),
        "build_s": clock.last - clock.started,
        "products_bound_s": product_flops(config, index) / rate,
        "layer_s_mean": sum(layers) / len(layers),
        "steps_s": clock.seconds,
        "verify_s": verify_s,
        "bytes": index.nbytes,
        "fp32_matmul_flops": rate,
        "working_bytes": options.working_bytes,
        "weights_bytes_fp32": 4
        * sum(p.numel() for p in Checkpoint.open(args.folder / "checkpoint").load().parameters()),
        "peak_device_bytes": clock.peak_bytes,
        "peak_host_bytes": peak_memory(torch.device("cpu")),
        "provenance": provenance(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
