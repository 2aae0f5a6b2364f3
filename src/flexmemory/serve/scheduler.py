"""One thread steps the engine; requests reach it from an event loop, and their tokens go back there.

What is marked as the loop's is touched by the event loop alone, all else by the thread. Sequences are served in the
order in which they came: none waits for a later one, and the engine's step gives every running one its token.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Literal

import torch

from flexmemory.engine.engine import Engine, FinishReason, Request
from flexmemory.engine.sampling import Likelihood, Sampling
from flexmemory.serve.errors import ApiError

logger = logging.getLogger(__name__)
Finish = FinishReason | Literal["timeout", "stopping"]
"""Why a sequence ended: as the engine says, it took too long, or the server stops."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """A sequence to be generated, as `Engine.submit` takes it."""

    prompt_ids: Sequence[int]
    sampling: Sampling
    max_new_tokens: int
    stop_ids: frozenset[int]
    scored: bool


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What a step gave to one sequence."""

    index: int
    """Which order of the job."""
    tokens: tuple[int, ...]
    likelihoods: tuple[Likelihood, ...]
    """Of the tokens, where they were wanted."""
    finish: Finish | None
    """Set in the last piece of a sequence."""
    at: float
    """When it was known, in seconds of the monotonic clock."""


class Job:
    """The sequences of one request. The loop's."""

    def __init__(self, count: int, *, timeout_s: float) -> None:
        """A job of `count` sequences, to be ended after `timeout_s`."""
        self.count = count
        self.arrived = time.monotonic()
        self.deadline = self.arrived + timeout_s
        self.inbox: asyncio.Queue[Piece] = asyncio.Queue()

    async def pieces(self) -> AsyncIterator[Piece]:
        """What its sequences give, as it comes, until all have ended."""
        left = self.count
        while left:
            piece = await self.inbox.get()
            left -= piece.finish is not None
            yield piece


@dataclasses.dataclass(eq=False, slots=True)
class _Sequence:
    """A sequence, as the thread knows it."""

    job: Job
    index: int
    request: Request
    sent: int = 0
    """Tokens that were handed over."""
    ended: Finish | None = None
    """Why it was cancelled."""

    def news(self) -> Piece | None:
        """What was not handed over yet."""
        request = self.request
        if self.sent == len(request.tokens) and request.finish_reason is None:
            return None
        new = slice(self.sent, len(request.tokens))
        self.sent = len(request.tokens)
        return Piece(
            index=self.index,
            tokens=tuple(request.tokens[new]),
            likelihoods=tuple(request.likelihoods[new]),
            finish=None if request.finish_reason is None else self.ended or request.finish_reason,
            at=time.monotonic(),
        )


