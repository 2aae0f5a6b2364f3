"""`flexmemory train PRESET --data DIR... --out RUN`: train a model on prepared data."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from flexmemory.config import ModelConfig, TrainConfig
from flexmemory.presets import get_preset
from flexmemory.train.loop import TrainResult, train
from flexmemory.train.mixture import Mixture
from flexmemory.train.record import read_run_config
from flexmemory.train.track import TrackerName

PROG = "flexmemory train PRESET"
HELP_PRESET = "small-memory"
logger = logging.getLogger(__name__)


class Arguments(NamedTuple):
    """What the command line said."""

    data: tuple[str, ...]
    out: Path
    resume: bool
    device: str
    track: TrackerName
    recipe: TrainConfig
    model: ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResumeTarget:
    """The options that say whether defaults are those of a run."""

    out: Path | None = None
    resume: tyro.conf.FlagCreatePairsOff[bool] = False


def parse(options: list[str], *, model: ModelConfig, recipe: TrainConfig) -> Arguments:
    """The command line after the preset; `model` and `recipe` are the defaults."""

    def arguments(
        *,
        data: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]],
        out: Path,
        resume: tyro.conf.FlagCreatePairsOff[bool] = False,
        device: str = "auto",
        track: TrackerName = "none",
        recipe: Annotated[TrainConfig, tyro.conf.arg(name="")] = recipe,
        model: ModelConfig = model,
    ) -> Arguments:
        """Train a model on prepared data; the preset names the model and the recipe, options change them.

        Ctrl-C saves a checkpoint and stops; a second one stops at once.

        Args:
            data: Folders written by `flexmemory prepare`, or DIR=WEIGHT for each: its relative share of the sequences.
                Without weights each has that of its size.
            out: Folder of the run: checkpoints, metrics, samples.
            resume: Go on from the newest checkpoint of `out`, with that run's options where none are given.
            device: cpu, cuda, cuda:1 ..., or auto: the GPU where there is one.
            track: Send metrics to TensorBoard (RUN/tensorboard) or Weights & Biases as well; either must be installed.
            recipe: The recipe.
            model: The model; its vocabulary follows the data.
        """
        return Arguments(tuple(itertools.chain.from_iterable(data)), out, resume, device, track, recipe, model)

    return tyro.cli(arguments, args=options, prog=PROG)


def follow_vocabulary(model: ModelConfig, *, default: ModelConfig, data: Sequence[str]) -> ModelConfig:
    """`model` with the vocabulary of `data`, unless one was asked for."""
    vocab_size = Mixture.open(data).vocab_size
    if model.vocab_size in (vocab_size, default.vocab_size):
        if model.vocab_size != vocab_size:
            logger.info("vocab_size is %d, that of the data, instead of %d", vocab_size, model.vocab_size)
        return dataclasses.replace(model, vocab_size=vocab_size)
    return model


def defaults_of_run(options: list[str], *, preset: str) -> tuple[ModelConfig, TrainConfig] | None:
    """Model and recipe of the run that `options` resume, if they do.

    Raises:
        FileNotFoundError: there is no such run.
        ValueError: it was started from another preset.
    """
    target, _ = tyro.cli(ResumeTarget, args=options, return_unknown_args=True, add_help=False)
    if not target.resume or target.out is None:
        return None
    model, recipe, argv = read_run_config(target.out)
    if argv and argv[0] != preset:
        raise ValueError(f"{target.out} was started as {argv[0]}, not {preset}")
    return model, recipe


def main(argv: list[str]) -> int:
    """Entry point of the verb."""
    if argv[:1] in (["-h"], ["--help"]):
        print(f"Defaults shown are those of the preset {HELP_PRESET}; `flexmemory info PRESET` describes a preset.\n")
        argv = [HELP_PRESET, *argv]
    if not argv or argv[0].startswith("-"):
        raise ValueError(f"name a preset first: {PROG} --data DIR --out RUN")
    name, options = argv[0], argv[1:]
    preset = get_preset(name)
    model, recipe = defaults_of_run(options, preset=name) or (preset.model, preset.train)
    args = parse(options, model=model, recipe=recipe)
    result = train(
        args.model if args.resume else follow_vocabulary(args.model, default=model, data=args.data),
        train_config=args.recipe,
        data=args.data,
        out=args.out,
        resume=args.resume,
        device=args.device,
        track=args.track,
        argv=argv,
    )
    is_main = os.environ.get("RANK", "0") == "0"
    if result.signal is not None:
        if is_main:
            stopped_by = signal.Signals(result.signal).name
            command = _command_to_go_on(name, args)
            print(f"stopped by {stopped_by}; saved {result.checkpoint}; to go on: {command}", file=sys.stderr)
        return 128 + result.signal
    if is_main:
        print(_summary(result, recipe=args.recipe))
    return 0


def _command_to_go_on(preset: str, args: Arguments) -> str:
    start = ["flexmemory"]
    if "LOCAL_WORLD_SIZE" in os.environ:
        start = ["torchrun", f"--nproc-per-node={os.environ['LOCAL_WORLD_SIZE']}", "-m", "flexmemory"]
    tracker = [] if args.track == "none" else ["--track", args.track]
    return shlex.join([*start, "train", preset, "--data", *args.data, "--out", str(args.out), *tracker, "--resume"])


def _summary(result: TrainResult, *, recipe: TrainConfig) -> str:
    text = f"{result.step} steps, {result.step * recipe.batch_tokens:,} tokens: loss {result.loss:.4f}"
    if result.val_loss is not None:
        text += f", validation {result.val_loss:.4f} (perplexity {math.exp(result.val_loss):.2f})"
    return f"{text}; {result.checkpoint}"
