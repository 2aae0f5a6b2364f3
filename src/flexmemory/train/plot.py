"""Loss curves of runs, drawn from their metrics files: against tokens, training time and compute.

Matplotlib is optional (`flexmemory[train]`) and slow to import, so it is imported where it draws.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from flexmemory.train.metrics import read_lines

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

INSTALL = "matplotlib is not installed; pip install 'flexmemory[train]'"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, whose colours most colour-blind readers tell apart; markers differ as well."""
MARKERS = "os^Dvp"
FIRST_SHARE = 0.1
"""Share of a run whose losses do not set the limits of the plot: the first ones would flatten the rest."""
SMOOTHED_SHARE = 0.03
"""Share of a run's training losses that one point of its curve is the mean of."""
MOST_MARKERS = 12
logger = logging.getLogger(__name__)

Lines = Sequence[Mapping[str, Any]]
"""What a metrics file holds."""


class Axis(NamedTuple):
    """What losses are drawn against."""

    title: str
    units: dict[str, float]
    """In rising order."""


AXES = {
    "tokens": Axis("training tokens", {"": 1, "thousands": 1e3, "millions": 1e6, "billions": 1e9, "trillions": 1e12}),
    "train_s": Axis("training time", {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400}),
    "flops": Axis("training compute", {"FLOP": 1, "GFLOP": 1e9, "TFLOP": 1e12, "PFLOP": 1e15, "EFLOP": 1e18}),
}
"""By the field of metrics lines."""


def can_plot() -> bool:
    """Whether matplotlib is there; if not, a warning says how to get it."""
    found = importlib.util.find_spec("matplotlib") is not None
    if not found:
        logger.warning("no loss.png: %s", INSTALL)
    return found


def plot_losses(runs: Mapping[str, Path], *, image: Path) -> None:
    """Draw the metrics files of named runs by tokens; before there is a loss, there is no image either."""
    lines = {name: read_lines(metrics) for name, metrics in runs.items() if metrics.exists()}
    if any(has_losses(each) for each in lines.values()):
        draw_losses(lines, image=image, against=["tokens"])


def has_losses(lines: Lines) -> bool:
    """Whether there is anything to draw."""
    return any("tokens" in line and ("ce" in line or "val_loss" in line) for line in lines)


def draw_losses(runs: Mapping[str, Lines], *, image: Path, against: Sequence[str] = tuple(AXES)) -> None:
    """Draw training (thin, smoothed) and validation (marked) cross entropy of named runs, one panel per axis.

    A run that did not log the field of an axis is left out of that panel, a panel without runs is left out of the
    image, and a warning says so.

    Args:
        runs: The metrics lines of each run; one at least has losses.
        image: The file to write; its suffix says the format.
        against: Keys of `AXES`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: matplotlib does not know the format.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(INSTALL) from error

    panels = {field: named for field in against if (named := _that_logged(field, runs))}
    width = 6.4 if len(panels) == 1 else 4 * len(panels)
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(width, 4), layout="constrained")
        row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (field, named) in zip(row, panels.items(), strict=True):
            _draw_panel(axes, field, runs, named)
        row[0].set_ylabel("cross entropy (nats per token)")
        row[0].set_ylim(_limits(list(runs.values())))
        _add_legend(figure, list(runs))
        partial = image.with_name(f".{image.name}.partial")
        figure.savefig(partial, dpi=160, format=image.suffix.removeprefix(".") or "png")
    partial.replace(image)


def _that_logged(field: str, runs: Mapping[str, Lines]) -> list[str]:
    """Names of the runs that logged `field` with a loss."""
    named = [name for name, lines in runs.items() if any(len(_points(lines, field, y)) for y in ("ce", "val_loss"))]
    if missing := [name for name in runs if name not in named]:
        title = AXES[field].title
        logger.warning("%s: metrics without %s, left out of the panel by %s", ", ".join(missing), field, title)
    return named


def _points(lines: Lines, x: str, y: str) -> Float[np.ndarray, "N 2"]:
    """The values of fields `x` and `y`, where a line has both; `y` smoothed if it is the training loss."""
    points = np.array([(line[x], line[y]) for line in lines if x in line and y in line], dtype=float).reshape(-1, 2)
    if y == "ce":
        points[:, 1] = _smoothed(points[:, 1])
    return points


def _smoothed(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Each value's mean with its neighbours: fewer at the beginning, where the loss falls fast."""
    places = np.arange(len(values))
    reach = np.minimum(places, int(len(values) * SMOOTHED_SHARE / 2))
    begin, end = places - reach, np.minimum(places + reach + 1, len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[end] - sums[begin]) / (end - begin)


def _draw_panel(axes: matplotlib.axes.Axes, field: str, runs: Mapping[str, Lines], named: Sequence[str]) -> None:
    axis = AXES[field]
    largest = max(line[field] for name in named for line in runs[name] if field in line)
    units = list(axis.units.items())
    unit, size = next((each for each in reversed(units) if each[1] <= largest), units[0])
    for number, name in enumerate(runs):
        if name not in named:
            continue
        colour, marker = _style(number)
        training, validation = (_points(runs[name], field, y) / (size, 1) for y in ("ce", "val_loss"))
        every = -(-len(validation) // MOST_MARKERS) or 1
        axes.plot(*training.T, color=colour, linewidth=0.9, alpha=0.55)
        axes.plot(
            *validation.T,
            color=colour,
            linewidth=1.6,
            marker=marker,
            markersize=5,
            markeredgecolor="white",
            markeredgewidth=0.6,
            markevery=slice((len(validation) - 1) % every, None, every),  # the last one is marked
        )
    axes.set_xlabel(f"{axis.title} ({unit})" if unit else axis.title)
    axes.set_xlim(left=0)
    axes.grid(visible=True, color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)


def _style(number: int) -> tuple[str, str]:
    """Colour and marker of a run; 42 runs look different."""
    return COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]


def _limits(runs: Sequence[Lines]) -> tuple[float, float]:
    """Limits of the loss that show all of it but each run's first steep part."""
    curves = [points for lines in runs for y in ("ce", "val_loss") if len(points := _points(lines, "tokens", y))]
    low = min(float(losses.min()) for _, losses in (points.T for points in curves))
    high = max(float(losses[tokens >= FIRST_SHARE * tokens[-1]].max()) for tokens, losses in (p.T for p in curves))
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def _add_legend(figure: matplotlib.figure.Figure, names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    entries = [
        *((name, *_style(number), 1.6) for number, name in enumerate(names)),
        ("validation", "0.5", "o", 1.6),
        ("training, smoothed", "0.5", "", 0.9),
    ]
    handles = [
        Line2D([], [], label=label, color=colour, marker=marker, linewidth=width, markeredgecolor="white")
        for label, colour, marker, width in entries
    ]
    inches = sum(0.6 + 0.07 * len(label) for label, *_ in entries)
    columns = math.ceil(len(entries) / math.ceil(inches / figure.get_figwidth()))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False)
