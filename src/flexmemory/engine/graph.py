"""Decoding on a GPU: a step captured as a CUDA graph for each number of slots, launched ahead of its tokens.

The device chooses tokens, feeds them to its next step and writes them to pinned memory, where the host finds them when
it looks. So the host launches step after step and waits for none but the last but one. Dimension key: S slots, n slots
of a step.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

from flexmemory.engine.decode import Operations, residual_stream
from flexmemory.engine.decoder import HostCopy
from flexmemory.engine.feed import RowFeed
from flexmemory.engine.narrow import NarrowKernels
from flexmemory.engine.placement import format_size
from flexmemory.engine.sampling import How, Likelihood, log_probabilities, sample
from flexmemory.engine.slots import Slots
from flexmemory.engine.wide import WideKernels
from flexmemory.model.transformer import Transformer
from flexmemory.tol.hot import HotRows
from flexmemory.tol.tiers import RowTier

logger = logging.getLogger(__name__)
NARROW = 1
"""Sequences up to which `NarrowKernels` are faster than matrix products."""
RING = 8
"""Steps whose tokens are kept on the host."""
PATIENCE_S = 60
"""Seconds after which a step counts as lost."""


@triton.jit
def _finish(
    tokens_ptr, forced_ptr, capacity, token_ids_ptr, lengths_ptr, active_ptr, steps_ptr, ring_ptr,
    FORCED: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    length = tl.load(lengths_ptr + slot)
    token = tl.load(tokens_ptr + slot)
    if FORCED:
        token = tl.load(forced_ptr + slot * capacity + tl.minimum(length + 1, capacity - 1))
    step = tl.load(steps_ptr + slot)
    tl.store(ring_ptr + slot * RING + step % RING, ((step + 1) << 32) | token)
    tl.store(steps_ptr + slot, step + 1)
    if tl.load(active_ptr + slot):
        tl.store(token_ids_ptr + slot, token)
        tl.store(lengths_ptr + slot, length + 1)


class GraphDecoder:
    """A `Decoder` of captured steps."""

    ahead = 1

    def __init__(
        self,
        model: Transformer,
        slots: Slots,
        *,
        tier: RowTier | None,
        learn: int = 0,
        forced: Int[Tensor, "S C"] | None = None,
    ) -> None:
        """Decode with `model`, whose rows are looked up in `tier`; a dense model has none.

        Args:
            model: Its weights, on a GPU.
            slots: What to decode.
            tier: Where rows are.
            learn: Of the tokens that come, how many of the most frequent the hot set of `tier` is to hold; 0 leaves it
                as it is.
            forced: The token of each slot at each position, to be taken instead of the one that the model chooses.

        Raises:
            ValueError: the model has memory and no tier is given, or there is no hot set to learn.
        """
        if model.config.has_memory and tier is None:
            raise ValueError("captured decoding looks rows up: give a ToL store, or use the eager decoder")
        self._hot_rows, self._learn = tier if isinstance(tier, HotRows) else None, learn
        if learn and self._hot_rows is None:
            raise ValueError(f"there is no hot set to learn {learn} rows for: put HotRows before the tier")
        self._asked = self._hot_rows.traffic.counts.numpy() if learn and self._hot_rows is not None else None
        """How often each token came, in the memory of `Traffic.counts`."""
        self._model, self._slots, self._forced = model, slots, forced
        slots.masked = True
        device, num_slots = slots.token_ids.device, len(slots.token_ids)
        self._narrow = NarrowKernels(device, pdl=torch.cuda.get_device_capability(device) >= (9, 0))
        self._wide = WideKernels(device)
        self._steps = torch.zeros(num_slots, dtype=torch.int64, device=device)
        """Steps of each slot, active or not."""
        self._feed = None if tier is None else RowFeed(tier, slots, steps=self._steps)
        self._launched = [0] * num_slots
        """The same, as the host launched them."""
        self._sequence = [0] * num_slots
        """Which of a slot's sequences, one after the other, it holds."""
        self._errors: dict[int, OSError] = {}
        """Slots whose step in flight lacks its row."""
        self._ring = torch.zeros(num_slots, RING, dtype=torch.int64, pin_memory=True)
        self._ring_view = self._ring.numpy()
        self._in_flight: list[_Ticket] = []
        self._graphs: dict[tuple[int, How, bool], tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...] | None]] = {}
        """Steps by slots, way to choose and whether likelihoods are wanted; with where these are left."""
        self._pool = torch.cuda.graph_pool_handle()

    def launch(self, num_slots: int) -> _Ticket:
        """As `Decoder.launch`."""
        bucket = min(1 << (num_slots - 1).bit_length(), len(self._launched))
        self._deliver_fresh()
        kind = (bucket, self._slots.how, bool(self._slots.scored))
        graph, scores = self._graphs.get(kind) or self._capture(*kind)
        graph.replay()
        sequences = [self._sequence[slot] if slot in self._slots.running else None for slot in range(num_slots)]
        copied = None if scores is None else HostCopy([score[:num_slots] for score in scores])
        ticket = _Ticket(self, self._launched[:num_slots], sequences, copied)
        for slot in range(bucket):
            self._launched[slot] += 1
        self._in_flight.append(ticket)
        return ticket

    def shrink(self) -> bool:
        """As `Decoder.shrink`: half of the hot rows go."""
        rows = self._hot_rows
        if rows is None or not len(rows.hot):
            return False
        before, held = len(rows.hot), rows.hot.nbytes
        self._learn = min(self._learn, before // 2)
        with contextlib.suppress(torch.OutOfMemoryError):  # even for half of them: then none are kept
            self._change(lambda: setattr(rows, "hot", rows.hot.resized(before // 2)))
        logger.warning(
            "out of memory on %s: of %s hot rows %s are kept, which frees %s",
            rows.hot.table.device,
            f"{before:,}",
            f"{len(rows.hot):,}",
            format_size(held - rows.hot.nbytes),
        )
        return True

    def relearn(self) -> None:
        """As `Decoder.relearn`: the hot set becomes the tokens that were most frequent, where it is to be learnt."""
        rows = self._hot_rows
        if rows is None or not self._learn:
            return
        try:
            self._change(lambda: rows.relearn(self._learn))
        except torch.OutOfMemoryError:
            self._learn //= 2
            logger.warning("out of memory while hot rows were learnt: none are kept, next time %d", self._learn)
        except OSError as error:
            logger.warning("hot rows stay as they are, others cannot be read: %s", error)

    def _change(self, change: Callable[[], None]) -> None:
        """Replace the hot set, by `change`, which captured steps read: they are forgotten, and rows delivered anew."""
        assert self._feed is not None
        assert self._hot_rows is not None
        for ticket in list(self._in_flight):
            ticket.tokens()
        torch.cuda.synchronize()
        self._graphs.clear()
        self._pool = torch.cuda.graph_pool_handle()  # the old one cannot be used again
        try:
            change()
        finally:
            self._feed.use(self._hot_rows.hot)
            self._slots.fresh.update(self._slots.active.nonzero().flatten().tolist())
            torch.cuda.empty_cache()

    def _deliver_fresh(self) -> None:
        """Deliver the rows that new sequences begin with."""
        for slot in sorted(self._slots.fresh):
            self._sequence[slot] += 1
            self._errors.pop(slot, None)
            if self._feed is not None and self._feed.from_host:
                self._deliver(slot, int(self._slots.token_ids[slot]), step=self._launched[slot])
        self._slots.fresh.clear()

    def _deliver(self, slot: int, token: int, *, step: int) -> None:
        """Put the row that step number `step` of a slot needs where it looks, if it comes from the host."""
        error = None if self._feed is None else self._feed.deliver(slot, token, step=step)
        if error is not None:
            self._errors.setdefault(slot, error)

    def _choose(self, num_slots: int, how: How, *, scored: bool) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """One step up to its tokens, and what `log_probabilities` says of them."""
        model, slots, feed = self._model, self._slots, self._feed
        operations: Operations = self._narrow if num_slots <= NARROW else self._wide
        lengths = slots.lengths[:num_slots]
        x = None
        if feed is not None:
            feed.stage(num_slots)
            x = feed.embeddings(num_slots)
        if x is None:
            x = model.embed(slots.token_ids[:num_slots])
        x = residual_stream(
            model,
            operations,
            x.to(slots.states.dtype),
            row=(lambda layer: None) if feed is None else feed.row,
            rotary=slots.rotary,
            lengths=lengths,
            states=slots.states,
        )
        if how == "greedy" and not scored:
            return operations.most_likely(x, model.norm, model.head), None
        logits = operations.logits(x, model.norm, model.head)
        tokens = sample(logits, slots.sampling[:num_slots], lengths + 1, how)
        return tokens, log_probabilities(logits, tokens) if scored else None

    def _step(self, num_slots: int, how: How, state: tuple[Tensor, ...], *, scored: bool) -> tuple[Tensor, ...] | None:
        tokens, scores = self._choose(num_slots, how, scored=scored)
        forced = self._forced
        _finish[(num_slots,)](
            tokens, tokens if forced is None else forced, self._slots.capacity, *state,
            FORCED=forced is not None, RING=RING, num_warps=1,
        )  # fmt: skip
        return scores

    def _capture(
        self, num_slots: int, how: How, scored: bool
    ) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...] | None]:
        """Record a step; it is first run without a trace, so that all it needs is compiled and allocated."""
        for ticket in list(self._in_flight):
            ticket.tokens()
        slots = self._slots
        state = (slots.token_ids, slots.lengths, slots.active, self._steps, self._ring)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # What it writes to the cache, the step itself writes again.
            copies = (*[tensor.clone() for tensor in state[:-1]], self._ring.clone().pin_memory())
            self._step(num_slots, how, copies, scored=scored)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            try:
                scores = self._step(num_slots, how, state, scored=scored)
            finally:  # a capture ends with all its streams joined, also one that ran out of memory
                if self._feed is not None:
                    self._feed.arrive()
        self._graphs[num_slots, how, scored] = graph, scores
        return graph, scores

    def _take(self, ticket: _Ticket) -> list[int | OSError]:
        """Wait for a ticket's tokens, and deliver the rows that the next step of each slot needs."""
        tokens: list[int | OSError] = []
        for slot, step in enumerate(ticket.steps):
            token = self._wait(slot, step)
            same = ticket.sequences[slot] == self._sequence[slot]
            error = self._errors.get(slot) if same else None
            tokens.append(token if error is None else error)
            if same:
                if self._asked is not None:
                    self._asked[token] += 1
                self._deliver(slot, token, step=step + 1)
        self._in_flight.remove(ticket)
        return tokens

    def _wait(self, slot: int, step: int) -> int:
        """The token of a slot's step, once it is there."""
        looks, started = 0, time.monotonic()
        while True:
            entry = int(self._ring_view[slot, step % RING])
            if entry >> 32 == step + 1:
                return entry & 0xFFFFFFFF
            looks += 1
            if looks % 1000 == 0:
                torch.cuda.current_stream().query()  # raises if the device failed
                if time.monotonic() - started > PATIENCE_S:
                    raise RuntimeError(f"the GPU has not finished a decode step in {PATIENCE_S} s")


class _Ticket:
    """A launched step."""

    def __init__(
        self, decoder: GraphDecoder, steps: list[int], sequences: list[int | None], scores: HostCopy | None
    ) -> None:
        self._decoder, self.steps, self._scores = decoder, steps, scores
        self.sequences = sequences
        """The sequence of each slot; None where the slot does not run."""
        self._tokens: list[int | OSError] | None = None

    def tokens(self) -> list[int | OSError]:
        """As `Ticket.tokens`."""
        if self._tokens is None:
            self._tokens = self._decoder._take(self)
        return self._tokens

    def likelihoods(self) -> list[Likelihood] | None:
        """As `Ticket.likelihoods`."""
        return None if self._scores is None else self._scores.likelihoods()
