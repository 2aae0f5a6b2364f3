"""The reference runs: which models the study trains, and training those that are not there yet, several at once.

    WORK/
      data/train  data/held-out [data/wikitext]     folders of `flexmemory prepare`, one tokenizer
      runs/NAME                                     training runs (`flexmemory train`)

All runs of a size see the same tokens in the same order under one recipe. Its learning rate is the best of a sweep on
the dense base at as many tokens (with half of them another rate was the best); memory is swept beside it, so that what
the choice costs it can be seen.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from flexmemory.config import ModelConfig, TrainConfig
from flexmemory.model.accounting import count_parameters
from flexmemory.presets import VARIANTS, get_preset
from flexmemory.reproduce.deal import deal
from flexmemory.storage import read_json, write_json
from flexmemory.train import checkpoint as checkpoints
from flexmemory.train.data import TokenDataset
from flexmemory.train.loop import train

SWEPT = ("base", "memory")
ABLATIONS = ("flex1-square", "attention", "table", "ffn+table", "base-as-memory", "base-as-flex3")
"""FFN-C as one linear map; attention beside an FFN of a single cell, the smallest that a dense model can have; a free
table in place of FFN-M and beside it (peers' ideas); dense models with as many parameters as are active in others."""
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """What is trained at one size."""

    family: str
    """Presets whose models are trained: `FAMILY-base` and so on."""
    tokens: int
    """Tokens of a run, about: whole steps of the recipe."""
    lrs: tuple[float, ...]
    """Peak learning rates of the sweep, in rising order; one is not swept."""
    seeds: int = 1
    """Of the five variants of the paper; other runs have one."""
    ablations: tuple[str, ...] = ()
    """Which of `ABLATIONS` are trained too."""
    budgets: tuple[float, ...] = ()
    """More runs of base, memory and flex3, with so many times the tokens."""
    seq_len: int = 512
    batch_tokens: int = 131_072
    micro_batch_size: int = 128
    warmup_steps: int = 100
    lr_final: float = 1e-4
    validations: int = 10


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One training run."""

    size: Size
    variant: str
    tokens: int
    lr: float
    seed: int = 0

    @property
    def name(self) -> str:
        """Of its folder."""
        millions = f"{self.config.total_tokens / 1e6:.3g}M"
        return f"{self.size.family}-{self.variant}-{millions}-lr{self.lr:g}-seed{self.seed}"

    @property
    def config(self) -> TrainConfig:
        """The recipe."""
        size = self.size
        steps = max(1, round(self.tokens / size.batch_tokens))
        return TrainConfig(
            total_tokens=steps * size.batch_tokens, batch_tokens=size.batch_tokens, seq_len=size.seq_len,
            micro_batch_size=size.micro_batch_size, lr=self.lr, lr_final=min(size.lr_final, self.lr),
            warmup_steps=min(size.warmup_steps, steps // 4), seed=self.seed, log_every=max(1, steps // 50),
            eval_every=max(1, steps // size.validations), save_every=steps, keep_checkpoints=1, eval_tokens=10**9,
        )  # fmt: skip

    def model(self, vocab_size: int) -> ModelConfig:
        """Its model over a vocabulary."""
        config = variant_config(self.size.family, self.variant, vocab_size)
        return dataclasses.replace(config, max_seq_len=self.size.seq_len)


def variant_config(family: str, variant: str, vocab_size: int) -> ModelConfig:
    """A model of the paper, or one of `ABLATIONS`.

    Raises:
        ValueError: there is no such variant.
    """
    preset = {
        name: dataclasses.replace(get_preset(f"{family}-{name}").model, vocab_size=vocab_size) for name in VARIANTS
    }
    if variant in preset:
        return preset[variant]
    match variant:
        case "flex1-square":
            return dataclasses.replace(preset["flex1"], ffn_c="square")
        case "attention":
            return dataclasses.replace(preset["base"], intermediate_size=1)
        case "table":
            return dataclasses.replace(preset["memory"], memory_kind="table", intermediate_size=0)
        case "ffn+table":
            return dataclasses.replace(preset["memory"], memory_kind="ffn+table")
        case "base-as-memory" | "base-as-flex3":
            active = count_parameters(preset[variant.removeprefix("base-as-")]).active
            return narrower(preset["base"], active)
    raise ValueError(f"unknown variant {variant!r}; there are {', '.join((*VARIANTS, *ABLATIONS))}")


def narrower(base: ModelConfig, parameters: int) -> ModelConfig:
    """A dense model of the base's depth and heads with about so many parameters beside embedding and head.

    Heads are a multiple of 8 wide (of 2, where 8 is too wide), D is near that of K = 8/3 D, and K makes up the rest.
    """
    layers, heads = base.num_layers, base.num_heads
    width = math.sqrt(parameters / (12 * layers))
    unit = heads * (8 if width >= 16 * heads else 2)
    hidden_size = max(1, round(width / unit)) * unit
    cells = round((parameters / layers - 4 * hidden_size**2) / (3 * hidden_size))
    return dataclasses.replace(base, hidden_size=hidden_size, intermediate_size=max(1, cells))


def sweep(size: Size) -> list[Run]:
    """The runs that choose the learning rate: none where there is one."""
    if len(size.lrs) == 1:
        return []
    return [Run(size=size, variant=v, tokens=size.tokens, lr=lr) for lr in size.lrs for v in SWEPT]


def reference_runs(size: Size, *, lr: float, speed: Mapping[str, float] | None = None) -> list[Run]:
    """All runs of a size at its learning rate, the longest first.

    With `speed`, tokens a second of base, memory and flex3 measured alone, there are also runs of as many tokens as
    memory and flex3 take in the base's training time.
    """
    runs = [
        Run(size=size, variant=variant, tokens=size.tokens, lr=lr, seed=seed)
        for seed in range(size.seeds)
        for variant in VARIANTS
    ]
    runs += [Run(size=size, variant=variant, tokens=size.tokens, lr=lr) for variant in size.ablations]
    runs += [
        Run(size=size, variant=variant, tokens=round(size.tokens * share), lr=lr)
        for share in size.budgets
        for variant in ("base", "memory", "flex3")
    ]
    if speed:
        runs += [
            Run(size=size, variant=variant, tokens=equal_time_tokens(size, variant, speed), lr=lr)
            for variant in ("memory", "flex3")
        ]
    return sorted(dict.fromkeys(runs), key=lambda run: -run.tokens)


def equal_time_tokens(size: Size, variant: str, speed: Mapping[str, float]) -> int:
    """Tokens, in whole steps, that a variant takes in the time of the base's run."""
    steps = round(size.tokens * speed[variant] / speed["base"] / size.batch_tokens)
    return max(1, steps) * size.batch_tokens


def best_rate(size: Size, work: Path) -> float:
    """The learning rate of the sweep at which the base has the lowest held-out loss.

    Raises:
        FileNotFoundError: a run of the sweep is missing.
    """
    runs = [run for run in sweep(size) if run.variant == "base"]
    if not runs:
        return size.lrs[0]
    return min(runs, key=lambda run: outcome(run, work)["val_loss"] or math.inf).lr


def outcome(run: Run, work: Path) -> dict[str, Any]:
    """What `train_runs` wrote of a run: `val_loss`, None where it diverged.

    Raises:
        FileNotFoundError: it was not trained.
    """
    return read_json(work / "runs" / run.name / "outcome.json")


def train_runs(runs: Iterable[Run], work: Path, *, at_once: int, devices: Sequence[str]) -> None:
    """Train what is not there, `at_once` on each device; what was interrupted goes on.

    Raises:
        RuntimeError: a run failed; the others were finished.
    """
    left = [run for run in runs if not (work / "runs" / run.name / "outcome.json").exists()]
    jobs = {run.name: functools.partial(_train, run, work) for run in left}
    for _ in tqdm(deal(jobs, devices=devices, at_once=at_once), total=len(left), desc="training", unit="run"):
        pass


def _train(run: Run, work: Path, device: str) -> None:
    folder = work / "runs" / run.name
    data = TokenDataset.open(work / "data" / "train")
    result: dict[str, Any]
    try:
        done = train(
            run.model(data.vocab_size),
            train_config=run.config,
            data=work / "data" / "train",
            out=folder,
            resume=bool(checkpoints.list_checkpoints(folder)),
            device=device,
        )
        if done.signal is not None:
            raise KeyboardInterrupt
        result = {"val_loss": done.val_loss}
    except FloatingPointError as error:
        logger.warning("%s: %s", run.name, error)
        result = {"val_loss": None, "error": str(error)}
    write_json(folder / "outcome.json", result)
    if torch.device(device).type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()  # to processes beside this one


def trained(runs: Sequence[Run], work: Path) -> list[Run]:
    """Those that were trained to their end and did not diverge."""
    return [
        run
        for run in runs
        if (work / "runs" / run.name / "outcome.json").exists() and outcome(run, work)["val_loss"] is not None
    ]
