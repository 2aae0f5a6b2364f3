"""Editing evaluated: models that know fictional facts, every way to change these, and what else changes. As JSON.

    python benchmarks/editing.py --english FILE... --held-out FILE --work DIR --out benchmarks/results/editing.json

Trains a MemoryLLM, a dense base and a Flex-MemoryLLM of one preset family on English documents mixed with SynthKB
(`evaluate/facts.py`), all at once, then edits each; what is in DIR already is not made again. `--english` and
`--held-out` are files that `flexmemory prepare` reads. docs/editing-evaluation.md says what is measured.

It is made for one GPU, where training and measuring take some minutes each; all of it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from editing_more import injection, suppression
from editing_suite import Suite

from flexmemory.config import ModelConfig, TrainConfig, from_dict
from flexmemory.device import resolve_device
from flexmemory.evaluate.facts import SynthKB, write
from flexmemory.model.accounting import count_parameters
from flexmemory.presets import get_preset
from flexmemory.provenance import provenance
from flexmemory.storage import write_json
from flexmemory.tokenizer import Tokenizer
from flexmemory.train.loop import train
from flexmemory.train.prepare import prepare

ROOT = Path(__file__).parents[1]
STAGES = (("knowledge", "settings", "suppression", "injection"), ("edits", "sequence", "undo"))
"""Sections that can be measured at once; the second stage needs the settings."""
OF_MEMORY = ("suppression", "injection")
OF_FLEX = ("knowledge", "settings", "edits")
"""All that is measured of it."""
ENGLISH_SHARE = 4
"""Sequences of English for one of facts."""
PASSES = 60
"""Times that each sentence of SynthKB is written, in other documents each time."""


def make_data(args: argparse.Namespace) -> None:
    """English, facts and held-out text as tokens, and the records."""
    tokenizer = Tokenizer.load(args.tokenizer)
    if not (args.work / "kb").exists():
        write(SynthKB.make(tokenizer, num_facts=args.facts, seed=args.seed), args.work / "kb", passes=args.passes)
    for name, files in (
        ("english", args.english),
        ("facts", [args.work / "kb" / "documents.jsonl"]),
        ("held-out", [args.held_out]),
    ):
        if not (args.work / name).exists():
            prepare(files, args.work / name, tokenizer=tokenizer, val_fraction=0)


def recipe(args: argparse.Namespace, variant: str) -> TrainConfig:
    """The family's recipe over the tokens asked for; checkpoints at the end alone."""
    config = get_preset(f"{args.family}-{variant}").train
    tokens = args.batch_tokens or config.batch_tokens
    steps = args.total_tokens // tokens
    return dataclasses.replace(
        config,
        total_tokens=args.total_tokens,
        batch_tokens=tokens,
        micro_batch_size=min(config.micro_batch_size, tokens // config.seq_len),
        warmup_steps=min(100, steps // 5),
        eval_every=steps,
        save_every=steps,
        log_every=max(1, steps // 20),
        keep_checkpoints=1,
        seed=args.seed,
    )


def train_one(args: argparse.Namespace, variant: str) -> None:
    """Train one model; its run goes to WORK/VARIANT."""
    model = dataclasses.replace(
        get_preset(f"{args.family}-{variant}").model, vocab_size=Tokenizer.load(args.tokenizer).vocab_size
    )
    data = [f"{args.work / 'english'}={ENGLISH_SHARE}", f"{args.work / 'facts'}=1"]
    run = args.work / variant
    train(
        model,
        train_config=recipe(args, variant),
        data=data,
        out=run,
        resume=(run / "checkpoints").exists(),
        device=args.device,
    )


def is_trained(args: argparse.Namespace, variant: str) -> bool:
    """Whether the run has its last checkpoint."""
    return (args.work / variant / "checkpoints" / f"step-{recipe(args, variant).total_steps:08d}").exists()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--english", nargs="+", required=True)
    parser.add_argument("--held-out", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--family", default="mini", help="of presets")
    parser.add_argument("--variants", nargs="+", default=["memory", "base", "flex3"])
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "models" / "mini-memory")
    parser.add_argument("--facts", type=int, default=2000)
    parser.add_argument("--passes", type=int, default=PASSES)
    parser.add_argument("--total-tokens", type=int, default=65_536_000)
    parser.add_argument("--batch-tokens", type=int, default=65_536)
    parser.add_argument("--edits", type=int, default=100, help="single edits of each method and kind of subject")
    parser.add_argument("--development", type=int, default=10, help="facts of each kind that settings are chosen on")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def in_parallel(args: argparse.Namespace, jobs: list[str]) -> None:
    """Run jobs, each in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:]]
    started = time.perf_counter()
    processes = [subprocess.Popen([*command, "--one", job]) for job in jobs]
    failed = [job for job, process in zip(jobs, processes, strict=True) if process.wait()]
    print(f"{', '.join(jobs)}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    if failed:
        print(f"{', '.join(failed)} did not end well; run this again to go on", file=sys.stderr)


def applies(section: str, variant: str) -> bool:
    """Whether a section is measured of a model."""
    if variant.startswith("flex"):
        return section in OF_FLEX
    return variant != "base" or section not in OF_MEMORY


def result_path(args: argparse.Namespace, section: str, variant: str) -> Path:
    return args.work / "results" / f"{variant}-{section}.json"


def measure(args: argparse.Namespace, section: str, variant: str) -> None:
    """One section of one model."""
    if args.device == "cpu":
        torch.set_num_threads(1)
    started = time.perf_counter()
    suite = Suite(args.work, variant, device=resolve_device(args.device), per_kind=args.edits, dev=args.development)
    found = {
        "knowledge": suite.knowledge,
        "settings": suite.chosen,
        "edits": suite.edits,
        "sequence": suite.sequence,
        "undo": suite.undo,
        "suppression": lambda: suppression(suite),
        "injection": lambda: injection(suite),
    }[section]()
    path = result_path(args, section, variant)
    path.parent.mkdir(exist_ok=True)
    write_json(path, {"fingerprint": suite.fingerprint, "seconds": time.perf_counter() - started, "found": found})


def training_figures(args: argparse.Namespace, variant: str) -> dict[str, Any]:
    """How the model came about."""
    config = json.loads((args.work / variant / "config.json").read_text())
    last = (args.work / variant / "metrics.jsonl").read_text().splitlines()[-1]
    figures = json.loads(last)
    return {
        "model": config["model"],
        "train": config["train"],
        "parameters": count_parameters(from_dict(ModelConfig, config["model"])).total,
        "loss": figures["ce"],
        "seconds": figures["train_s"],
    }


def main() -> None:
    args = parse()
    if args.one:
        verb, _, variant = args.one.partition(":")
        train_one(args, variant) if verb == "train" else measure(args, verb, variant)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    make_data(args)
    untrained = [variant for variant in args.variants if not is_trained(args, variant)]
    if untrained:
        in_parallel(args, [f"train:{variant}" for variant in untrained])
    report: dict[str, Any] = {}
    for stage in STAGES:
        sections = [(section, variant) for variant in args.variants for section in stage if applies(section, variant)]
        left = [
            f"{section}:{variant}" for section, variant in sections if not result_path(args, section, variant).exists()
        ]
        if left:
            in_parallel(args, left)
        for section, variant in sections:
            if (path := result_path(args, section, variant)).exists():
                report.setdefault(section, {})[variant] = json.loads(path.read_text())
    report["training"] = {variant: training_figures(args, variant) for variant in args.variants}
    report["provenance"] = provenance()
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
