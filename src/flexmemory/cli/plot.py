"""`flexmemory plot RUN... --out FILE.png`: compare runs by tokens, training time and compute."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from flexmemory.train.metrics import read_lines
from flexmemory.train.plot import Lines, draw_losses, has_losses

METRICS = "metrics.jsonl"


def plot(runs: Annotated[tuple[Path, ...], tyro.conf.Positional], /, *, out: Path) -> None:
    """Draw the losses of runs against tokens, training time and compute, and print where each run is.

    Args:
        runs: Run folders of `flexmemory train`, or their metrics files.
        out: The image to write: .png, .pdf or .svg.
    """
    if not runs:
        raise ValueError("name a run first: flexmemory plot RUN... --out FILE.png")
    files = [find_metrics(run) for run in runs]
    metrics = {label: read_metrics(file) for label, file in zip(labels(files), files, strict=True)}
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; name an image in it, such as {out / 'losses.png'}")
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_losses(metrics, image=out)
    print(f"{describe(metrics)}\n{out}")


def find_metrics(run: Path) -> Path:
    """The metrics file of a run folder, or `run` itself if it is a file.

    Raises:
        FileNotFoundError: there is none.
    """
    if not run.exists():
        raise FileNotFoundError(f"{run} does not exist; expected a run folder of `flexmemory train` or a {METRICS}")
    if run.is_dir() and not (run / METRICS).is_file():
        raise FileNotFoundError(f"{run} has no {METRICS}: it is no run folder, or nothing was logged yet")
    return run / METRICS if run.is_dir() else run


def read_metrics(file: Path) -> Lines:
    """The lines of a metrics file that has losses.

    Raises:
        ValueError: it has none, or is something else.
    """
    try:
        lines = read_lines(file)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file} is not lines of JSON ({error}); expected a {METRICS} of `flexmemory train`"
        ) from error
    if not has_losses(lines):
        raise ValueError(f"{file} holds no loss; plot a run's {METRICS}, after its first `log_every` steps")
    return lines


def labels(files: Sequence[Path]) -> list[str]:
    """A name for each metrics file: its run folder's, with as many parents as tell all of them apart.

    Raises:
        ValueError: a file is given twice.
    """
    paths = [path.parent if path.name == METRICS else path for path in (file.resolve() for file in files)]
    if repeated := [str(file) for file, path in zip(files, paths, strict=True) if paths.count(path) > 1]:
        raise ValueError(f"each run can be given once; got {' and '.join(repeated)}, which are the same")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def describe(metrics: dict[str, Lines]) -> str:
    """A table of where each run is: the last values of its metrics."""
    columns = {"tokens": ",.0f", "train_s": ",.0f", "flops": ".3g", "ce": ".4f", "val_loss": ".4f", "val_ppl": ",.2f"}
    width = max(map(len, metrics))
    rows = [f"{'':{width}}" + "".join(f"{field:>16}" for field in columns)]
    for label, lines in metrics.items():
        last = {field: value for line in lines for field, value in line.items()}
        cells = (format(last[field], form) if field in last else "-" for field, form in columns.items())
        rows.append(f"{label:{width}}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(rows)


def main(argv: list[str]) -> int:
    """Entry point of the verb."""
    tyro.cli(plot, args=argv, prog="flexmemory plot")
    return 0
