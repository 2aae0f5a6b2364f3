"""The engine: many requests through one model, each giving the tokens that the reference loop would give it alone.

A step puts one chunk of a waiting prompt into its slot and moves all running slots on by one token. Requests come and
go between steps; none waits for another to end. docs/engine.md describes the loop. Not thread-safe: one thread steps.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Literal, TypeVar

import numpy as np
import torch

from flexmemory.engine.decoder import CopiedTokens, Decoder, EagerDecoder, Ticket
from flexmemory.engine.prefill import Chunk, Prefill
from flexmemory.engine.reference import RowSource
from flexmemory.engine.sampling import Likelihood, Sampling
from flexmemory.engine.slots import Slots
from flexmemory.model.transformer import Transformer, check_token_ids

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""A stop id came; `max_new_tokens` or the longest sequence was reached; `cancel`; its rows could not be read."""
LEARN_TOKENS = 4096
"""Tokens after which the decoder is to look for the first time which rows are frequent; then whenever they doubled."""
_Result = TypeVar("_Result")


@dataclasses.dataclass(eq=False, kw_only=True, slots=True)
class Request:
    """A prompt to continue. Only the engine writes to it."""

    prompt_ids: tuple[int, ...]
    sampling: Sampling
    max_new_tokens: int
    """No more than there is room for."""
    stop_ids: frozenset[int]
    scored: bool
    """Whether likelihoods are wanted."""
    tokens: list[int] = dataclasses.field(default_factory=list)
    """The new tokens so far; a stop id is not among them."""
    likelihoods: list[Likelihood] = dataclasses.field(default_factory=list)
    """Those of `tokens`, if wanted."""
    finish_reason: FinishReason | None = None
    """None until the request has ended."""
    error: OSError | None = None
    """Why it ended, if the reason is "error"."""
    slot: int | None = None
    """Where it runs; None while it waits, and when it has ended."""
    chunks: collections.deque[Chunk] = dataclasses.field(default_factory=collections.deque)
    """What of its prompt is not in the slot yet."""
    launched: int = 0
    """Tokens known or being chosen."""


