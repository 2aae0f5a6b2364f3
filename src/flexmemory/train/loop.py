"""The training loop, in one process or many.

    RUN/
      config.json      resolved model and recipe, data, device, versions, command line
      metrics.jsonl    every `log_every` steps; lines with `val_loss` at validations
      samples.jsonl    text sampled at validations
      loss.png         both losses by tokens, where matplotlib is installed
      checkpoints/     see train/checkpoint.py

Batches, learning rate and metrics are functions of the step and of what checkpoints hold, so a resumed run is the run
that was never interrupted. Under torchrun every process runs all of this on its share of each step's sequences; the
main process alone writes.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from flexmemory.config import ModelConfig, TrainConfig
from flexmemory.device import free_memory, matmul_rate, peak_memory
from flexmemory.model.accounting import train_flops_per_token
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.model.init import new_model
from flexmemory.model.transformer import Transformer
from flexmemory.train import checkpoint as checkpoints
from flexmemory.train.checks import check_fit, check_same_run, check_teacher, lost_processes_explained
from flexmemory.train.data import Batch, Prefetcher, SequentialBatches, ShuffledBatches
from flexmemory.train.metrics import Meter, append_line, drop_after
from flexmemory.train.mixture import Mixture
from flexmemory.train.optimizer import Optimizer
from flexmemory.train.parallel import World, gathered, join
from flexmemory.train.plot import can_plot, plot_losses
from flexmemory.train.record import write_run_config
from flexmemory.train.sample import sample_text
from flexmemory.train.schedule import learning_rate
from flexmemory.train.step import Teacher, choose_rows, evaluate, take_step, training_model, uses_bf16
from flexmemory.train.stop import StopSignal
from flexmemory.train.track import Track, TrackerName, check_tracker, tracking

SAMPLE_TOKENS = 128
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
    start: Transformer | None = None,
    teacher: Checkpoint | None = None,
    device: str = "auto",
    track: TrackerName = "none",
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
        start: The weights to begin with, of the same configuration; by default they are drawn.
        teacher: A model whose predictions are learnt instead of the text's next tokens; validation is on the text.
        device: `cpu`, `cuda`, `cuda:1` ..., or `auto`: the GPU where there is one.
        track: Where metrics go besides the run's folder.
        argv: The command line, to be recorded.

    Raises:
        ValueError: model, recipe, data and run folder do not fit together, or the newest checkpoint is damaged.
        FileNotFoundError: there is no prepared data, or nothing to resume.
        OSError: the run folder cannot be written.
        FloatingPointError: the loss diverged or is not finite; earlier checkpoints are as they were.
        ImportError: the tracker is not installed.
    """
    check_tracker(track)
    with join(device) as world, lost_processes_explained(out, world):
        dataset = Mixture.open(data)
        check_fit(model_config, train_config=train_config, dataset=dataset, world=world)
        if teacher is not None:
            check_teacher(teacher, dataset=dataset)
        checkpoint = None
        if resume:
            checkpoint = checkpoints.newest_whole(out, world=world)
            check_same_run(checkpoint, model_config=model_config, train_config=train_config, dataset=dataset)
        elif found := checkpoints.list_checkpoints(out):
            message = f"{out} already holds a run ({found[-1].name}); add --resume to go on, or use another --out"
            raise ValueError(message)
        model = new_model(model_config, seed=train_config.seed, device=world.device)
        if start is not None:
            model.load_state_dict(start.state_dict())
        run = _Run(model, train_config=train_config, dataset=dataset, out=out, world=world, checkpoint=checkpoint)
        if teacher is not None:
            dtype = torch.bfloat16 if uses_bf16(train_config, world.device) else torch.float32
            run.module.teacher = Teacher(teacher.load(device=world.device, dtype=dtype))
        if world.is_main:
            write_run_config(
                out,
                model_config,
                train_config=train_config,
                argv=argv,
                facts={
                    "data": dataset.describe(),
                    "device": str(world.device),
                    "processes": world.size,
                    "rows_per": run.module.rows_per if model_config.has_memory else None,
                    "teacher": teacher and teacher.fingerprint,
                    "parameters": run.num_parameters,
                    "matmul_flops_per_s": run.matmul_rate,
                },
            )
        with tracking(track if world.is_main else "none", run=out, step=run.step) as run.track:
            return run.train()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Logged:
    """Where the last line of metrics was written."""

    step: int = 0
    train_s: float = 0.0
    waited_s: float = 0.0


