"""Generation, as simply as it can be said: the loop that every faster engine must equal."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from flexmemory.engine.sampling import Sampling, SamplingTensors, sample
from flexmemory.model.kv_cache import KVCache
from flexmemory.model.memory import Rows
from flexmemory.model.transformer import Transformer, check_token_ids

RowSource = Callable[[Tensor], Rows]
"""Token ids (B, T) on any device to their rows on the model's: `model.rows`, or a lookup in a ToL store."""


def generate(
    model: Transformer,
    prompt: Sequence[int],
    *,
    row_source: RowSource | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
) -> Iterator[int]:
    """The ids that continue `prompt`, up to a stop id, `max_new_tokens` or the model's longest sequence.

    Rows are computed from FFN-M unless `row_source` gives them.

    Raises:
        ValueError: the prompt is empty, holds an id out of range, or leaves no room to continue.
    """
    limit = model.config.max_seq_len
    if not 0 < len(prompt) < limit:
        raise ValueError(f"the prompt has {len(prompt)} tokens; expected 1 to {limit - 1}")
    token_ids = torch.tensor([list(prompt)])
    check_token_ids(token_ids, model.config.vocab_size)
    count = min(max_new_tokens, limit - len(prompt))
    return _decode(model, token_ids, row_source=row_source, sampling=sampling, count=count, stop_ids=stop_ids)


def _decode(
    model: Transformer,
    token_ids: Tensor,
    *,
    row_source: RowSource | None,
    sampling: Sampling,
    count: int,
    stop_ids: Collection[int],
) -> Iterator[int]:
    capacity = token_ids.shape[1] + count
    cache = KVCache(model.config, batch_size=1, capacity=capacity, device=model.device, dtype=model.dtype)
    settings = SamplingTensors.of([sampling], device=model.device)
    token_ids = token_ids.to(model.device)
    for position in range(capacity - count, capacity):
        with torch.inference_mode():
            rows = row_source(token_ids) if row_source else None
            hidden = model.hidden_states(token_ids, rows, cache)[:, -1]  # (1, D)
            positions = torch.tensor([position], device=model.device)
            token_ids = sample(model.head(hidden), settings, positions, sampling.how)[:, None]
        token = int(token_ids)
        if token in stop_ids:
            return
        yield token
