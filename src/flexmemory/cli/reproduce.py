"""`flexmemory reproduce [--quick]`: the paper's tables and figures again, at a size that can be trained here."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal, get_args

import torch
import tyro

from flexmemory.device import resolve_device
from flexmemory.reproduce import cells, compression, cost, probes, pruning, quality, report, speed
from flexmemory.reproduce import models as elsewhere
from flexmemory.reproduce.runs import Size, sweep, train_runs
from flexmemory.reproduce.study import FULL, QUICK, Study, fill
from flexmemory.tokenizer import Tokenizer
from flexmemory.train.prepare import prepare

Part = Literal[
    "data", "speed", "cost", "sweep", "runs", "quality", "probes", "pruning", "compression", "cells", "models", "page"
]
MEASURED = {
    "quality": quality, "probes": probes, "pruning": pruning, "compression": compression, "cells": cells,
    "models": elsewhere,
}  # fmt: skip
"""What is measured of trained models."""
VOCAB_SIZE = 8192
QUICK_VOCAB_SIZE = 512
logger = logging.getLogger(__name__)


def reproduce(
    *,
    work: Path = Path("runs/study"),
    corpus: tuple[Path, ...] = (),
    held_out: Path | None = None,
    wikitext: Path | None = None,
    tasks: Path | None = None,
    tokenizer: Path | None = None,
    results: Path | None = None,
    page: Path | None = None,
    parts: tuple[Part, ...] = get_args(Part),
    sizes: tuple[str, ...] = (),
    models: tuple[Path, ...] = (),
    at_once: int = 1,
    task_limit: int | None = None,
    device: str = "auto",
    quick: bool = False,
) -> None:
    """Train the study's models, measure them and write the page that compares the paper's claims with them.

    What was done is not done again: after an interruption the same command goes on. The whole study wants a GPU.

    Args:
        work: Folder of data and training runs.
        corpus: Text to train on (files or folders); with --quick by default this package's source.
        held_out: Text of the same kinds that is not trained on; by default documents held out of the corpus.
        wikitext: WikiText-2, raw test split, as .txt (or compressed).
        tasks: Folder of task files (docs/evaluating.md); without it models are judged by perplexity alone.
        tokenizer: A tokenizer.json to use; by default one is trained on the corpus.
        results: Folder of the JSON files; by default WORK/results.
        page: The page to write, with its plots beside it in images; by default WORK/study.md.
        parts: What to do, in this order; speed and cost want a device for themselves.
        sizes: Families of models to train and measure, such as mini; by default all of the study.
        models: Trained checkpoints from elsewhere, with the tokenizer of the data, whose tasks are probed too.
        at_once: Models trained or measured at the same time on each device.
        task_limit: Documents of each task, at most.
        device: cpu, cuda, cuda:1 ..., or auto: all GPUs where there is one.
        quick: Tiny models, to see in minutes that everything runs; nothing can be learnt from their numbers.
    """
    gpus = torch.cuda.device_count() if device == "auto" else 0
    study = Study(
        work=work,
        results=results or work / "results",
        sizes=_chosen(QUICK if quick else FULL, sizes),
        tasks=tasks,
        task_limit=task_limit,
        devices=tuple(f"cuda:{i}" for i in range(gpus)) or (str(resolve_device(device)),),
        at_once=at_once,
        quick=quick,
        models=models,
    )
    if "data" in parts:
        _prepare(study, corpus, {"held-out": held_out, "wikitext": wikitext}, tokenizer)
    if "speed" in parts:
        speed.measure(study)
    if "cost" in parts:
        cost.measure(study)
    if "sweep" in parts:
        swept = [run for size in study.sizes for run in sweep(size)]
        train_runs(swept, work, at_once=at_once, devices=study.devices)
    if "runs" in parts:
        wanted = [run for size in reversed(study.sizes) for run in study.wanted(size)]  # the largest first
        train_runs(wanted, work, at_once=at_once, devices=study.devices)
    fill(study, {part: module.jobs(study) for part, module in MEASURED.items() if part in parts})
    if "page" in parts:
        written = report.write(study.results, page or work / "study.md")
        print(written)


def _chosen(sizes: tuple[Size, ...], families: tuple[str, ...]) -> tuple[Size, ...]:
    known = [size.family for size in sizes]
    if unknown := [family for family in families if family not in known]:
        raise ValueError(f"the study has no size {unknown[0]!r}; it has {', '.join(known)}")
    return tuple(size for size in sizes if not families or size.family in families)


def _prepare(study: Study, corpus: tuple[Path, ...], texts: dict[str, Path | None], tokenizer: Path | None) -> None:
    """Token shards of all texts, in one tokenizer.

    Raises:
        ValueError: there is nothing to train on.
    """
    data = study.work / "data"
    if not (data / "train").exists():
        if not corpus and not study.quick:
            raise ValueError("the study needs text to train on: give --corpus FILES, or --quick for tiny models")
        sources = list(corpus) or [Path(__file__).parents[1]]
        prepare(
            sources,
            data / "train",
            tokenizer=None if tokenizer is None else Tokenizer.load(tokenizer.parent),
            vocab_size=QUICK_VOCAB_SIZE if study.quick else VOCAB_SIZE,
            val_fraction=0.02 if study.quick else 0.002,
        )
    for name, text in texts.items():
        if text is not None and not (data / name).exists():
            prepare([text], data / name, tokenizer=study.train_data.tokenizer(), val_fraction=0)
    logger.info("data in %s", data)


def main(argv: list[str]) -> int:
    """Entry point of the verb."""
    tyro.cli(reproduce, args=argv, prog="flexmemory reproduce")
    return 0
