"""What `flexmemory tol plan` takes for a model of some shape: seconds and memory of each phase, with random weights.

    python benchmarks/tol_plan_scale.py --preset 1b-memory --folder FOLDER --device cuda --out tol_plan_scale.json

Makes a checkpoint of random weights and a text of random ids (frequencies by Zipf's law) in FOLDER, and keeps them.
With --build the store is built by the plan too, and its bytes are compared with those that the plan says.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flexmemory.cli import tol_plan
from flexmemory.device import peak_memory, resolve_device
from flexmemory.model.checkpoint import Checkpoint, save_checkpoint
from flexmemory.model.init import new_model
from flexmemory.presets import PRESETS
from flexmemory.provenance import provenance
from flexmemory.storage import atomic_folder, sha256_file, write_json
from flexmemory.tokenizer import Tokenizer
from flexmemory.tol import plan as plans
from flexmemory.tol.build import build_store
from flexmemory.tol.plan import PLAN, load_plan
from flexmemory.train.data import FORMAT, FORMAT_VERSION

PHASES = {
    tol_plan: ("cached_sensitivity", "make_plan", "HeldRows", "measure_rise", "sensitivity_table", "save_plan"),
    plans: ("draw_sample", "fit_transform", "_within", "allocate", "make_scheme", "coded", "fed_back", "store_bytes"),
}
"""Functions that are timed, by the module that calls them; those of the second are parts of `make_plan`."""


class Phases:
    """Seconds, calls and peak memory of functions."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.found: dict[str, dict[str, float]] = {}

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, measured under `name`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                each = self.found.setdefault(name, {"calls": 0, "seconds": 0.0})
                each["calls"] += 1
                each["seconds"] += (seconds := self.now() - start)
                each["peak_device_bytes"] = peak_memory(self.device)  # of all until then
                each["peak_host_bytes"] = peak_memory(torch.device("cpu"))
                if seconds > 1:
                    logging.info("%s: %.1f s; of all calls: %s", name, seconds, each)

        return run

    def now(self) -> float:
        """Seconds, all that was asked of the device done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def checkpoint_and_text(folder: Path, preset: str, *, tokens: int, device: torch.device) -> tuple[Checkpoint, Path]:
    """A model of random weights in bf16, and prepared data of random ids."""
    model, data = folder / preset, folder / f"{preset}-text"
    config, tokenizer = PRESETS[preset].model, Tokenizer.train(["a"], vocab_size=300)
    if not model.exists():
        with atomic_folder(model) as out:
            save_checkpoint(out, new_model(config, seed=0, device=device).to("cpu", torch.bfloat16), tokenizer)
    if not data.exists():
        with atomic_folder(data) as out:
            draw = np.random.default_rng(0)
            weights = 1 / (np.arange(config.vocab_size) + 2.7)
            ids = draw.choice(config.vocab_size, size=tokens, p=weights / weights.sum())
            draw.permutation(config.vocab_size)[ids].astype("<u4").tofile(out / "train-00000.bin")
            shard = {"file": "train-00000.bin", "tokens": tokens, "sha256": sha256_file(out / "train-00000.bin")}
            train = {"documents": 1, "tokens": tokens, "bytes": 4 * tokens, "shards": [shard]}
            manifest = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "dtype": "uint32",
                "vocab_size": config.vocab_size,
                "boundary_id": 0,
                "tokenizer_fingerprint": tokenizer.fingerprint,
                "splits": {"train": train, "validation": {"documents": 0, "tokens": 0, "bytes": 0, "shards": []}},
            }
            write_json(out / "manifest.json", manifest)
    return Checkpoint.open(model), data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="1b-memory")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--share", type=int, default=14, help="the budget: this part of the bytes in bf16")
    parser.add_argument("--tokens", type=int, default=131_072, help="of calibration text")
    parser.add_argument("--no-basis-too", action="store_true", help="try plans without bases too, as by default")
    parser.add_argument("--build", action="store_true", help="build the store by the plan")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    device = resolve_device(args.device)
    args.folder.mkdir(parents=True, exist_ok=True)
    checkpoint, data = checkpoint_and_text(args.folder, args.preset, tokens=4 * args.tokens, device=device)
    config = checkpoint.config
    plain_bytes = 2 * config.vocab_size * config.num_layers * config.hidden_size
    phases = Phases(device)
    for module, names in PHASES.items():
        for name in names:
            setattr(module, name, phases.timed(name.strip("_"), getattr(module, name)))
    out = args.folder / f"plan-{int(time.time())}"
    report: dict[str, Any] = {
        "preset": args.preset,
        "bf16_bytes": plain_bytes,
        "budget": plain_bytes // args.share,
        "calibration_tokens": args.tokens,
        "device": str(device),
        "provenance": provenance(),
    }
    try:
        phases.timed("plan", tol_plan.plan)(
            checkpoint.path,
            budget=str(plain_bytes // args.share),
            calibration=data,
            out=out,
            tokens=args.tokens,
            basis=None if args.no_basis_too else True,
            cache=args.folder / "sensitivity",
            device=args.device,
        )
        said = json.loads((out / PLAN).read_text())
        report |= {"bytes": said["bytes"], "predicted_rise": said["predicted_rise"], "measured": said["measured"]}
        report["plan_file_bytes"] = sum(file.stat().st_size for file in out.iterdir())
        if args.build:
            scheme, store = load_plan(out, checkpoint), out.with_name(out.name + "-store")
            phases.timed("build", build_store)(checkpoint, store, scheme=scheme, device=device)
            report["store_bytes"] = sum(file.stat().st_size for file in store.iterdir() if file.suffix != ".json")
    finally:
        report["phases"] = phases.found
        args.out.write_text(json.dumps(report, indent=2) + "\n")
    logging.info("%s", json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
