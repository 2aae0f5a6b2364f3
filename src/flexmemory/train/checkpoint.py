"""Training checkpoints: a model checkpoint that also holds what training needs to go on exactly.

    RUN/checkpoints/step-00000100/
      ...                     a model checkpoint (model/checkpoint.py); its manifest covers the two files below
      optimizer.safetensors   AdamW's state by parameter name
      training.json           `TrainingState`: step, recipe, data fingerprint, running loss

Each appears whole, by one rename. What interruption leaves is hidden folders (`.step-*.partial`), which the next
start removes.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from flexmemory.config import TrainConfig, from_dict, to_dict
from flexmemory.model.checkpoint import Checkpoint, save_checkpoint, save_tensors
from flexmemory.model.transformer import Transformer
from flexmemory.storage import atomic_folder, read_json, write_json
from flexmemory.tokenizer import Tokenizer
from flexmemory.train.optimizer import load_optimizer_tensors, optimizer_tensors

OPTIMIZER = "optimizer.safetensors"
TRAINING = "training.json"
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainingState:
    """Where a run is, besides weights and optimizer."""

    step: int
    """Optimizer steps taken."""
    train_config: TrainConfig
    """The recipe of these steps."""
    data_fingerprint: str
    """`Mixture.fingerprint` of the data."""
    meter: dict[str, Any]
    """`Meter.state()`."""


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of `run`, oldest first."""
    return sorted(path for path in run.glob("checkpoints/step-*") if path.is_dir())


def save_training(
    run: Path,
    *,
    model: Transformer,
    optimizer: torch.optim.AdamW,
    tokenizer: Tokenizer,
    state: TrainingState,
) -> Path:
    """Write a checkpoint of `run` and remove all but the newest `keep_checkpoints`; returns its folder.

    Raises:
        OSError: it could not be written, for instance because the disk is full; earlier ones are as they were.
        FloatingPointError: a weight is not finite; nothing was written.
    """
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise FloatingPointError(f"weights of {name} are not finite after step {state.step}")
    folder = run / "checkpoints" / f"step-{state.step:08d}"
    try:
        with atomic_folder(folder) as partial:
            save_tensors(optimizer_tensors(optimizer), partial / OPTIMIZER)
            values = {**dataclasses.asdict(state), "train_config": to_dict(state.train_config)}
            write_json(partial / TRAINING, values)
            save_checkpoint(partial, model, tokenizer)
    except OSError as error:
        kept = list_checkpoints(run)
        advice = f"the last checkpoint is {kept[-1]}" if kept else "there is no earlier one"
        raise OSError(f"could not save checkpoint {folder}: {error}; {advice}, free space and resume") from error
    for old in list_checkpoints(run)[: -state.train_config.keep_checkpoints]:
        hidden = old.with_name(f".{old.name}.partial")
        old.rename(hidden)  # a half-removed checkpoint must not look like one
        shutil.rmtree(hidden)
    return folder


def clean_partials(run: Path) -> None:
    """Remove what interrupted saves and removals left."""
    for partial in run.glob("checkpoints/.step-*.partial"):
        logger.warning("removing %s, left by an interrupted save", partial)
        shutil.rmtree(partial)


def newest_whole(run: Path) -> Checkpoint:
    """The newest checkpoint of `run`, every byte verified.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged; the newest whole one is named.
    """
    folders = list_checkpoints(run)
    if not folders:
        raise FileNotFoundError(f"{run} has no checkpoint to resume from; leave out --resume to start a run")
    try:
        return _open_whole(folders[-1])
    except ValueError as error:
        good = next((folder for folder in reversed(folders[:-1]) if _is_whole(folder)), None)
        advice = "no earlier checkpoint is whole: start a new run"
        if good is not None:
            advice = f"the last good one is {good}: remove those after it to resume there"
        raise ValueError(f"{error}; {advice}") from error


def read_state(checkpoint: Checkpoint) -> TrainingState:
    """The training state in `checkpoint`."""
    values = read_json(checkpoint.path / TRAINING)
    values["train_config"] = from_dict(TrainConfig, values["train_config"])
    return TrainingState(**values)


def restore(checkpoint: Checkpoint, *, model: Transformer, optimizer: torch.optim.AdamW) -> None:
    """Load weights and optimizer state of `checkpoint` into `model` and `optimizer`.

    Raises:
        ValueError: they do not fit, or a file cannot be read.
    """
    model.load_state_dict(checkpoint.load().state_dict())
    try:
        tensors = load_file(checkpoint.path / OPTIMIZER)
    except SafetensorError as error:
        raise ValueError(f"{checkpoint.path / OPTIMIZER} cannot be read ({error}); it is damaged") from error
    load_optimizer_tensors(optimizer, tensors)


def _open_whole(folder: Path) -> Checkpoint:
    try:
        checkpoint = Checkpoint.open(folder)
    except FileNotFoundError as error:
        raise ValueError(f"checkpoint {folder} is damaged: {error}") from error
    checkpoint.verify()
    for name in (OPTIMIZER, TRAINING):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is a model checkpoint without {name}; training cannot go on from it")
    return checkpoint


def _is_whole(folder: Path) -> bool:
    try:
        _open_whole(folder)
    except ValueError:
        return False
    return True
