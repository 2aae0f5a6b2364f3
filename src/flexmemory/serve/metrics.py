"""Counts and times of a server, in the text form that Prometheus reads."""

from __future__ import annotations

import bisect
import collections
import time
from collections.abc import Iterator, Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")
"""What is counted by itself; others could be any number. The first two generate."""
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)
"""Upper bounds of the buckets of times."""


class Histogram:
    """How often a time was at most each bound."""

    def __init__(self, bounds: tuple[float, ...] = SECONDS) -> None:
        """An empty one."""
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str) -> Iterator[str]:
        """Its samples."""
        total = 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self._sum:.6f}"
        yield f"{name}_count {total}"


class Metrics:
    """All of a server's, from its start."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.requests: collections.Counter[tuple[str, int]] = collections.Counter()
        """By path and status."""
        self.sequences: collections.Counter[str] = collections.Counter()
        """Ended ones, by reason."""
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.times = {
            "request": ("Time of a request, from its head to the end of its answer", Histogram()),
            "first_token": ("Time until the first token of a sequence, waiting included", Histogram()),
            "token_gap": ("Time from tokens of a sequence to the next ones", Histogram()),
        }

    def render(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """The exposition, with `gauges`: values of this moment by name, each with what it is."""
        lines: list[str] = []

        def metric(name: str, kind: str, text: str, samples: Iterator[str]) -> None:
            lines.extend([f"# HELP flexmemory_{name} {text}.", f"# TYPE flexmemory_{name} {kind}", *samples])

        metric(
            "requests_total",
            "counter",
            "Requests answered",
            (
                f'flexmemory_requests_total{{path="{path}",status="{status}"}} {count}'
                for (path, status), count in sorted(self.requests.items())
            ),
        )
        metric(
            "sequences_total",
            "counter",
            "Sequences ended",
            (
                f'flexmemory_sequences_total{{reason="{reason}"}} {count}'
                for reason, count in sorted(self.sequences.items())
            ),
        )
        counts = {"prompt": self.prompt_tokens, "generated": self.generated_tokens}
        for name, count in counts.items():
            full = f"{name}_tokens_total"
            metric(full, "counter", f"Tokens: {name}", iter([f"flexmemory_{full} {count}"]))
        for name, (text, value) in gauges.items():
            metric(name, "gauge", text, iter([f"flexmemory_{name} {value:g}"]))
        for name, (text, histogram) in self.times.items():
            full = f"{name}_seconds"
            metric(full, "histogram", text, histogram.lines(f"flexmemory_{full}"))
        return "\n".join(lines) + "\n"


class Measured:
    """Counts requests and their times."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        """Stand before `app`."""
        self.app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 499  # the client went before there was an answer

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            path = scope["path"] if scope["path"] in PATHS else "other"
            self._metrics.requests[path, status] += 1
            if path in PATHS[:2]:
                self._metrics.times["request"][1].observe(time.monotonic() - began)
