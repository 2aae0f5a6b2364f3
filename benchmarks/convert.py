"""Can a dense model be converted? Perplexity after conversion and after some training, beside training from scratch.

    python benchmarks/convert.py --data DATA --work DIR --out benchmarks/results/convert.json

Trains a dense mini model, converts it to a MemoryLLM and a Flex-MemoryLLM-3, and trains each on for a few tokens: with
the dense model as teacher, from the text alone, and from weights that were drawn. DATA is a folder of `flexmemory
prepare`. Runs of a group are made at once; what is in DIR already is not made again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
from pathlib import Path
from typing import Any

import torch

from flexmemory.convert.flex import LayerFit, convert, start
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.model.transformer import Transformer
from flexmemory.presets import get_preset
from flexmemory.provenance import provenance
from flexmemory.train.data import SequentialBatches, TokenDataset
from flexmemory.train.loop import train
from flexmemory.train.mixture import Mixture
from flexmemory.train.parallel import World
from flexmemory.train.step import TrainingModel, evaluate

RATIOS = {"memory": 0, "flex3": 3}
CALIBRATION = 262_144
"""Tokens by which cells are divided."""
EVERYTHING = 10**12


def recipe(args: argparse.Namespace, *, tokens: int, lr: float) -> Any:
    """The recipe of the mini presets, over `tokens`."""
    base = get_preset(f"{args.size}-base").train
    steps = max(1, tokens // base.batch_tokens)
    return dataclasses.replace(
        base, total_tokens=steps * base.batch_tokens, lr=lr, warmup_steps=min(base.warmup_steps, steps // 4),
        eval_every=EVERYTHING, save_every=EVERYTHING, eval_tokens=EVERYTHING,
    )  # fmt: skip


def windows(args: argparse.Namespace, *, length: int) -> torch.Tensor:
    stream = TokenDataset.open(args.data).train
    count = stream.num_windows(length)
    numbers = range(0, count, max(1, count * length // CALIBRATION))
    return torch.stack([torch.from_numpy(stream.window(number, seq_len=length)) for number in numbers])[:, :-1]


def validation_loss(args: argparse.Namespace, model: Transformer) -> float:
    """In fp32, over the whole validation split."""
    config = dataclasses.replace(recipe(args, tokens=1, lr=1e-3), precision="fp32", compile="off")
    dataset = Mixture.open(args.data)
    assert dataset.validation is not None
    batches = SequentialBatches(dataset.validation, config=config, max_tokens=EVERYTHING)
    module = TrainingModel(model.to(args.device), config=config, world=World(device=torch.device(args.device)))
    return evaluate(module, [batches[n] for n in range(len(batches))], num_counted=len(batches))


def run(args: argparse.Namespace, name: str) -> None:
    """Train the run `name`: ARCHITECTURE-HOW."""
    out = args.work / name
    if (out / "done.json").exists():
        return
    architecture, how = name.split("-")
    model = get_preset(f"{args.size}-{architecture}").model
    teacher = begun = None
    if how in ("distilled", "text"):
        teacher = Checkpoint.open(args.work / "base-long")
        begun, _ = convert(
            teacher.load(device=args.device, dtype=torch.float32),
            windows(args, length=model.max_seq_len),
            flex_ratio=RATIOS[architecture],
        )
        assert begun.config == model, "conversion makes the preset's shape"
    tokens = args.long_tokens if how == "long" else args.short_tokens
    result = train(
        model,
        train_config=recipe(args, tokens=tokens, lr=args.lr if begun is None else args.converted_lr),
        data=args.data,
        out=out,
        start=begun,
        teacher=teacher if how == "distilled" else None,
        device=args.device,
    )
    assert result.val_loss is not None
    (out / "done.json").write_text(json.dumps({"val_loss": result.val_loss}))


def untrained(args: argparse.Namespace) -> dict[str, Any]:
    """Losses right after conversion, by the fitted map and by none."""
    checkpoint = Checkpoint.open(args.work / "base-long")
    dense = checkpoint.load(device=args.device, dtype=torch.float32)
    found: dict[str, Any] = {}
    for name, ratio in RATIOS.items():
        made, fits = convert(dense, windows(args, length=dense.config.max_seq_len), flex_ratio=ratio)
        found["explained"] = [fit.explained for fit in fits]
        found[name] = {"converted": validation_loss(args, made)}
        plain = [LayerFit(linear=torch.eye(len(f.linear)), explained=0, errors=f.errors.cpu()) for f in fits]
        found[name]["copied"] = validation_loss(args, start(dense, made.config, plain))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", default="mini")
    parser.add_argument("--long-tokens", type=int, default=117_964_800)
    parser.add_argument("--short-tokens", type=int, default=26_214_400)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--converted-lr", type=float, default=1e-3)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    groups = [
        ["base-long", "memory-long", "flex3-long"],
        [f"{architecture}-{how}" for how in ("distilled", "text", "drawn") for architecture in RATIOS],
    ]
    context = multiprocessing.get_context("spawn")
    for group in groups:
        processes = [context.Process(target=run, args=(args, name)) for name in group]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if failed := [name for name, process in zip(group, processes, strict=True) if process.exitcode]:
            parser.exit(1, f"{', '.join(failed)} did not end well; run this again to go on\n")
    losses = {name: json.loads((args.work / name / "done.json").read_text())["val_loss"] for g in groups for name in g}
    report = {
        "size": args.size,
        "long_tokens": args.long_tokens,
        "short_tokens": args.short_tokens,
        "calibration_tokens": CALIBRATION,
        "lr": args.lr,
        "converted_lr": args.converted_lr,
        "val_loss": losses,
        "val_ppl": {name: math.exp(loss) for name, loss in losses.items()},
        "untrained": untrained(args),
        "provenance": provenance(),
    }
    args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
