"""What a run measures: values per step, lines of JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexmemory.train.parallel import World
from flexmemory.train.step import StepValues

SMOOTHING = 0.9


class Meter:
    """Gathers step values on the device and reads them only when asked, so that steps wait for nothing.

    It also watches the loss, one step after the other: its running mean must stay finite and within `margin` of its
    best.
    """

    def __init__(self, *, margin: float, roles: Sequence[str] = (), world: World | None = None) -> None:
        """A meter that has seen no step; `roles` names the optimizer's groups, `world` who else measures."""
        self._columns = ("loss", "ce", "grad_norm", *(f"grad_norm_{role}" for role in roles), "num_unique")
        self._world = world
        self.smoothed: float | None = None
        """Running mean of the loss."""
        self._margin = margin
        self._best = math.inf
        self._pending: list[tuple[int, Tensor]] = []
        self._values: list[list[float]] = []

    def add(self, step: int, values: StepValues) -> None:
        """Note the values of `step`."""
        count = torch.full((1,), values.num_unique, dtype=values.scalars.dtype, device=values.scalars.device)
        self._pending.append((step, torch.cat((values.scalars, count))))

    def collect(self) -> None:
        """Wait for the device and take in what was noted: losses and row counts summed over all processes.

        Raises:
            FloatingPointError: a loss or gradient was not finite, or the loss diverged; step and loss are named.
        """
        if not self._pending:
            return
        steps, scalars = zip(*self._pending, strict=True)
        self._pending = []
        values = torch.stack(scalars).double()
        if self._world is not None:
            own = [0, 1, values.shape[1] - 1]  # gradient norms are the whole run's already
            values[:, own] = self._world.sum(values[:, own])
        for step, row in zip(steps, values.tolist(), strict=True):
            self._watch(step, loss=row[0], grad_norm=row[2])
            self._values.append(row)

    def take(self) -> dict[str, float]:
        """Means over the steps since the last call."""
        columns = zip(*self._values, strict=True)
        means = [sum(column) / len(self._values) for column in columns]
        self._values = []
        return dict(zip(self._columns, means, strict=True))

    @property
    def num_steps(self) -> int:
        """Steps collected since the last `take`."""
        return len(self._values)

    def _watch(self, step: int, *, loss: float, grad_norm: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise FloatingPointError(f"step {step} is not finite: loss {loss}, gradient norm {grad_norm}")
        self.smoothed = loss if self.smoothed is None else SMOOTHING * self.smoothed + (1 - SMOOTHING) * loss
        self._best = min(self._best, self.smoothed)
        if self.smoothed > self._best + self._margin:
            raise FloatingPointError(
                f"training diverged at step {step}: loss {loss:.4f}, its running mean {self.smoothed:.4f} is more than "
                f"{self._margin} above its best, {self._best:.4f}"
            )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; every step must have been collected."""
        assert not self._pending
        return {"smoothed": self.smoothed, "best": self._best, "values": self._values}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.smoothed, self._best, self._values = state["smoothed"], state["best"], state["values"]


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Add one line of JSON to `path`."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values, ensure_ascii=False) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All lines of `path`; a last line that was cut off in writing is left out.

    Raises:
        ValueError: they are not JSON objects.
    """
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]]
    if not all(isinstance(line, dict) for line in lines):
        raise ValueError(f"{path} does not hold metrics: expected a JSON object on every line")
    return lines


def drop_after(path: Path, *, step: int) -> None:
    """Remove lines of steps after `step` from `path`, in one step; those of a resumed run come again."""
    if not path.exists():
        return
    kept = [json.dumps(line, ensure_ascii=False) + "\n" for line in read_lines(path) if line["step"] <= step]
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)