class _Run:
    """One run under way: what a step changes, and what it needs."""

    def __init__(
        self,
        model: Transformer,
        *,
        train_config: TrainConfig,
        dataset: Mixture,
        out: Path,
        world: World,
        checkpoint: Checkpoint | None,
    ) -> None:
        """Make the run's folder what it was at `checkpoint`, or empty, and `model` and optimizer likewise."""
        self.config = train_config
        self.dataset = dataset
        self.out = out
        self.world = world
        self.tokenizer = dataset.tokenizer()
        self.val_batches = _validation_batches(dataset, config=train_config)
        self.matmul_rate = matmul_rate(world.device, bf16=uses_bf16(train_config, world.device))
        if checkpoint is not None:
            model.load_state_dict(checkpoint.load(device=world.device).state_dict())
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.module = training_model(model, config=train_config, world=world)
        self.optimizer = Optimizer(model, config=train_config, world=world)
        self.train_batches = self._train_batches()
        self.meter = Meter(margin=train_config.divergence_margin, roles=self.optimizer.roles, world=world)
        self.plots = world.is_main and can_plot()
        self.track: Track = lambda _values: None
        self.step = 0
        self.flops = self.train_s = 0.0
        self.val_loss: float | None = None
        self.checkpoint: Path | None = None
        self.logged = _Logged()
        self.timed_steps = 0
        if checkpoint is not None:
            self._restore(checkpoint)
        if world.is_main:
            out.mkdir(parents=True, exist_ok=True)
            checkpoints.clean_partials(out)
            for name in ("metrics.jsonl", "samples.jsonl"):
                drop_after(out / name, step=self.step)

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoints.read_state(checkpoint)
        checkpoints.restore_optimizer(checkpoint, self.optimizer)
        self.meter.restore(state.meter)
        self.step, self.flops, self.train_s = state.step, state.flops, state.train_s
        self.checkpoint = checkpoint.path
        self.logged = _Logged(step=self.step - self.meter.num_steps, train_s=state.logged_s)
        logger.info("resuming after step %d of %d", self.step, self.config.total_steps)

    def _train_batches(self) -> ShuffledBatches:
        """Batches whose sequences share a table of rows: this process's share of a step, or micro-batches."""
        config, tokens = self.config, self.dataset.train
        micro_batches = ShuffledBatches(tokens, config=config)
        alone = self.module.micro_steps == 1 and self.world.size == 1
        if config.rows_per == "micro-batch" or alone or not self.module.model.config.has_memory:
            return micro_batches
        shares = ShuffledBatches(
            tokens, config=config, batch_size=config.batch_tokens // config.seq_len // self.world.size
        )
        if config.rows_per == "auto":
            rows_per = choose_rows(
                self.module,
                shares[self.world.rank],
                matmul_flops_per_s=self.matmul_rate,
                free_bytes=free_memory(self.world.device),
            )
            self.module.rows_per = rows_per
            if rows_per == "micro-batch":
                return micro_batches
        return shares

    def train(self) -> TrainResult:
        """Take the remaining steps."""
        total, per_step = self.config.total_steps, self.train_batches.per_step
        own = per_step // self.world.size
        numbers = (
            step * per_step + self.world.rank * own + number
            for step in range(self.step, total)
            for number in range(own)
        )
        with (
            StopSignal() as stop,
            Prefetcher(self.train_batches, numbers=numbers, pin_memory=self._on_gpu) as batches,
            logging_redirect_tqdm(),
            tqdm(total=total, initial=self.step, unit="step", disable=None if self.world.is_main else True) as bar,
        ):
            stopped = False
            while self.step < total and not stopped:
                try:
                    self._take_step(islice(batches, own), num_batches=own)
                    if self._due(self.config.log_every):
                        self._log(batches, bar=bar)
                    if self._due(self.config.eval_every):
                        self._validate()
                    stopped = self.world.any(stop.number is not None)
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
            signal=(stop.number or signal.SIGTERM) if self.step < total else None,
        )

    @property
    def _on_gpu(self) -> bool:
        return self.world.device.type == "cuda"

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.total_steps

    def _take_step(self, batches: Iterable[Batch], *, num_batches: int) -> None:
        started = time.perf_counter()
        values = take_step(
            self.module,
            batches=batches,
            num_batches=num_batches,
            optimizer=self.optimizer,
            lr=learning_rate(self.step + 1, config=self.config),
        )
        self.step += 1
        self.timed_steps += 1
        self.meter.add(self.step, values)
        if any(self._due(every) for every in (self.config.log_every, self.config.eval_every, self.config.save_every)):
            self.meter.collect()
        self.train_s += time.perf_counter() - started

    def _log(self, batches: Prefetcher, *, bar: tqdm) -> None:
        means = self.meter.take()
        steps, seconds = self.step - self.logged.step, self.train_s - self.logged.train_s
        unique_share = means.pop("num_unique") / self.config.batch_tokens
        flops_per_token = train_flops_per_token(
            self.module.model.config, unique_share=unique_share, seq_len=self.config.seq_len
        )
        tokens_per_s = steps * self.config.batch_tokens / seconds
        self.flops += steps * self.config.batch_tokens * flops_per_token
        phases = {f"{name}_s": seconds / self.timed_steps for name, seconds in self._phases().items()}
        values = {
            "step": self.step,
            "tokens": self.step * self.config.batch_tokens,
            "train_s": self.train_s,
            "flops": self.flops,
            **means,
            "lr": learning_rate(self.step, config=self.config),
            "unique_share": unique_share,
            "tokens_per_s": tokens_per_s,
            "mfu": tokens_per_s * flops_per_token / (self.matmul_rate * self.world.size),
            "memory_peak_gb": peak_memory(self.world.device) / 1e9,
            "data_wait_s": (batches.wait_s - self.logged.waited_s) / self.timed_steps,
            **phases,
        }
        self._write(values)
        bar.set_postfix_str(f"loss {means['loss']:.3f}, lr {values['lr']:.2e}, {tokens_per_s:,.0f} tokens/s")
        self.logged = _Logged(step=self.step, train_s=self.train_s, waited_s=batches.wait_s)
        self.timed_steps = 0

    def _phases(self) -> dict[str, float]:
        """Seconds since the last line in each part of a step; the head is part of batches, the rest is the backbone."""
        seconds = self.module.phases.take()
        return {
            "rows": seconds.get("rows", 0.0),
            "backbone": seconds["batches"] - seconds["head"],
            "head": seconds["head"],
            "optimizer": seconds["optimizer"],
        }

    def _write(self, values: Mapping[str, Any]) -> None:
        if self.world.is_main:
            append_line(self.out / "metrics.jsonl", values)
            self.track(values)

    def _validate(self) -> None:
        now = {"step": self.step, "tokens": self.step * self.config.batch_tokens}
        now |= {"train_s": self.train_s, "flops": self.flops}
        if self.val_batches is not None:
            count, (rank, size) = len(self.val_batches), (self.world.rank, self.world.size)
            rounds = -(-count // size)  # every process takes as many: their forward passes belong together
            numbers = [min(number, count - 1) for number in range(rank, rounds * size, size)]
            with Prefetcher(self.val_batches, numbers=numbers, pin_memory=self._on_gpu) as batches:
                self.val_loss = evaluate(self.module, batches, num_counted=len(range(rank, count, size)))
            ppl = math.exp(self.val_loss)
            self._write({**now, "val_loss": self.val_loss, "val_ppl": ppl})
            logger.info("step %d: validation loss %.4f, perplexity %.2f", self.step, self.val_loss, ppl)
        with gathered(self.module), torch.compiler.set_stance("force_eager"):
            text = sample_text(
                self.module.model,
                tokenizer=self.tokenizer,
                num_tokens=min(SAMPLE_TOKENS, self.module.model.config.max_seq_len),
                seed=self.config.seed,
            )
        if self.world.is_main:
            append_line(self.out / "samples.jsonl", {"step": now["step"], "tokens": now["tokens"], "text": text})

    def _save(self) -> None:
        self.meter.collect()
        state = checkpoints.TrainingState(
            step=self.step,
            train_config=self.config,
            data_fingerprint=self.dataset.fingerprint,
            meter=self.meter.state(),
            train_s=self.train_s,
            logged_s=self.logged.train_s,
            flops=self.flops,
        )
        self.checkpoint = checkpoints.save_training(
            self.out,
            model=self.module.model,
            optimizer=self.optimizer,
            tokenizer=self.tokenizer,
            state=state,
            world=self.world,
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
