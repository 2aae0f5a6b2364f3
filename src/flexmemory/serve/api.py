"""An OpenAI-compatible server on the project's engine.

    GET  /v1/models  /v1/models/ID       the one model
    POST /v1/completions                 texts, or token ids, continued
    POST /v1/chat/completions            messages, by the chat template of the tokenizer
    GET  /health                         200 while it serves, 503 when it stops or has failed
    GET  /metrics                        for Prometheus

docs/serving.md says what of the parameters is supported; everything else is refused. Requests pass guard.py, then
parameters.py, then the scheduler, whose pieces become text in answers.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import hmac
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from flexmemory.serve.answer import Answer, Heading
from flexmemory.serve.chat import ChatTemplate
from flexmemory.serve.errors import ApiError
from flexmemory.serve.forms import ChatForm, CompletionForm, Form, TokenNames
from flexmemory.serve.guard import Guard
from flexmemory.serve.metrics import Measured, Metrics
from flexmemory.serve.parameters import Parameters, Wanted, chat_messages, completion_prompts, wanted
from flexmemory.serve.scheduler import Job, Order, Piece, Scheduler
from flexmemory.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """A model, as it is offered."""

    name: str
    fingerprint: str
    """Of its weights."""
    tokenizer: Tokenizer
    vocab_size: int
    """Ids that it takes."""
    template: ChatTemplate | None
    created: int
    """Unix time."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return frozenset([self.tokenizer.boundary_id]) | (self.template.stop_ids if self.template else frozenset())


def create_app(
    served: Served,
    scheduler: Scheduler,
    *,
    hosts: Iterable[str] | None,
    api_key: str | None = None,
    max_body_bytes: int = 1 << 20,
    on_start: Callable[[], None] = lambda: None,
) -> Starlette:
    """The application, whose life is that of the scheduler.

    Args:
        served: The model.
        scheduler: Of its engine; not started.
        hosts: Names under which it is reached; None for any.
        api_key: What clients have to know.
        max_body_bytes: Longest body of a request.
        on_start: Called in the event loop once it serves.
    """
    service = _Service(served, scheduler)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        scheduler.on_piece = service.count
        scheduler.start()
        on_start()
        yield
        scheduler.stop(within_s=0.0)
        await scheduler.join()

    return Starlette(
        routes=[
            Route("/v1/models", service.models),
            Route("/v1/models/{name:path}", service.model),
            Route("/v1/completions", service.completions, methods=["POST"]),
            Route("/v1/chat/completions", service.chat_completions, methods=["POST"]),
            Route("/health", service.health),
            Route("/metrics", service.exposition),
        ],
        middleware=[
            Middleware(Measured, metrics=service.metrics),
            Middleware(_KeyCheck, key=api_key),
            Middleware(Guard, hosts=hosts, max_body_bytes=max_body_bytes, refuse=_refused),
        ],
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            Exception: lambda request, error: ApiError(500, "the server failed; its log says why").response(),
        },
        lifespan=lifespan,
    )


def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _refused(error.status_code, f"{request.method} {request.url.path[:100]}: {error.detail}")


def _refused(status: int, reason: str) -> Response:
    return ApiError(status, reason).response()


