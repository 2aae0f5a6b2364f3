"""Metrics to TensorBoard or Weights & Biases as they are logged; `metrics.jsonl` stays the record.

Neither is a dependency of this package. Field names and steps are those of `metrics.jsonl`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from flexmemory.storage import read_json

TrackerName = Literal["none", "tensorboard", "wandb"]
Track = Callable[[Mapping[str, float | int]], None]
"""Takes a line of `metrics.jsonl`."""


def check_tracker(name: TrackerName) -> None:
    """Say early that a tracker is missing.

    Raises:
        ImportError: the tracker's package is not installed.
    """
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ImportError(f"--track {name} needs a package that is not installed: pip install {name}")


@contextlib.contextmanager
def tracking(name: TrackerName, *, run: Path, step: int) -> Iterator[Track]:
    """Open the tracker called `name` for the run folder `run`, yield what forwards a line, and close it.

    Args:
        name: The tracker; `none` takes lines and does nothing.
        run: A run folder with its `config.json`; the tracker keeps its files there.
        step: Steps taken so far: 0 begins anew, more goes on with what was tracked before.

    Raises:
        ImportError: the tracker's package is not installed.
        ValueError: Weights & Biases refused to start.
    """
    check_tracker(name)
    match name:
        case "none":
            yield lambda _values: None
        case "tensorboard":
            with _tensorboard(run, step=step) as track:
                yield track
        case "wandb":
            with _wandb(run, step=step) as track:
                yield track


@contextlib.contextmanager
def _tensorboard(run: Path, *, step: int) -> Iterator[Track]:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run / "tensorboard"), purge_step=step + 1) as writer:  # resumed steps come again

        def track(values: Mapping[str, float | int]) -> None:
            for field, value in values.items():
                if field != "step":
                    writer.add_scalar(field, value, int(values["step"]))
            writer.flush()

        yield track


@contextlib.contextmanager
def _wandb(run: Path, *, step: int) -> Iterator[Track]:
    import wandb  # pyright: ignore[reportMissingImports] - optional

    id_file = run / "wandb" / "id"
    if step == 0 or not id_file.exists():
        id_file.parent.mkdir(exist_ok=True)
        id_file.write_text(secrets.token_hex(8))
    try:
        tracked = wandb.init(
            project="flexmemory",
            name=run.resolve().name,
            id=id_file.read_text(),
            dir=str(run),
            config=read_json(run / "config.json"),
            resume="allow",
        )
    except wandb.Error as error:
        raise ValueError(
            f"Weights & Biases did not start: {error}; train without --track wandb, or repair it"
        ) from error
    try:
        yield lambda values: tracked.log(dict(values), step=int(values["step"]))
    except BaseException:
        tracked.finish(exit_code=1)
        raise
    tracked.finish()
