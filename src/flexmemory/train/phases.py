"""Where a step's time goes, measured without making anybody wait."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch


class _Span(NamedTuple):
    name: str
    start: torch.cuda.Event
    end: torch.cuda.Event


class Phases:
    """Sums the time of named phases: by a clock on the CPU, by events on a GPU, where work is only queued."""

    def __init__(self, device: torch.device) -> None:
        """Measure what is queued on `device`."""
        self._on_gpu = device.type == "cuda"
        self._spans: list[_Span] = []
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._paused = False

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside to `name`; phases may lie in each other."""
        if self._paused:
            yield
        elif self._on_gpu:
            span = _Span(name, torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            span.start.record()
            yield
            span.end.record()
            self._spans.append(span)
        else:
            started = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - started

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """While entered, count nothing."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call; on a GPU its work is waited for."""
        for span in self._spans:
            span.end.synchronize()
            self._seconds[span.name] += span.start.elapsed_time(span.end) / 1e3
        self._spans = []
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds
