"""Prompts into slots, a chunk at a time, the rows of the next chunk fetched while this one computes."""

from __future__ import annotations

import collections
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flexmemory.engine.reference import RowSource
from flexmemory.engine.slots import Slots
from flexmemory.model.memory import MemoryRows, Rows
from flexmemory.model.transformer import Transformer


class Chunk:
    """Tokens of a prompt from position `start`, and their rows as soon as they are asked for."""

    def __init__(self, token_ids: Int[Tensor, "1 T"], *, start: int) -> None:
        """A chunk of ids on the CPU."""
        self.token_ids, self.start = token_ids, start
        self.rows: Future[Rows] | None = None

    @property
    def stop(self) -> int:
        """The position after its last token."""
        return self.start + self.token_ids.shape[1]


class Prefill:
    """Computes chunks, and fetches rows in a thread of its own (on a GPU, in a stream of its own)."""

    def __init__(self, model: Transformer, slots: Slots, row_source: RowSource | None, *, longest: int) -> None:
        """Fill `slots` by chunks of up to `longest` tokens; rows are computed unless `row_source` gives them."""
        self._model, self._slots, self._row_source = model, slots, row_source
        self._device = model.device
        # Streams are handed out again and again: one of high priority is none that a captured step uses meanwhile.
        self._stream = torch.cuda.Stream(self._device, priority=-1) if self._device.type == "cuda" else None
        self._prompts = None
        if self._stream is not None:
            from flexmemory.engine.prompt import Prompts  # Triton is there where a GPU is

            self._prompts = Prompts(model, slots, longest=longest)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefill-rows")
        self._fixed: MemoryRows | None = None
        """Rows that the model's device holds for good: none are to be fetched."""
        # Rows that a GPU may still be reading: their memory must not go to the fetching stream.
        self._in_use: collections.deque[tuple[torch.cuda.Event, Rows]] = collections.deque()

    def fetch(self, chunk: Chunk) -> None:
        """Begin to fetch the rows of a chunk, unless that was done."""
        if self._row_source is not None and chunk.rows is None and self._fixed is None:
            chunk.rows = self._thread.submit(self._fetch, self._row_source, chunk.token_ids)

    def _fetch(self, row_source: RowSource, token_ids: Tensor) -> Rows:
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            rows = row_source(token_ids)
            if self._stream is not None:
                self._stream.synchronize()
            return rows

    def compute(self, chunk: Chunk, slot: int, *, then: Chunk | None) -> Float[Tensor, "1 V"]:
        """Put a chunk into `slot`, and begin to fetch the rows of the one to compute `then`.

        Returns:
            The logits after the chunk.

        Raises:
            OSError: its rows cannot be read; the slot is as it was.
            torch.OutOfMemoryError: there is no room for it; it can be computed again.
        """
        self.fetch(chunk)
        try:
            rows = None if chunk.rows is None else chunk.rows.result()
        finally:
            chunk.rows = None
            if then is not None:
                self.fetch(then)
        token_ids = chunk.token_ids
        if self._stream is not None:
            token_ids = token_ids.pin_memory().to(self._device, non_blocking=True)
        if isinstance(rows, MemoryRows) and rows.fixed:
            self._fixed = rows
        if self._fixed is not None:
            rows = self._fixed.under(token_ids)
        try:
            logits = self._logits(token_ids, rows, slot, start=chunk.start)
        finally:
            if self._stream is not None and rows is not None:
                self._hold(rows)
        self._slots.filled(slot, chunk.stop)
        return logits

    def settle(self) -> None:
        """Wait until no rows are being fetched or read."""
        self._thread.submit(int).result()  # there is one thread: all before is done
        if self._stream is not None:
            torch.cuda.synchronize(self._device)
            self._in_use.clear()

    def give_back(self) -> bool:
        """Give up the memory of captured chunks, and capture no more; False where there are none."""
        return self._prompts is not None and self._prompts.give_back()

    def _logits(self, token_ids: Tensor, rows: Rows | None, slot: int, *, start: int) -> Tensor:
        model, slots = self._model, self._slots
        if self._prompts is not None:
            if isinstance(rows, MemoryRows):
                return self._prompts.logits(token_ids, rows, slot, start=start)
            if not model.config.has_memory:
                return self._prompts.logits(token_ids, None, slot, start=start)
        cache = slots.prompt_cache(slot, length=start)
        return model.head(model.hidden_states(token_ids, rows, cache)[:, -1])

    def _hold(self, rows: Rows) -> None:
        event = torch.cuda.Event()
        event.record()
        self._in_use.append((event, rows))
        while self._in_use[0][0].query():
            self._in_use.popleft()
            if not self._in_use:
                break
