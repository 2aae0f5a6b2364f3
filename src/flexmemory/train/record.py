"""`config.json` of a run: what it was started with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexmemory.config import ModelConfig, TrainConfig, from_dict, to_dict
from flexmemory.provenance import provenance
from flexmemory.storage import read_json, write_json

NAME = "config.json"


def write_run_config(
    out: Path,
    model_config: ModelConfig,
    *,
    train_config: TrainConfig,
    facts: Mapping[str, Any],
    argv: Sequence[str],
) -> None:
    """Record configurations, `facts`, command line and versions in the run folder `out`."""
    configs = {"model": to_dict(model_config), "train": to_dict(train_config)}
    write_json(out / NAME, {**configs, **facts, "argv": list(argv), "provenance": provenance()})


def read_run_config(out: Path) -> tuple[ModelConfig, TrainConfig, list[str]]:
    """The configurations and the command line that the run folder `out` was last started with.

    Raises:
        FileNotFoundError: `out` is not a run folder.
    """
    if not (out / NAME).is_file():
        raise FileNotFoundError(f"{out} holds no run to resume; leave out --resume to start one")
    values = read_json(out / NAME)
    return from_dict(ModelConfig, values["model"]), from_dict(TrainConfig, values["train"]), values["argv"]