class _KeyCheck:
    """Lets pass who knows the key, and questions about health."""

    def __init__(self, app: ASGIApp, *, key: str | None) -> None:
        self.app = app
        self._expected = None if key is None else _digest(f"Bearer {key}".encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._expected is not None and scope["path"] != "/health":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(_digest(given), self._expected):  # digests: nothing depends on the key's length
                error = ApiError(
                    401,
                    "the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
                    code="invalid_api_key",
                )
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _digest(value: bytes) -> bytes:
    return hashlib.sha256(value).digest()


class _Service:
    """The handlers."""

    def __init__(self, served: Served, scheduler: Scheduler) -> None:
        self._served, self._scheduler = served, scheduler
        self.metrics = Metrics()
        self._names = TokenNames(served.tokenizer)
        self._last: dict[tuple[Job, int], float] = {}
        """When each running sequence got its last token."""

    def count(self, job: Job, piece: Piece) -> None:
        """Keep the books of a piece."""
        key, times = (job, piece.index), self.metrics.times
        if piece.tokens:
            self.metrics.generated_tokens += len(piece.tokens)
            last = self._last.get(key)
            if last is None:
                times["first_token"][1].observe(piece.at - job.arrived)
            else:
                times["token_gap"][1].observe(piece.at - last)
            self._last[key] = piece.at
        if piece.finish is not None:
            self.metrics.sequences[piece.finish] += 1
            self._last.pop(key, None)

    async def health(self, request: Request) -> Response:
        """Whether it serves."""
        scheduler = self._scheduler
        status = "failed" if scheduler.failed else "stopping" if scheduler.stopping else "ok"
        return JSONResponse({"status": status}, status_code=200 if status == "ok" else 503)

    async def exposition(self, request: Request) -> Response:
        """Metrics."""
        running = min(self._scheduler.running, self._scheduler.live)
        gauges = {
            "running_sequences": ("Sequences in slots", float(running)),
            "waiting_sequences": ("Sequences that wait for a slot", float(self._scheduler.live - running)),
        }
        return PlainTextResponse(self.metrics.render(gauges), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        """The list of one."""
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        """That one."""
        self._check_name(request.path_params["name"])
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        served = self._served
        return {"id": served.name, "object": "model", "created": served.created, "owned_by": "flexmemory"}

    def _check_name(self, name: str) -> None:
        if name != self._served.name:
            raise ApiError(
                404,
                f"there is no model {name[:100]!r} here; it is {self._served.name!r}",
                param="model",
                code="model_not_found",
            )

    async def completions(self, request: Request) -> Any:
        """Continue prompts."""
        parameters = Parameters(await request.body())
        prompts = completion_prompts(parameters)
        asked = wanted(parameters, chat=False)
        self._check_name(asked.model)
        ids = await run_in_threadpool(lambda: [self._encode(prompt) for prompt in prompts])
        form = CompletionForm(self._names, alternatives=asked.alternatives, scored=asked.scored)
        return await self._answer(request, asked, ids, form)

    async def chat_completions(self, request: Request) -> Any:
        """Write the assistant's next message."""
        parameters = Parameters(await request.body())
        messages = chat_messages(parameters)
        asked = wanted(parameters, chat=True)
        self._check_name(asked.model)
        if self._served.template is None:
            raise ApiError(
                400,
                f"the model {self._served.name!r} has no chat template; ask /v1/completions",
                param="model",
                code="no_chat_template",
            )
        ids = await run_in_threadpool(self._served.template.encode, messages)
        form = ChatForm(self._names, alternatives=asked.alternatives, scored=asked.scored)
        return await self._answer(request, asked, [ids], form)

    def _encode(self, prompt: str | list[int]) -> list[int]:
        """Ids of a prompt: a text is the beginning of a document; ids are taken as they are."""
        served = self._served
        if isinstance(prompt, str):
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise ApiError(400, f"the prompt is no text: {error.reason}", param="prompt") from error
            return [served.tokenizer.boundary_id, *served.tokenizer.encode(prompt)]
        if not all(0 <= token < served.vocab_size for token in prompt):
            raise ApiError(400, f"token ids should be from 0 to {served.vocab_size - 1}", param="prompt")
        return prompt

    def _orders(self, asked: Wanted, prompts: list[list[int]]) -> list[Order]:
        """The sequences of a request: the choices of each prompt, one prompt after the other."""
        limit, count = self._scheduler.max_length, len(prompts) * asked.choices
        if count > self._scheduler.slots:
            raise ApiError(
                400, f"{count} choices are more than the {self._scheduler.slots} that run at once", param="n"
            )
        orders = []
        for prompt in prompts:
            room = limit - len(prompt)
            new = asked.max_new_tokens or min(asked.default_new_tokens, room)
            if room < 1 or new > room:
                raise ApiError(
                    400,
                    f"the prompt has {len(prompt)} tokens, {asked.max_new_tokens or 1} are to follow, and the longest "
                    f"sequence is {limit}",
                    param="max_tokens",
                    code="context_length_exceeded",
                )
            orders += [
                Order(
                    prompt_ids=prompt,
                    sampling=asked.sampling_of(choice),
                    max_new_tokens=new,
                    stop_ids=self._served.stop_ids,
                    scored=asked.scored,
                )
                for choice in range(asked.choices)
            ]
        return orders

    async def _answer(self, request: Request, asked: Wanted, prompts: list[list[int]], form: Form) -> Any:
        job = self._scheduler.submit(self._orders(asked, prompts))
        prompt_tokens = sum(map(len, prompts))
        self.metrics.prompt_tokens += prompt_tokens
        heading = Heading(model=self._served.name, fingerprint=self._served.fingerprint, prompt_tokens=prompt_tokens)
        answer = Answer(job, self._scheduler, heading=heading, asked=asked, form=form, tokenizer=self._served.tokenizer)
        return answer.stream if asked.stream else await answer.whole(request.receive)