class Engine:
    """Continues prompts, as many at once as there are slots."""

    def __init__(
        self,
        model: Transformer,
        *,
        row_source: RowSource | None = None,
        max_sequences: int = 1,
        max_length: int | None = None,
        prefill_chunk: int = 2048,
        decoder: Callable[[Slots], Decoder] | None = None,
    ) -> None:
        """Allocate the slots.

        Args:
            model: Any of the architectures, on any device.
            row_source: Gives rows; without it they are computed from FFN-M.
            max_sequences: Slots: sequences that run at once.
            max_length: Longest sequence, prompt and new tokens together; the model's by default.
            prefill_chunk: Tokens of a prompt that one step computes, at most.
            decoder: Makes the decoder of the slots; `EagerDecoder` by default.

        Raises:
            ValueError: a size is impossible, or the model cannot compute rows and no source is given.
        """
        limit = model.config.max_seq_len
        self.max_length = limit if max_length is None else max_length
        if not 1 < self.max_length <= limit:
            raise ValueError(f"max_length must be 2 to {limit} (the model's longest), got {max_length}")
        for name, value in (("max_sequences", max_sequences), ("prefill_chunk", prefill_chunk)):
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if model.config.has_memory and row_source is None:
            _ = model.memories  # raises where its weights were not loaded
        self.slots = Slots(
            model.config,
            num_slots=max_sequences,
            capacity=self.max_length,
            device=model.device,
            dtype=model.dtype,
        )
        self._model = model
        self._prefill_chunk = prefill_chunk
        self._prefill = Prefill(model, self.slots, row_source, longest=prefill_chunk)
        self._decoder = EagerDecoder(model, self.slots, row_source) if decoder is None else decoder(self.slots)
        self._queue: collections.deque[Request] = collections.deque()
        self._filling: collections.deque[Request] = collections.deque()
        self._running: dict[int, Request] = {}
        """Requests to decode, by slot."""
        self._free = set(range(max_sequences))
        self._in_flight: collections.deque[tuple[Ticket, dict[int, Request]]] = collections.deque()
        self._tokens, self._learn_at = 0, LEARN_TOKENS

    def submit(
        self,
        prompt_ids: Sequence[int],
        *,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        max_new_tokens: int,
        stop_ids: Collection[int] = (),
        scored: bool = False,
    ) -> Request:
        """Queue a prompt; `step`, `stream` and `generate` work on all that were submitted.

        The request's `likelihoods` are filled if it is `scored`.

        Raises:
            ValueError: the prompt is empty, holds an id out of range, or leaves no room to continue.
        """
        if not 0 < len(prompt_ids) < self.max_length:
            raise ValueError(f"the prompt has {len(prompt_ids)} tokens; expected 1 to {self.max_length - 1}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be positive, got {max_new_tokens}")
        token_ids = torch.from_numpy(np.array(prompt_ids, dtype=np.int64))[None]  # much faster than of a list
        check_token_ids(token_ids, self._model.config.vocab_size)
        pieces = token_ids.split(self._prefill_chunk, dim=1)
        request = Request(
            prompt_ids=tuple(prompt_ids),
            sampling=sampling,
            max_new_tokens=min(max_new_tokens, self.max_length - len(prompt_ids)),
            stop_ids=frozenset(stop_ids),
            scored=scored,
            chunks=collections.deque(Chunk(ids, start=i * self._prefill_chunk) for i, ids in enumerate(pieces)),
        )
        self._queue.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request where it is; does nothing to one that has ended."""
        if request.finish_reason is None:
            self._end(request, "cancelled")

    def stream(self, request: Request) -> Iterator[int]:
        """The tokens of a request as they come, stepping the engine for all.

        Raises:
            OSError: its rows could not be read.
        """
        sent = 0
        while sent < len(request.tokens) or request.finish_reason is None:
            if sent == len(request.tokens):
                self.step()
            else:
                yield request.tokens[sent]
                sent += 1
        if request.error is not None:
            raise request.error

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        max_new_tokens: int,
        stop_ids: Collection[int] = (),
    ) -> list[list[int]]:
        """The ids that continue each prompt, up to a stop id, `max_new_tokens` or the longest sequence.

        Raises:
            OSError: the rows of one of them could not be read; the others have been completed.
            ValueError: as for `submit`; none of the prompts was begun.
        """
        requests: list[Request] = []
        try:
            for prompt in prompts:
                requests.append(
                    self.submit(prompt, sampling=sampling, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
                )
        except ValueError:
            for request in requests:
                self.cancel(request)
            raise
        while any(request.finish_reason is None for request in requests):
            self.step()
        for request in requests:
            if request.error is not None:
                raise request.error
        return [request.tokens for request in requests]

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._queue or self._filling or self._running or self._in_flight)

    @torch.inference_mode()
    def step(self) -> None:
        """One unit of work: a chunk of a prompt, and one token for every running request.

        Raises:
            torch.OutOfMemoryError: the device is out of memory, and none is left to give up.
        """
        while self._queue and self._free:
            self._admit(self._queue.popleft())
        worked = bool(self._filling or self._running)
        if self._filling:
            self._fill(self._filling[0])
        if self._running:
            self._decode()
        self._collect(self._decoder.ahead if worked else 0)
        if self._tokens >= self._learn_at:
            self._learn_at = 2 * self._tokens
            self._prefill.settle()
            self._decoder.relearn()

    def _in_memory(self, work: Callable[[], _Result]) -> _Result:
        """The result of `work`; out of memory, some is given up, and it is begun again."""
        while True:
            try:
                return work()
            except torch.OutOfMemoryError as error:
                reason = str(error)
            self._prefill.settle()  # out here, as the error kept what `work` had allocated
            freed = self._prefill.give_back()
            if not self._decoder.shrink() and not freed:
                raise torch.OutOfMemoryError(reason)

    def _admit(self, request: Request) -> None:
        request.slot = min(self._free)
        self._free.remove(request.slot)
        if not self._filling:
            self._prefill.fetch(request.chunks[0])
        self.slots.open(request.slot, request.sampling, scored=request.scored)
        self._filling.append(request)

    def _fill(self, request: Request) -> None:
        """Compute the next chunk of a prompt; after the last, choose the first token."""
        assert request.slot is not None
        chunk, later = request.chunks.popleft(), self._filling[1] if len(self._filling) > 1 else None
        following = request.chunks or (later.chunks if later else None)
        try:
            first = self._in_memory(partial(self._compute, chunk, request, then=following[0] if following else None))
        except OSError as error:
            self._end(request, "error", error)
            return
        except torch.OutOfMemoryError:
            request.chunks.appendleft(chunk)
            raise
        self._tokens += chunk.token_ids.shape[1]
        if first is None:
            return
        self._filling.popleft()
        self._running[request.slot] = request
        self._launched(first, {0: request})

    def _compute(self, chunk: Chunk, request: Request, *, then: Chunk | None) -> Ticket | None:
        """Compute a chunk of a prompt; after the last, the first token. Done again, it does the same."""
        assert request.slot is not None
        logits = self._prefill.compute(chunk, request.slot, then=then)
        if request.chunks:
            return None
        token = self.slots.start(request.slot, logits)
        return CopiedTokens(token, logits=logits if request.scored else None)

    def _decode(self) -> None:
        self._compact()
        ticket = self._in_memory(partial(self._decoder.launch, max(self._running) + 1))
        self._launched(ticket, dict(self._running))

    def _launched(self, ticket: Ticket, requests: dict[int, Request]) -> None:
        self._in_flight.append((ticket, requests))
        self._tokens += len(requests)
        for request in requests.values():
            request.launched += 1
            if request.launched == request.max_new_tokens:
                assert request.slot is not None
                self.slots.stop(request.slot)
                del self._running[request.slot]

    def _compact(self) -> None:
        """Keep the slots of a step few: move the last ones down once half of them would be idle."""
        while (last := max(self._running)) + 1 >= 2 * len(self._running) and self._free and min(self._free) < last:
            request, target = self._running.pop(last), min(self._free)
            self.slots.move(last, target, length=len(request.prompt_ids) + request.launched)
            self._free.symmetric_difference_update((last, target))
            request.slot = target
            self._running[target] = request

    def _collect(self, ahead: int) -> None:
        """Take the tokens of all steps but the last `ahead`."""
        while len(self._in_flight) > ahead:
            ticket, requests = self._in_flight.popleft()
            tokens, likelihoods = ticket.tokens(), ticket.likelihoods()
            for place, request in requests.items():
                if request.finish_reason is not None:
                    continue  # ended while the step was in flight
                token = tokens[place]
                if isinstance(token, OSError):
                    self._end(request, "error", token)
                    continue
                if token in request.stop_ids:
                    self._end(request, "stop")
                    continue
                request.tokens.append(token)
                if request.scored:
                    assert likelihoods is not None
                    request.likelihoods.append(likelihoods[place])
                if len(request.tokens) == request.max_new_tokens:
                    self._end(request, "length")

    def _end(self, request: Request, reason: FinishReason, error: OSError | None = None) -> None:
        request.finish_reason, request.error = reason, error
        if request.slot is None:
            self._queue.remove(request)
            return
        if request in self._filling:
            self._filling.remove(request)
        self._running.pop(request.slot, None)
        self.slots.close(request.slot)
        self._free.add(request.slot)
        request.slot = None
