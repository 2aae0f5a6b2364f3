"""How much the loss really rises when rows are coded: the same text with both rows, window by window.

Dimension key: B windows, T tokens, U tokens, P slices of a row, L layers, D model width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from flexmemory.model.memory import MemoryRows
from flexmemory.model.transformer import Transformer
from flexmemory.tol.fit import CHUNK_TOKENS, RowSource
from flexmemory.tol.scheme import Scheme

TABLE_BYTES = 2**30
"""Of decoded rows that exist at once, where a text's tokens can be divided so."""
HEAD_CHUNK = 1024
"""Positions whose logits exist at once."""

DecodedRows = Callable[[Int64[Tensor, " U"]], Float[Tensor, "U P D"]]
"""Tokens' rows as a store would give them."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rise:
    """The mean rise over a text, in nats a token."""

    loss: float
    """With the model's own rows."""
    rise: float
    """How much it is more with the others."""
    stderr: float
    """Standard error of `rise`: both losses are of the same windows, which are taken as independent."""
    tokens: int
    """Predicted tokens."""

    @property
    def percent(self) -> float:
        """Rise of the perplexity in per cent."""
        return 100 * math.expm1(self.rise)

    @property
    def percent_stderr(self) -> float:
        """Its standard error, to first order."""
        return 100 * math.exp(self.rise) * self.stderr


class HeldRows:
    """Rows of some tokens as bytes in memory, encoded once; called, it decodes them (`DecodedRows`, on the CPU)."""

    @torch.inference_mode()
    def __init__(
        self, scheme: Scheme, source: RowSource, token_ids: Int64[Tensor, " U"], *, device: torch.device | str = "cpu"
    ) -> None:
        """Encode the rows of `token_ids` on `device` by a scheme whose tensors are those of a store."""
        self._scheme, self._device = scheme.moved(device), device
        place = torch.empty(scheme.vocab_size, dtype=torch.int64)
        order = torch.arange(scheme.vocab_size) if scheme.order is None else scheme.order
        place[order] = torch.arange(scheme.vocab_size)
        ends = torch.tensor([band.tokens for band in scheme.bands]).cumsum(0)
        self._band = torch.bucketize(place, ends, right=True)
        self._slot = torch.full((scheme.vocab_size,), -1)
        slices = ([0] if scheme.embedding else []) + [1 + layer for layer in scheme.layers]
        self._data: dict[int, Tensor] = {}
        with tqdm(total=len(token_ids), desc="encoding rows", unit="token", leave=False, disable=None) as bar:
            for band in self._band[token_ids].unique().tolist():
                ids, parts = token_ids[self._band[token_ids] == band], []
                for part in ids.split(CHUNK_TOKENS):
                    exact = source(part)[:, slices].to(device, torch.float32)
                    parts.append(self._scheme.encode(exact, band).cpu())
                    bar.update(len(part))
                self._data[band], self._slot[ids] = torch.cat(parts), torch.arange(len(ids))

    @torch.inference_mode()
    def __call__(self, token_ids: Int64[Tensor, " U"]) -> Float[Tensor, "U P D"]:
        """Rows of some of the tokens."""
        bands, slots = self._band[token_ids], self._slot[token_ids]
        assert bool((slots >= 0).all())
        rows = torch.empty(len(token_ids), self._scheme.num_slices, self._scheme.hidden_size)
        for band in bands.unique().tolist():
            for chosen in (bands == band).nonzero()[:, 0].split(CHUNK_TOKENS):
                data = self._data[band][slots[chosen]].to(self._device)
                rows[chosen] = self._scheme.decode(data, band).to(rows)
        return rows


def coded_rows(
    scheme: Scheme, source: RowSource, token_ids: Int64[Tensor, " U"], *, device: torch.device | str = "cpu"
) -> Float[Tensor, "U P D"]:
    """Rows of distinct tokens, encoded and decoded on `device` by a scheme whose tensors are those of a store."""
    return HeldRows(scheme, source, token_ids, device=device)(token_ids)


@torch.inference_mode()
def measure_rise(
    model: Transformer,
    windows: Int64[Tensor, "B T"],
    rows_of: DecodedRows,
    *,
    layers: Sequence[int],
    embedding: bool = False,
    batch_size: int = 8,
) -> Rise:
    """Compare the loss of `model` with rows given by `rows_of` to that with its own.

    Args:
        model: The model, with all of its weights.
        windows: Token ids, each window with one more token than is read.
        rows_of: Rows of tokens: the embedding if `embedding`, then `layers`; others are dropped.
        layers: The model's layers in those rows.
        embedding: Whether they begin with the input embedding.
        batch_size: Windows in one pass.
    """
    return compare_rises(model, windows, {"": rows_of}, layers=layers, embedding=embedding, batch_size=batch_size)[""]


@torch.inference_mode()
def compare_rises(
    model: Transformer,
    windows: Int64[Tensor, "B T"],
    candidates: dict[str, DecodedRows],
    *,
    layers: Sequence[int],
    embedding: bool = False,
    batch_size: int = 8,
) -> dict[str, Rise]:
    """As `measure_rise`, for several candidates of the same layers on the same windows."""
    own: list[Tensor] = []
    other: dict[str, list[Tensor]] = {name: [] for name in candidates}
    config = model.config
    with tqdm(total=windows[:, 1:].numel(), desc="loss", unit="token", leave=False, disable=None) as bar:
        for group in _groups(windows, row_bytes=4 * (embedding + config.num_layers) * config.hidden_size):
            unique, index = torch.unique(group[:, :-1], return_inverse=True)
            exact = torch.cat([model.compute_rows(ids.to(model.device)) for ids in unique.split(CHUNK_TOKENS)])
            tables = {name: rows_of(unique).to(exact) for name, rows_of in candidates.items()}
            for ids, places in zip(group.split(batch_size), index.split(batch_size), strict=True):
                ids, places = ids.to(model.device), places.to(model.device)
                own.append(_losses(model, ids, MemoryRows(exact, places)))
                for name, table in tables.items():
                    rows = MemoryRows(table, places, layers=layers, embedding=embedding)
                    other[name].append(_losses(model, ids, rows))
                bar.update(places.numel())
    before = torch.cat(own)
    return {name: _rise(before, torch.cat(after), windows[:, 1:].numel()) for name, after in other.items()}


def _rise(before: Float[Tensor, " B"], after: Float[Tensor, " B"], tokens: int) -> Rise:
    difference = after - before
    spread = float(difference.std()) / math.sqrt(len(difference)) if len(difference) > 1 else math.nan
    return Rise(loss=float(before.mean()), rise=float(difference.mean()), stderr=spread, tokens=tokens)


def _groups(windows: Int64[Tensor, "B T"], *, row_bytes: int) -> list[Int64[Tensor, "B T"]]:
    """Windows in groups whose distinct tokens have rows within `TABLE_BYTES`, or single windows."""
    if len(windows) == 1 or len(windows.unique()) * row_bytes <= TABLE_BYTES:
        return [windows]
    half = len(windows) // 2
    return [*_groups(windows[:half], row_bytes=row_bytes), *_groups(windows[half:], row_bytes=row_bytes)]


def _losses(model: Transformer, ids: Int64[Tensor, "B T"], rows: MemoryRows) -> Float[Tensor, " B"]:
    """Mean loss of each window."""
    hidden = model.hidden_states(ids[:, :-1], rows).flatten(0, 1)
    targets = ids[:, 1:].flatten()
    parts = zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True)
    losses = [F.cross_entropy(model.head(part).float(), target, reduction="none") for part, target in parts]
    return torch.cat(losses).double().view(len(ids), -1).mean(1).cpu()
