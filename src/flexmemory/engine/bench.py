"""Measuring: decode steps, prompts and rows, beside the bytes that they must move and the rate of copying them.

benchmarks/protocol.md says how each number is measured, and what is not in it.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Int, Int64
from torch import Tensor

from flexmemory.device import peak_memory
from flexmemory.engine.engine import Engine
from flexmemory.engine.placement import PREFILL_TOKENS
from flexmemory.engine.subject import Subject
from flexmemory.model.accounting import kv_cache_bytes
from flexmemory.tol.contract import RowTier
from flexmemory.tol.disk import DiskRows, cached_share, drop_cache
from flexmemory.tol.store import ToLStore

GROUP = 10
"""Steps timed at once."""
WARM_STEPS = 8
"""Steps of the full batch before those that count."""
PROMPT_WARM, PROMPT_REPEATS = 2, 5
"""Runs of a prompt before those that count, and these."""
ROW_COUNTS = (1, 8, 64, 512, 4096)
"""Rows asked for at once."""
GATHER_REPEATS = 7
COPIES = 4
"""Copies timed at once."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DecodeFigures:
    """What decoding takes."""

    batch: int
    context: int
    """Tokens in the cache of a sequence, half way through the steps that count, averaged over the batch."""
    steps: int
    captured: bool
    """Whether steps are CUDA graphs; their tokens are then the given ones, else those that the model chose."""
    ms_per_token: float
    """Of a step, which gives each sequence one token: the median of groups of steps."""
    mean_ms_per_token: float
    """Over all steps."""
    tokens_per_s: float
    """All sequences together, by the median."""
    step_bytes: int
    """`Subject.step_bytes`."""
    copy_bytes_per_s: float
    bound_ms: float
    """`step_bytes` at the copy rate."""
    bound_share: float
    """`bound_ms` in `ms_per_token`."""
    first_token_ms: float
    """From the submission of a prompt (the context, less half of the steps) to its first token, alone in the engine."""
    kv_cache_bytes: int
    """As allocated: for the longest length of every slot."""
    weight_bytes: int
    """`Subject.weight_bytes`: without the embedding."""
    table_bytes: int
    """`Subject.table_bytes`."""
    peak_bytes: int
    """Most device memory in use, prompts included; on a CPU, most that this process ever had resident."""
    peak_decode_bytes: int
    """The same, of decode steps alone."""


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of copying a large tensor on `device`: the best of several."""
    size = 2**31 if device.type == "cuda" else 2**26
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(8):
        _synchronize(device)
        started = time.perf_counter()
        for _ in range(COPIES):
            target.copy_(source)
        _synchronize(device)
        seconds.append((time.perf_counter() - started) / COPIES)
    return 2 * size / min(seconds)


def measure_decode(
    subject: Subject,
    stream: Int[Tensor, " N"],
    *,
    batch: int,
    context: int,
    steps: int,
    copy_bytes_per_s: float,
    capacity: int | None = None,
    prefill_chunk: int = PREFILL_TOKENS,
    before_steps: Callable[[], None] = lambda: None,
) -> DecodeFigures:
    """Decode `steps` tokens of each of `batch` sequences that go on side by side in the engine.

    Args:
        subject: What to measure.
        stream: Token ids; sequences take theirs from places spread over it.
        batch: Sequences.
        context: Tokens in a sequence half way through.
        steps: Tokens to decode, a multiple of `GROUP` or fewer than that.
        copy_bytes_per_s: `copy_rate`.
        capacity: Longest length of a sequence; by default what is needed.
        prefill_chunk: Tokens of a prompt computed at once.
        before_steps: Called once all sequences go on, before the steps that count.

    Raises:
        OSError: rows could not be read.
        ValueError: a size is impossible.
    """
    group = min(GROUP, steps)
    last_prompt = context - steps // 2 - WARM_STEPS
    needed = last_prompt + WARM_STEPS + steps + 4
    capacity = capacity or needed
    if steps < 1 or steps % group or batch < 1:
        raise ValueError(f"expected a batch of 1 or more and 1 to {GROUP} or a multiple of {GROUP} tokens, got {steps}")
    if last_prompt < 1:
        raise ValueError(f"a context of {context} tokens half way through {steps} is too short; expected more context")
    if capacity < needed:
        raise ValueError(f"sequences grow to {needed} tokens, but there is room for {capacity}; expected less context")
    device = subject.model.device
    _reset_peak(device)
    tokens = sequences(stream, batch=batch, length=capacity + 1, num_ids=subject.num_ids)
    engine = subject.engine(forced=tokens, max_sequences=batch, max_length=capacity, prefill_chunk=prefill_chunk)
    first_token_ms = measure_prompt(engine, tokens[0, :last_prompt].tolist())
    # A step fills one prompt and moves those before it on: they begin shorter, to be equally long in the end.
    prompts = [tokens[i, : max(1, last_prompt - (batch - 1 - i))].tolist() for i in range(batch)]
    requests = [engine.submit(prompt, max_new_tokens=capacity) for prompt in prompts]
    while not all(request.tokens or request.error for request in requests):
        engine.step()
    for _ in range(WARM_STEPS - 1):
        engine.step()
    prompt_peak = peak_memory(device)
    _reset_peak(device)
    before_steps()
    before = sum(len(request.tokens) for request in requests)
    seconds = []
    for _ in range(steps // group):
        started = time.perf_counter()
        for _ in range(group):
            engine.step()
        seconds.append((time.perf_counter() - started) / group)
    for request in requests:
        if request.error is not None:
            raise request.error
    after = sum(len(request.tokens) for request in requests)
    assert after - before == batch * steps, f"{after - before} tokens came in {steps} steps of {batch}"
    middle = (sum(map(len, prompts)) + (before + after) / 2) / batch
    step_bytes = subject.step_bytes(batch=batch, context=round(middle))
    itemsize = subject.model.dtype.itemsize
    cache = kv_cache_bytes(subject.model.config, context=capacity, bytes_per_number=itemsize)
    median = statistics.median(seconds)
    return DecodeFigures(
        batch=batch,
        context=round(middle),
        steps=steps,
        captured=subject.captured,
        ms_per_token=1e3 * median,
        mean_ms_per_token=1e3 * statistics.mean(seconds),
        tokens_per_s=batch / median,
        step_bytes=step_bytes,
        copy_bytes_per_s=copy_bytes_per_s,
        bound_ms=1e3 * step_bytes / copy_bytes_per_s,
        bound_share=step_bytes / copy_bytes_per_s / median,
        first_token_ms=first_token_ms,
        kv_cache_bytes=batch * cache,
        weight_bytes=subject.weight_bytes,
        table_bytes=subject.table_bytes,
        peak_bytes=max(prompt_peak, peak_memory(device)),
        peak_decode_bytes=peak_memory(device),
    )


def measure_prompt(engine: Engine, prompt_ids: Sequence[int]) -> float:
    """Milliseconds from the submission of a prompt to its first token: the median of several, after some to warm up.

    Raises:
        OSError: its rows could not be read.
        ValueError: the prompt is too long.
    """
    seconds = []
    for _ in range(PROMPT_WARM + PROMPT_REPEATS):
        started = time.perf_counter()
        engine.generate([prompt_ids], max_new_tokens=1)
        seconds.append(time.perf_counter() - started)
    return 1e3 * statistics.median(seconds[PROMPT_WARM:])


def sequences(stream: Int[Tensor, " N"], *, batch: int, length: int, num_ids: int) -> Int64[Tensor, "batch length"]:
    """`batch` pieces of the stream, spread over it, around its end if need be; ids from `num_ids` on become the last.

    Raises:
        ValueError: the stream is empty.
    """
    if not len(stream):
        raise ValueError("the token stream is empty; expected at least one id")
    starts = torch.arange(batch)[:, None] * len(stream) // batch
    places = (starts + torch.arange(length)) % len(stream)
    return stream.long()[places].clamp(max=num_ids - 1)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GatherFigures:
    """What gathering rows takes."""

    rows: int
    """Distinct rows asked for at once."""
    cold: bool
    us_per_row: float
    gb_per_s: float
    cached_share: float | None
    """Of the store, what the page cache held before the first gather; None unless rows are on disk."""
    direct: bool | None
    """Whether reads went around the page cache; None unless rows are on disk."""


def measure_rows(
    tier: RowTier, store: ToLStore, *, device: torch.device, counts: Sequence[int] = ROW_COUNTS, cold: bool = False
) -> list[GatherFigures]:
    """Gather distinct rows onto `device`, drawn by the store's counts where it has them, else evenly.

    Args:
        tier: Over the rows of `store`.
        store: Where they are from.
        device: Where they go.
        counts: Rows at once; those beyond the vocabulary are left out.
        cold: Take the store out of the page cache before each gather.

    Raises:
        OSError: rows cannot be read, or the page cache cannot be emptied.
        ValueError: the store's counts are damaged.
    """
    known = store.counts()
    weights = torch.ones(store.vocab_size) if known is None else known.double() + 1e-6
    disk = tier if isinstance(tier, DiskRows) else None
    figures = []
    for count in (count for count in counts if count <= store.vocab_size):
        generator = torch.Generator().manual_seed(count)
        out = torch.empty((count, tier.num_slices, tier.hidden_size), dtype=tier.dtype, device=device)
        share, seconds = None, []
        for repeat in range(GATHER_REPEATS):
            ids = torch.multinomial(weights, count, generator=generator)
            if cold:
                drop_cache(store)
            elif disk is not None:
                tier.gather(ids, out)  # into the page cache, as far as it goes there
            if disk is not None:
                disk.look_at_cache()
                share = cached_share(store) if repeat == 0 else share
            _synchronize(device)
            started = time.perf_counter()
            tier.gather(ids, out)
            _synchronize(device)
            seconds.append(time.perf_counter() - started)
        median = statistics.median(seconds)
        figures.append(
            GatherFigures(
                rows=count,
                cold=cold,
                us_per_row=1e6 * median / count,
                gb_per_s=out.nbytes / median / 1e9,
                cached_share=share,
                direct=None if disk is None else disk.direct,
            )
        )
    return figures


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