class Scheduler:
    """Runs jobs on an engine, as many sequences at once as it has slots, and a bounded number waiting."""

    def __init__(self, engine: Engine, *, slots: int, waiting: int, timeout_s: float) -> None:
        """Serve with `engine`, which nothing else touches from now on.

        Args:
            engine: At rest.
            slots: Sequences that it runs at once.
            waiting: Sequences that may wait for a slot.
            timeout_s: Seconds that a job may take, waiting included.
        """
        self.max_length = engine.max_length
        self.slots, self.waiting, self.timeout_s = slots, waiting, timeout_s
        self._open: set[tuple[Job, int]] = set()
        """Sequences that have not ended. The loop's."""
        self.running = 0
        """Of them, those in slots after the last step."""
        self.stopping = self.failed = False
        """Whether no more jobs are taken. The loop's."""
        self.on_piece: Callable[[Job, Piece], None] = lambda job, piece: None
        """Told of every piece. The loop's."""
        self.on_failure: Callable[[], None] = lambda: None
        """Told when the thread has died. The loop's."""
        self._engine = engine
        self._live: dict[_Sequence, None] = {}
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stop_at: float | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def live(self) -> int:
        """How many sequences run or wait. The loop's."""
        return len(self._open)

    def start(self) -> None:
        """Begin, for jobs of the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(self, orders: Sequence[Order]) -> Job:
        """Queue the sequences of one request.

        Raises:
            ApiError: too many are waiting, or the server stops or has failed.
        """
        if self.stopping or self.failed:
            raise ApiError(
                503, "the server is stopping; ask again later", code="stopping", headers={"Retry-After": "5"}
            )
        if self.live + len(orders) > self.slots + self.waiting:
            raise ApiError(
                429,
                f"{self.live} sequences run or wait, and no more than {self.slots + self.waiting} may; try again later",
                code="queue_full",
                headers={"Retry-After": "1"},
            )
        job = Job(len(orders), timeout_s=self.timeout_s)
        self._open.update((job, index) for index in range(len(orders)))
        self._commands.put(partial(self._begin, job, orders))
        return job

    def cancel(self, job: Job, index: int | None = None) -> None:
        """End one sequence of a job, or all of them; nothing where they have ended."""
        self._commands.put(partial(self._cancel, job, index))

    def stop(self, *, within_s: float) -> None:
        """Take no more jobs, and end after `within_s` seconds those that have not ended."""
        self.stopping = True
        self._commands.put(partial(self._stop, time.monotonic() + within_s))

    async def join(self) -> None:
        """Wait until the thread has ended, after `stop`."""
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        device = self._engine.slots.token_ids.device
        try:
            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                while self._live or self._stop_at is None:
                    self._obey()
                    self._expire()
                    self._step()
                    self._hand_over()
        except Exception:  # whatever it was, nobody knows what state the engine is in
            logger.exception("the engine failed: the server stops")
            self._post(self._failed)

    def _obey(self) -> None:
        """Carry out what was asked for; with nothing to do, wait for it."""
        with contextlib.suppress(queue.Empty):
            self._commands.get(block=not self._live)()
            while True:
                self._commands.get_nowait()()

    def _begin(self, job: Job, orders: Sequence[Order]) -> None:
        for index, order in enumerate(orders):
            request = self._engine.submit(
                order.prompt_ids,
                sampling=order.sampling,
                max_new_tokens=order.max_new_tokens,
                stop_ids=order.stop_ids,
                scored=order.scored,
            )
            self._live[_Sequence(job, index, request)] = None

    def _cancel(self, job: Job, index: int | None) -> None:
        for sequence in self._live:
            if sequence.job is job and index in (None, sequence.index):
                self._end(sequence, "cancelled")

    def _stop(self, at: float) -> None:
        self._stop_at = at

    def _end(self, sequence: _Sequence, reason: Finish) -> None:
        sequence.ended = reason
        self._engine.cancel(sequence.request)

    def _expire(self) -> None:
        now = time.monotonic()
        stopped = self._stop_at is not None and now >= self._stop_at
        for sequence in self._live:
            if stopped or now >= sequence.job.deadline:
                self._end(sequence, "stopping" if stopped else "timeout")

    def _step(self) -> None:
        if not self._engine.busy:
            return
        try:
            self._engine.step()
        except torch.OutOfMemoryError:
            logger.exception("out of memory: all that run or wait are ended")
            for sequence in self._live:
                self._end(sequence, "error")

    def _hand_over(self) -> None:
        """Give the loop what is new."""
        news: list[tuple[Job, Piece]] = []
        for sequence in list(self._live):
            if sequence.request.error is not None:
                logger.error("rows could not be read: %s", sequence.request.error)
            piece = sequence.news()
            if piece is not None:
                news.append((sequence.job, piece))
                if piece.finish is not None:
                    del self._live[sequence]
        self.running = sum(sequence.request.slot is not None for sequence in self._live)
        if news:
            self._post(partial(self._receive, news))

    def _post(self, call: Callable[[], None]) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # a loop that was closed has nobody to tell
            self._loop.call_soon_threadsafe(call)

    def _receive(self, news: list[tuple[Job, Piece]]) -> None:
        for job, piece in news:
            if piece.finish is not None:
                self._open.discard((job, piece.index))
            self.on_piece(job, piece)
            job.inbox.put_nowait(piece)

    def _failed(self) -> None:
        self.failed, self.running = True, 0
        now = time.monotonic()
        lost = [
            (job, Piece(index=index, tokens=(), likelihoods=(), finish="error", at=now)) for job, index in self._open
        ]
        self._receive(lost)
        self.on_failure()
