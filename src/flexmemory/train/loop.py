"""The training loop on one device.

    RUN/
      config.json      resolved model and recipe, data, device, versions, command line
      metrics.jsonl    every `log_every` steps; lines with `val_loss` at validations
      samples.jsonl    text sampled at validations
      loss.png         both losses by tokens, where matplotlib is installed
      checkpoints/     see train/checkpoint.py

Batches, learning rate and metrics are functions of the step and of what checkpoints hold, so a resumed run is the run
that was never interrupted.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from flexmemory.config import ModelConfig, TrainConfig, from_dict, to_dict
from flexmemory.device import free_memory, resolve_device
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.model.init import new_model
from flexmemory.provenance import provenance
from flexmemory.storage import read_json, write_json
from flexmemory.train import checkpoint as checkpoints
from flexmemory.train.data import Prefetcher, SequentialBatches, ShuffledBatches
from flexmemory.train.metrics import Meter, append_line, can_plot, drop_after, plot_losses
from flexmemory.train.mixture import Mixture
from flexmemory.train.optimizer import make_optimizer
from flexmemory.train.sample import sample_text
from flexmemory.train.schedule import learning_rate
from flexmemory.train.step import evaluate, rows_fit, step_functions, take_step
from flexmemory.train.stop import StopSignal

SAMPLE_TOKENS = 128
_FIXED = ("batch_tokens", "seq_len", "seed")
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """How a run ended."""

    step: int
    """Optimizer steps taken, those before a resume included."""
    loss: float
    """Running mean of the training loss."""
    val_loss: float | None
    """Cross entropy of the last validation in this call, in nats per token."""
    checkpoint: Path
    """The checkpoint of `step`."""
    signal: int | None
    """The signal that stopped the run before its end."""


def train(
    model_config: ModelConfig,
    *,
    train_config: TrainConfig,
    data: str | Path | Sequence[str | Path],
    out: Path,
    resume: bool = False,
    device: str = "auto",
    argv: Sequence[str] = (),
) -> TrainResult:
    """Train a model on prepared data; SIGINT and SIGTERM end it early, after a checkpoint.

    Args:
        model_config: The model; its vocabulary must cover that of the data.
        train_config: The recipe.
        data: A folder written by `flexmemory prepare`, or several as `Mixture.open` takes them.
        out: The run's folder, made here.
        resume: Go on from the newest checkpoint of `out`. Model, data, seed, `seq_len` and `batch_tokens` must be the
            run's own; the rest of the recipe may change from here on.
        device: `cpu`, `cuda`, `cuda:1` ..., or `auto`: the GPU where there is one.
        argv: The command line, to be recorded.

    Raises:
        ValueError: model, recipe, data and run folder do not fit together, or the newest checkpoint is damaged.
        FileNotFoundError: there is no prepared data, or nothing to resume.
        OSError: the run folder cannot be written.
        FloatingPointError: the loss diverged or is not finite; earlier checkpoints are as they were.
    """
    dataset = Mixture.open(data)
    place = resolve_device(device)
    _check_fit(model_config, train_config=train_config, dataset=dataset)
    checkpoint = None
    if resume:
        checkpoint = checkpoints.newest_whole(out)
        _check_same_run(checkpoint, model_config=model_config, train_config=train_config, dataset=dataset)
    elif found := checkpoints.list_checkpoints(out):
        raise ValueError(f"{out} already holds a run ({found[-1].name}); add --resume to go on, or use another --out")
    run = _Run(model_config, train_config=train_config, dataset=dataset, out=out, device=place)
    run.start(checkpoint)
    write_json(out / "config.json", _describe(run, argv=argv))
    return run.train()


def read_run_config(out: Path) -> tuple[ModelConfig, TrainConfig, list[str]]:
    """The configurations and the command line that the run folder `out` was last started with.

    Raises:
        FileNotFoundError: `out` is not a run folder.
    """
    if not (out / "config.json").is_file():
        raise FileNotFoundError(f"{out} holds no run to resume; leave out --resume to start one")
    values = read_json(out / "config.json")
    return from_dict(ModelConfig, values["model"]), from_dict(TrainConfig, values["train"]), values["argv"]


class _Run:
    """One run under way: what a step changes, and what it needs."""

    def __init__(
        self,
        model_config: ModelConfig,
        *,
        train_config: TrainConfig,
        dataset: Mixture,
        out: Path,
        device: torch.device,
    ) -> None:
        self.config = train_config
        self.dataset = dataset
        self.out = out
        self.device = device
        self.tokenizer = dataset.tokenizer()
        self.val_batches = _validation_batches(dataset, config=train_config)
        self.model = new_model(model_config, seed=train_config.seed, device=device)
        self.optimizer = make_optimizer(self.model, config=train_config)
        self.functions = step_functions(self.model, config=train_config)
        self.train_batches = self._train_batches()
        self.meter = Meter(margin=train_config.divergence_margin)
        self.plots = can_plot()
        self.step = 0
        self.val_loss: float | None = None
        self.checkpoint: Path | None = None
        self.busy_s = self.waited_s = 0.0
        self.timed_steps = 0

    def _train_batches(self) -> ShuffledBatches:
        """Batches whose sequences share a table of rows: whole steps, or micro-batches."""
        config, tokens = self.config, self.dataset.train
        micro_batches = ShuffledBatches(tokens, config=config)
        if config.rows_per == "micro-batch" or config.micro_steps == 1 or not self.model.config.has_memory:
            return micro_batches
        steps = ShuffledBatches(tokens, config=config, batch_size=config.batch_tokens // config.seq_len)
        if config.rows_per == "auto":
            num_unique, free_bytes = len(steps[0].unique_ids), free_memory(self.device)
            if not rows_fit(self.model, config=config, num_unique=num_unique, free_bytes=free_bytes):
                return micro_batches
        return steps

    def start(self, checkpoint: Checkpoint | None) -> None:
        """Make the run folder what it was at `checkpoint`, or empty, and load it."""
        self.out.mkdir(parents=True, exist_ok=True)
        checkpoints.clean_partials(self.out)
        if checkpoint is not None:
            state = checkpoints.read_state(checkpoint)
            checkpoints.restore(checkpoint, model=self.model, optimizer=self.optimizer)
            self.meter.restore(state.meter)
            self.step, self.checkpoint = state.step, checkpoint.path
            logger.info("resuming after step %d of %d", self.step, self.config.total_steps)
        for name in ("metrics.jsonl", "samples.jsonl"):
            drop_after(self.out / name, step=self.step)

    def train(self) -> TrainResult:
        """Take the remaining steps."""
        total, per_step = self.config.total_steps, self.train_batches.per_step
        numbers = range(self.step * per_step, total * per_step)
        with (
            StopSignal() as stop,
            Prefetcher(self.train_batches, numbers=numbers, pin_memory=self.device.type == "cuda") as batches,
            logging_redirect_tqdm(),
            tqdm(total=total, initial=self.step, unit="step", disable=None) as bar,
        ):
            stopped = False
            while self.step < total and not stopped:
                try:
                    self._take_step(batches)
                    if self._due(self.config.log_every):
                        self._log(batches, bar=bar)
                    if self._due(self.config.eval_every):
                        self._validate()
                    stopped = stop.number is not None
                    if stopped or self._due(self.config.save_every):
                        self._save()
                except FloatingPointError as error:
                    raise FloatingPointError(f"{error}; {self._last_good()}") from error
                bar.update()
        assert self.checkpoint is not None
        assert self.meter.smoothed is not None
        return TrainResult(
            step=self.step,
            loss=self.meter.smoothed,
            val_loss=self.val_loss,
            checkpoint=self.checkpoint,
            signal=stop.number if self.step < total else None,
        )

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.total_steps

    def _take_step(self, batches: Prefetcher) -> None:
        started = time.perf_counter()
        config = self.config
        values = take_step(
            self.functions,
            batches=islice(batches, self.train_batches.per_step),
            optimizer=self.optimizer,
            lr=learning_rate(self.step + 1, config=config),
            config=config,
        )
        self.step += 1
        self.meter.add(self.step, values, step_tokens=config.batch_tokens)
        if any(self._due(every) for every in (config.log_every, config.eval_every, config.save_every)):
            self.meter.collect()
        self.busy_s += time.perf_counter() - started
        self.timed_steps += 1

    def _log(self, batches: Prefetcher, *, bar: tqdm) -> None:
        means = self.meter.take()
        lr = learning_rate(self.step, config=self.config)
        tokens_per_s = self.timed_steps * self.config.batch_tokens / self.busy_s
        values = {
            "step": self.step,
            "tokens": self.step * self.config.batch_tokens,
            "loss": means["loss"],
            "ce": means["ce"],
            "lr": lr,
            "grad_norm": means["grad_norm"],
            "tokens_per_s": tokens_per_s,
            "data_wait_s": batches.wait_s - self.waited_s,
            "unique_share": means["unique_share"],
        }
        append_line(self.out / "metrics.jsonl", values)
        bar.set_postfix_str(f"loss {means['loss']:.3f}, lr {lr:.2e}, {tokens_per_s:,.0f} tokens/s")
        self.busy_s, self.timed_steps, self.waited_s = 0.0, 0, batches.wait_s

    def _validate(self) -> None:
        now = {"step": self.step, "tokens": self.step * self.config.batch_tokens}
        if self.val_batches is not None:
            numbers, pin_memory = range(len(self.val_batches)), self.device.type == "cuda"
            with Prefetcher(self.val_batches, numbers=numbers, pin_memory=pin_memory) as batches:
                self.val_loss = evaluate(self.functions, batches=batches, device=self.device)
            ppl = math.exp(self.val_loss)
            append_line(self.out / "metrics.jsonl", {**now, "val_loss": self.val_loss, "val_ppl": ppl})
            logger.info("step %d: validation loss %.4f, perplexity %.2f", self.step, self.val_loss, ppl)
        text = sample_text(
            self.model,
            tokenizer=self.tokenizer,
            num_tokens=min(SAMPLE_TOKENS, self.model.config.max_seq_len),
            seed=self.config.seed,
        )
        append_line(self.out / "samples.jsonl", {**now, "text": text})

    def _save(self) -> None:
        self.meter.collect()
        state = checkpoints.TrainingState(
            step=self.step,
            train_config=self.config,
            data_fingerprint=self.dataset.fingerprint,
            meter=self.meter.state(),
        )
        self.checkpoint = checkpoints.save_training(
            self.out, model=self.model, optimizer=self.optimizer, tokenizer=self.tokenizer, state=state
        )
        logger.info("saved %s", self.checkpoint)
        if self.plots:
            plot_losses({self.out.name: self.out / "metrics.jsonl"}, image=self.out / "loss.png")

    def _last_good(self) -> str:
        if self.checkpoint is None:
            return "no checkpoint was saved before; start again with a lower lr"
        return f"the last good checkpoint is {self.checkpoint}, resume from it with a lower lr"


def _validation_batches(dataset: Mixture, *, config: TrainConfig) -> SequentialBatches | None:
    if dataset.validation is None or dataset.validation.num_windows(config.seq_len) == 0:
        tokens = 0 if dataset.validation is None else max(map(len, dataset.validation.streams))
        logger.warning("no validation: that split holds %d tokens, need seq_len + 1 = %d", tokens, config.seq_len + 1)
        return None
    return SequentialBatches(dataset.validation, config=config, max_tokens=config.eval_tokens)


def _check_fit(model_config: ModelConfig, *, train_config: TrainConfig, dataset: Mixture) -> None:
    if train_config.seq_len > model_config.max_seq_len:
        raise ValueError(
            f"seq_len is {train_config.seq_len}, but the model's max_seq_len is {model_config.max_seq_len}: lower the "
            "one or raise the other"
        )
    if dataset.vocab_size > model_config.vocab_size:
        raise ValueError(
            f"the data has {dataset.vocab_size} token ids, but the model's vocab_size is {model_config.vocab_size}: "
            "raise it"
        )
    if train_config.warmup_steps >= train_config.total_steps:
        logger.warning(
            "warmup_steps is %d, but the run has %d steps: the learning rate never reaches lr or falls",
            train_config.warmup_steps,
            train_config.total_steps,
        )


def _check_same_run(
    checkpoint: Checkpoint, *, model_config: ModelConfig, train_config: TrainConfig, dataset: Mixture
) -> None:
    state = checkpoints.read_state(checkpoint)
    if difference := dataset.difference(state.data_fingerprint):
        raise ValueError(f"{difference} that {checkpoint.path} was trained on; resume with that")
    changes = _changes(to_dict(checkpoint.config), to_dict(model_config))
    if changes:
        raise ValueError(f"the model differs from that of {checkpoint.path}: {', '.join(changes.values())}")
    changes = _changes(to_dict(state.train_config), to_dict(train_config))
    fixed = [text for name, text in changes.items() if name in _FIXED]
    if fixed:
        raise ValueError(f"a resumed run keeps its {', '.join(_FIXED)}; got {', '.join(fixed)}")
    if state.step > train_config.total_steps:
        raise ValueError(
            f"{checkpoint.path} is past the run's {train_config.total_steps} steps; raise total_tokens above "
            f"{state.step * train_config.batch_tokens}"
        )
    if changes:
        logger.warning("the recipe changes from here on: %s", ", ".join(changes.values()))


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{name} {after[name]!r}, was {before[name]!r}" for name in before if after[name] != before[name]}


def _describe(run: _Run, *, argv: Sequence[str]) -> dict[str, Any]:
    return {
        "model": to_dict(run.model.config),
        "train": to_dict(run.config),
        "data": run.dataset.describe(),
        "device": str(run.device),
        "argv": list(argv),
        "provenance": provenance(),
    }
