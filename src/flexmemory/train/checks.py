"""What is refused before training begins or goes on, and what is said when a process is lost."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from flexmemory.config import ModelConfig, TrainConfig, to_dict
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.train import checkpoint as checkpoints
from flexmemory.train.mixture import Mixture
from flexmemory.train.parallel import World

_FIXED = ("batch_tokens", "seq_len", "seed")
"""Fields of a recipe that a resumed run keeps."""
logger = logging.getLogger(__name__)


def check_fit(model_config: ModelConfig, *, train_config: TrainConfig, dataset: Mixture, world: World) -> None:
    """Refuse a model, a recipe, data and processes that do not fit together.

    Raises:
        ValueError: what does not fit what, and what to change.
    """
    tokens = train_config.seq_len * train_config.micro_batch_size * world.size
    if train_config.batch_tokens % tokens:
        raise ValueError(
            f"batch_tokens ({train_config.batch_tokens}) must be a multiple of seq_len * micro_batch_size * processes "
            f"({train_config.seq_len} * {train_config.micro_batch_size} * {world.size} = {tokens}): change one, or the "
            "number of processes"
        )
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


def check_teacher(teacher: Checkpoint, *, dataset: Mixture) -> None:
    """Refuse a teacher that reads other tokens than the data has.

    Raises:
        ValueError: the tokenizers differ.
    """
    if teacher.tokenizer_fingerprint != dataset.tokenizer().fingerprint:
        raise ValueError(
            f"the data was prepared with another tokenizer than {teacher.path} has; prepare the text with its tokenizer"
        )


def check_same_run(
    checkpoint: Checkpoint, *, model_config: ModelConfig, train_config: TrainConfig, dataset: Mixture
) -> None:
    """Refuse to go on from `checkpoint` with what would make another run; say what changes from here on.

    Raises:
        ValueError: the data, the model, or what defines a step is another, or the run is at its end.
    """
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


@contextlib.contextmanager
def lost_processes_explained(out: Path, world: World) -> Iterator[None]:
    """Turn the error of a broken connection to another process into one that says how to go on."""
    try:
        yield
    except RuntimeError as error:
        if world.size == 1 or not (isinstance(error, dist.DistError) or "onnection" in str(error)):
            raise
        kept = checkpoints.list_checkpoints(out)
        advice = (
            f"run the same command with --resume to go on from {kept[-1]}" if kept else "there is no checkpoint yet"
        )
        message = f"process {world.rank} of {world.size} lost another process of the run, which ended; {advice}"
        raise ConnectionError(message) from error
