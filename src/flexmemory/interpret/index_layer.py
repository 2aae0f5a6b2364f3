"""What an index says of one layer: two passes over the vocabulary, then one over the layer's values.

The first pass finds each cell's moments and range. The second needs the range: bins of a histogram divide it equally,
and a cell counts as active by the layer's largest coefficient. Nothing here holds V x K numbers: chunks are sized by
bytes. Statements about tokens are about those in the mask; each token's own cells are listed in any case.
Dimension key: V vocabulary, U tokens of a chunk, K cells, k values of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flexmemory.interpret.index_format import ACTIVE_SHARE, BINS, STATS, Keep
from flexmemory.interpret.neighbors import Nearest, nearest
from flexmemory.interpret.stream import CellMoments, Histogram, Moments, Reducer, TopKeys, TopTokens, enumerate_layer
from flexmemory.interpret.tkv import TokenMemory

WORKING_BYTES = 2**31
"""What a chunk and all that is made of it may take, by default."""
BYTES_PER_COEFFICIENT = 64
"""Of a chunk, in the reducers: a few copies in fp64 at once."""
BYTES_PER_LOGIT = 16
"""Of a chunk of values on the vocabulary: fp32, masked, and what top-k makes of it."""


def chunk_size(width: int, *, bytes_each: int, working_bytes: int) -> int:
    """Rows of `width` numbers that fit, at least one."""
    return max(1, working_bytes // (width * bytes_each))


@torch.no_grad()
def layer_arrays(
    memory: TokenMemory, *, layer: int, mask: Bool[Tensor, " V"], keep: Keep, working_bytes: int = WORKING_BYTES
) -> dict[str, Tensor]:
    """The arrays of `index_format.array_specs` that have a layer axis, without it, at full precision.

    Raises:
        ValueError: a coefficient or a row is not finite, or the layer cannot be read.
    """
    chunk = chunk_size(memory.num_keys, bytes_each=BYTES_PER_COEFFICIENT, working_bytes=working_bytes)
    moments = Moments()
    kept_ids = mask.nonzero()[:, 0]
    enumerate_layer(memory, layer=layer, reducers=[moments], token_ids=kept_ids, chunk_tokens=chunk)
    found = moments.result()
    _require_finite(found.mean, layer=layer)
    largest = torch.maximum(found.maximum, -found.minimum).max()
    top_keys = TopKeys(keep.keys, value_norms=memory.value_norms(layer))
    top_tokens = TopTokens(keep.tokens)
    histogram = Histogram(low=found.minimum, high=found.maximum, bins=BINS)
    activity, norms = Activity(threshold=ACTIVE_SHARE * float(largest)), RowNorms(memory, layer=layer)
    reducers = [top_keys, norms, Kept([top_tokens, histogram, activity], mask=mask)]
    enumerate_layer(memory, layer=layer, reducers=reducers, chunk_tokens=chunk)
    lists, tokens, row_norms = top_keys.result(), top_tokens.result(), norms.result()
    _require_finite(row_norms, layer=layer)
    return {
        "token_keys_idx": lists.keys,
        "token_keys_val": lists.coefficients,
        "row_norms": row_norms,
        "key_tokens_pos_idx": tokens.positive_ids,
        "key_tokens_pos_val": tokens.positive,
        "key_tokens_neg_idx": tokens.negative_ids,
        "key_tokens_neg_val": tokens.negative,
        **value_logits(memory, layer=layer, mask=mask, count=keep.logits, working_bytes=working_bytes),
        "key_stats": _stats(found, activity, memory.value_norms(layer)),
        "key_hist": histogram.result(),
        "key_hist_edges": torch.stack((found.minimum, found.maximum), dim=1),
    }


@torch.no_grad()
def value_logits(
    memory: TokenMemory, *, layer: int, mask: Bool[Tensor, " V"], count: int, working_bytes: int = WORKING_BYTES
) -> dict[str, Tensor]:
    """The tokens in the mask that each value of a layer promotes most (`pos`) and suppresses most (`neg`)."""
    rows = chunk_size(memory.vocab_size, bytes_each=BYTES_PER_LOGIT, working_bytes=working_bytes)
    kept = mask.to(memory.model.device).nonzero()[:, 0]
    parts: dict[str, list[Tensor]] = {}
    for values in memory.values(layer).split(rows):
        logits = memory.project(values)[:, kept]  # (k, kept)
        for side in ("pos", "neg"):
            best = logits.topk(min(count, len(kept)), dim=1, largest=side == "pos")
            parts.setdefault(f"value_logits_{side}_idx", []).append(kept[best.indices])
            parts.setdefault(f"value_logits_{side}_val", []).append(best.values)
    return {name: torch.cat(part) for name, part in parts.items()}


def layer_facts(arrays: dict[str, Tensor], *, mask: Bool[Tensor, " V"]) -> dict[str, float]:
    """What `layers.json` says of a layer, from its arrays; norms of rows are those of tokens in the mask."""
    norms = arrays["row_norms"].cpu()[mask].double()
    column = dict(zip(STATS, arrays["key_stats"].cpu().unbind(1), strict=True))
    return {
        "largest": float(torch.maximum(column["max"], -column["min"]).max()),
        "row_norm_mean": float(norms.mean()),
        "row_norm_median": float(norms.median()),
        "row_norm_max": float(norms.max()),
        "active_mean": float(column["active"].mean()),
        "silent_keys": int((column["active"] == 0).sum()),
        "kurtosis_median": float(column["kurtosis"].median()),
    }


@torch.no_grad()
def nearest_arrays(
    memory: TokenMemory, *, layer: int | None, mask: Bool[Tensor, " V"], count: int, working_bytes: int = WORKING_BYTES
) -> Nearest:
    """The tokens in the mask that are nearest to every token by coefficients of a layer, or without one by embedding.

    A quarter of `working_bytes` is for the vectors of a block, a quarter for its cosines with a chunk.
    """
    width = memory.hidden_size if layer is None else memory.num_keys
    quarter = working_bytes // 4
    block = min(memory.vocab_size, chunk_size(width, bytes_each=4, working_bytes=quarter))
    chunk = min(
        chunk_size(block, bytes_each=4, working_bytes=quarter),
        chunk_size(width, bytes_each=BYTES_PER_COEFFICIENT, working_bytes=working_bytes),
    )

    def vectors(token_ids: Int[Tensor, " U"]) -> Float[Tensor, "U X"]:
        return memory.model.embed(token_ids) if layer is None else memory.coefficients(token_ids, layer=layer)

    device = memory.model.device
    return nearest(
        vectors,
        queries=torch.arange(memory.vocab_size, device=device),
        candidates=mask.nonzero()[:, 0].to(device),
        count=count,
        block_rows=block,
        chunk_rows=chunk,
    )


class Kept:
    """Gives other reducers the tokens in a mask."""

    def __init__(self, reducers: Sequence[Reducer], *, mask: Bool[Tensor, " V"]) -> None:
        self._reducers, self._mask = reducers, mask

    def update(self, token_ids: Int[Tensor, " U"], coefficients: Float[Tensor, "U K"]) -> None:
        """Pass a chunk on, unless nothing is left of it."""
        kept = self._mask.to(token_ids.device)[token_ids]
        if not kept.all():
            token_ids, coefficients = token_ids[kept], coefficients[kept]
        if len(token_ids):
            for reducer in self._reducers:
                reducer.update(token_ids, coefficients)

    def result(self) -> None:
        """Nothing: ask the reducers."""


class Activity:
    """How many tokens each cell is active on, and over how many its |c| is spread."""

    def __init__(self, *, threshold: float) -> None:
        """A cell is active where |c| is above `threshold`."""
        self._threshold, self._tokens = threshold, 0
        self._sums = torch.empty(0)

    def update(self, token_ids: Int[Tensor, " U"], coefficients: Float[Tensor, "U K"]) -> None:
        """Add a chunk."""
        size = coefficients.double().abs()
        if not self._tokens:
            self._sums = size.new_zeros(3, size.shape[1])
        self._tokens += len(token_ids)
        self._sums[0] += (size > self._threshold).sum(0)
        self._sums[1] += size.sum(0)
        self._sums[2] += torch.xlogy(size, size).sum(0)

    def result(self) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"]]:
        """The share of tokens that each cell is active on, and the entropy in nats of |c| / sum |c| over tokens.

        The entropy's exponential is the number of tokens that a cell is about; a cell that is zero everywhere has 0.
        """
        active, total, weighted = self._sums
        spread = torch.where(total > 0, total.log() - weighted / total.clamp(min=1e-300), 0)
        return active / self._tokens, spread.clamp(min=0)


class RowNorms:
    """Length of the row of each token."""

    def __init__(self, memory: TokenMemory, *, layer: int) -> None:
        self._memory, self._layer = memory, layer
        self._parts: list[Tensor] = []

    def update(self, token_ids: Int[Tensor, " U"], coefficients: Float[Tensor, "U K"]) -> None:
        """Take a chunk; rows are the model's own, a free table included."""
        self._parts.append(self._memory.rows(token_ids, layer=self._layer).norm(dim=1))

    def result(self) -> Float[Tensor, " N"]:
        """The lengths, in the order in which tokens came."""
        return torch.cat(self._parts)


def _stats(moments: CellMoments, activity: Activity, value_norms: Float[Tensor, " K"]) -> Float[Tensor, "K 8"]:
    """Columns of `index_format.STATS`."""
    active, entropy = activity.result()
    columns = (
        moments.mean, moments.variance.sqrt(), moments.minimum, moments.maximum, moments.kurtosis,
        active, entropy, value_norms.double(),
    )  # fmt: skip
    return torch.stack(columns, dim=1)


def _require_finite(numbers: Tensor, *, layer: int) -> None:
    if not numbers.isfinite().all():
        raise ValueError(
            f"coefficients or rows of layer {layer} are not finite; the checkpoint is damaged or its training "
            "diverged: index another one"
        )
