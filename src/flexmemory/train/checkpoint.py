"""Training checkpoints: a model checkpoint that also holds what training needs to go on exactly.

    RUN/checkpoints/step-00000100/
      ...                     a model checkpoint (model/checkpoint.py); its manifest covers the files below
      optimizer/              the optimizer's state by parameter name, a file from each process, as written by PyTorch's
                              distributed checkpoint in safetensors; any number of processes reads it
      training.json           `TrainingState`: step, recipe, data fingerprint, running loss

Each appears whole, by one rename. What interruption leaves is hidden folders (`.step-*.partial`), which the next
start removes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from flexmemory.config import TrainConfig, from_dict, to_dict
from flexmemory.model.checkpoint import Checkpoint, write_checkpoint
from flexmemory.model.transformer import Transformer
from flexmemory.storage import atomic_folder, read_json, write_json
from flexmemory.tokenizer import Tokenizer
from flexmemory.train.optimizer import Optimizer
from flexmemory.train.parallel import World, local, whole

OPTIMIZER = "optimizer"
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
    train_s: float = 0.0
    """Seconds of training."""
    logged_s: float = 0.0
    """`train_s` at the last line of metrics."""
    flops: float = 0.0
    """Floating-point operations up to the last line of metrics."""


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of `run`, oldest first."""
    return sorted(path for path in run.glob("checkpoints/step-*") if path.is_dir())


def save_training(
    run: Path,
    *,
    model: Transformer,
    optimizer: Optimizer,
    tokenizer: Tokenizer,
    state: TrainingState,
    world: World | None = None,
) -> Path:
    """Write a checkpoint of `run` and remove all but the newest `keep_checkpoints`; returns its folder.

    Raises:
        OSError: it could not be written, for instance because the disk is full; earlier ones are as they were.
        FloatingPointError: a weight is not finite; nothing was written.
    """
    world = world or World(device=torch.device("cpu"))
    for name, parameter in model.named_parameters():
        if not bool(local(parameter).isfinite().all()):
            raise FloatingPointError(f"weights of {name} are not finite after step {state.step}")
    folder = run / "checkpoints" / f"step-{state.step:08d}"
    partial = folder.parent / f".{folder.name}.partial"
    try:
        with atomic_folder(folder) if world.is_main else contextlib.nullcontext():
            world.barrier()
            _save_optimizer(optimizer, partial / OPTIMIZER)
            weights = {}
            for name, parameter in model.named_parameters():
                tensor = whole(parameter.detach())
                if world.is_main:
                    weights[name] = tensor.cpu()
            if world.is_main:
                values = {**dataclasses.asdict(state), "train_config": to_dict(state.train_config)}
                write_json(partial / TRAINING, values)
                write_checkpoint(partial, model.config, weights, tokenizer)
    except OSError as error:
        kept = list_checkpoints(run)
        advice = f"the last checkpoint is {kept[-1]}" if kept else "there is no earlier one"
        raise OSError(f"could not save checkpoint {folder}: {error}; {advice}, free space and resume") from error
    if world.is_main:
        for old in list_checkpoints(run)[: -state.train_config.keep_checkpoints]:
            hidden = old.with_name(f".{old.name}.partial")
            old.rename(hidden)  # a half-removed checkpoint must not look like one
            shutil.rmtree(hidden)
    world.barrier()
    return folder


def _save_optimizer(optimizer: Optimizer, folder: Path) -> None:
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _quiet():
        try:
            dcp.save(dict(optimizer.tensors()), storage_writer=writer)
        except CheckpointException as error:
            rank, (cause, _) = next(iter(error.failures.items()))
            raise OSError(f"process {rank} could not write {folder.name}: {cause}") from cause


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what PyTorch says about being called by one process, and about its own deprecated types."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch.distributed")
        yield


def clean_partials(run: Path) -> None:
    """Remove what interrupted saves and removals left."""
    for partial in run.glob("checkpoints/.step-*.partial"):
        logger.warning("removing %s, left by an interrupted save", partial)
        shutil.rmtree(partial)


def newest_whole(run: Path, *, world: World | None = None) -> Checkpoint:
    """The newest checkpoint of `run`, every byte verified (by the main process).

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged; the newest whole one is named.
    """
    folders = list_checkpoints(run)
    if not folders:
        raise FileNotFoundError(f"{run} has no checkpoint to resume from; leave out --resume to start a run")
    try:
        is_main = world is None or world.is_main
        checkpoint = _open_whole(folders[-1], verify=is_main)
    except ValueError as error:
        good = next((folder for folder in reversed(folders[:-1]) if _is_whole(folder)), None)
        advice = "no earlier checkpoint is whole: start a new run"
        if good is not None:
            advice = f"the last good one is {good}: remove those after it to resume there"
        raise ValueError(f"{error}; {advice}") from error
    if world is not None:
        world.barrier()
    return checkpoint


def read_state(checkpoint: Checkpoint) -> TrainingState:
    """The training state in `checkpoint`."""
    values = read_json(checkpoint.path / TRAINING)
    values["train_config"] = from_dict(TrainConfig, values["train_config"])
    return TrainingState(**values)


def restore_optimizer(checkpoint: Checkpoint, optimizer: Optimizer) -> None:
    """Load the optimizer state of `checkpoint`, whatever number of processes wrote it and reads it.

    Raises:
        ValueError: it does not fit, or a file cannot be read.
    """
    tensors = optimizer.tensors()
    folder = checkpoint.path / OPTIMIZER
    reader = HuggingFaceStorageReader(str(folder))
    try:
        optimizer.check_names(reader.read_metadata().state_dict_metadata)
        with _quiet():
            dcp.load(tensors, storage_reader=reader)
    except (SafetensorError, CheckpointException) as error:
        raise ValueError(f"{folder} cannot be read ({error}); it is damaged") from error
    optimizer.load(tensors)


def _open_whole(folder: Path, *, verify: bool = True) -> Checkpoint:
    try:
        checkpoint = Checkpoint.open(folder)
    except FileNotFoundError as error:
        raise ValueError(f"checkpoint {folder} is damaged: {error}") from error
    if verify:
        checkpoint.verify()
    for name in (OPTIMIZER, TRAINING):
        if not (folder / name).exists():
            raise ValueError(f"{folder} is a model checkpoint without {name}; training cannot go on from it")
    return checkpoint


def _is_whole(folder: Path) -> bool:
    try:
        _open_whole(folder)
    except ValueError:
        return False
    return True
