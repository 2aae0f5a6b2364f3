"""An answer in the making: pieces of a job become one JSON object, or server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from flexmemory.serve.errors import ApiError
from flexmemory.serve.forms import Choice, Delta, Form
from flexmemory.serve.parameters import Wanted
from flexmemory.serve.scheduler import Job, Piece, Scheduler
from flexmemory.tokenizer import Tokenizer

SLOW_READER_S = 30
"""Seconds that a client has to take the rest of a stream after the time limit of its request."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Heading:
    """What an answer says besides its choices."""

    model: str
    fingerprint: str
    """Of the model's weights."""
    prompt_tokens: int


class Answer:
    """What one request is answered with; when that ends, for any reason, so does its job."""

    def __init__(
        self, job: Job, scheduler: Scheduler, *, heading: Heading, asked: Wanted, form: Form, tokenizer: Tokenizer
    ) -> None:
        """Answer what was `asked` with what `job` gives, in the given form."""
        self._scheduler, self._job, self._asked, self._form = scheduler, job, asked, form
        self._prompt_tokens = heading.prompt_tokens
        self._choices = [Choice(tokenizer, asked.stop) for _ in range(job.count)]
        self._head = {
            "id": f"{form.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": heading.model,
            "system_fingerprint": f"flexmemory-{heading.fingerprint[:12]}",
        }

    async def _deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """What comes, by choice.

        Raises:
            ApiError: a sequence cannot be ended as asked.
        """
        async for piece in self._job.pieces():
            choice = self._choices[piece.index]
            delta = choice.take(piece)
            if choice.finish is None and piece.finish is not None:
                raise _fault(piece, self._scheduler)
            if choice.finish is not None and piece.finish is None:
                self._scheduler.cancel(self._job, piece.index)  # it would go on beyond the stop
            if not delta.empty:
                yield piece.index, delta

    def _usage(self) -> dict[str, int]:
        new = sum(choice.num_tokens for choice in self._choices)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self._prompt_tokens + new,
        }

    async def whole(self, receive: Receive) -> Response:
        """One JSON object, unless the client goes first."""
        collecting = asyncio.create_task(self._collect())
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({collecting, gone}, return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse(collecting.result()) if collecting.done() else Response(status_code=499)
        finally:
            self._scheduler.cancel(self._job)
            for task in (collecting, gone):
                task.cancel()

    async def _collect(self) -> dict[str, Any]:
        deltas: list[list[Delta]] = [[] for _ in self._choices]
        async for index, delta in self._deltas():
            deltas[index].append(delta)
        choices = [
            self._form.choice(
                index,
                Delta(
                    text="".join(delta.text for delta in parts),
                    tokens=tuple(token for delta in parts for token in delta.tokens),
                    finish=self._choices[index].finish,
                ),
                stream=False,
            )
            for index, parts in enumerate(deltas)
        ]
        return self._head | {"object": self._form.object(stream=False), "choices": choices, "usage": self._usage()}

    async def stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Server-sent events, as an ASGI application."""
        limit = self._scheduler.timeout_s + SLOW_READER_S
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        try:
            with contextlib.suppress(TimeoutError):  # the connection is closed, its answer incomplete
                async with asyncio.timeout(limit):
                    await StreamingResponse(self._events(), media_type="text/event-stream", headers=headers)(
                        scope, receive, send
                    )
        finally:
            self._scheduler.cancel(self._job)

    async def _events(self) -> AsyncIterator[str]:
        form = self._form
        head = self._head | {"object": form.object(stream=True)}
        if self._asked.include_usage:
            head["usage"] = None
        try:
            for index in range(len(self._choices)):
                if beginning := form.beginning(index):
                    yield _event(head | {"choices": [beginning]})
            async for index, delta in self._deltas():
                yield _event(head | {"choices": [form.choice(index, delta, stream=True)]})
        except ApiError as error:
            yield _event(error.body())
            return
        if self._asked.include_usage:
            yield _event(head | {"choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


async def _gone(receive: Receive) -> None:
    """Wait until the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _fault(piece: Piece, scheduler: Scheduler) -> ApiError:
    """Why a sequence ended before its time."""
    if piece.finish == "timeout":
        again = {"X-Should-Retry": "false"}  # read by OpenAI's clients: it would take as long again
        return ApiError(503, f"not done within {scheduler.timeout_s:g} s", code="timeout", headers=again)
    if piece.finish == "stopping":
        return ApiError(503, "the server is stopping; ask again later", code="stopping")
    return ApiError(500, "the server could not go on with this request; its log says why", code="engine_error")
