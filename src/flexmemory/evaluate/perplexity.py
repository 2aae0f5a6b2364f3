"""Perplexity of a token stream, with its standard error, bits per byte and word-level perplexity.

The stream is cut into windows that do not overlap; each token is predicted from those before it in its window. Every
token but the first of the stream is predicted once, document boundaries included.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from flexmemory.engine.reference import RowSource
from flexmemory.model.transformer import Transformer

HEAD_CHUNK = 1024
"""Positions whose logits exist at once."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Perplexity:
    """Sums over a stream, and the figures that follow from them."""

    nats: float
    """Total negative log-likelihood."""
    num_tokens: int
    """Predicted tokens."""
    stderr: float
    """Standard error of the mean nats per token, windows taken as independent; nan for a single window."""
    num_bytes: int | None = None
    """UTF-8 bytes of the text, where known."""
    num_words: int | None = None
    """Whitespace-separated words of the text, where known."""

    @property
    def loss(self) -> float:
        """Mean nats per token."""
        return self.nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        """Exponential of the mean nats per token."""
        return math.exp(self.loss)

    @property
    def perplexity_stderr(self) -> float:
        """Standard error of the perplexity, to first order."""
        return self.perplexity * self.stderr

    @property
    def bits_per_byte(self) -> float | None:
        """Bits needed per byte of text."""
        return None if self.num_bytes is None else self.nats / math.log(2) / self.num_bytes

    @property
    def word_perplexity(self) -> float | None:
        """Exponential of the nats per word, comparable between tokenizers."""
        return None if self.num_words is None else math.exp(self.nats / self.num_words)


@torch.inference_mode()
def perplexity(
    model: Transformer,
    stream: Integer[np.ndarray, " N"],
    *,
    seq_len: int | None = None,
    batch_size: int = 8,
    row_source: RowSource | None = None,
    num_bytes: int | None = None,
    num_words: int | None = None,
) -> Perplexity:
    """Evaluate `model` on a stream of token ids.

    Args:
        model: The model.
        stream: Ids, the first of which is context only.
        seq_len: Window length; by default the model's longest.
        batch_size: Windows per forward pass.
        row_source: Where rows come from; computed by default.
        num_bytes: UTF-8 bytes of the text that the stream stands for.
        num_words: Its words.

    Raises:
        ValueError: the stream has fewer than two tokens, or `seq_len` is out of range.
    """
    length = model.config.max_seq_len if seq_len is None else seq_len
    if not 0 < length <= model.config.max_seq_len:
        raise ValueError(f"sequences of {length} tokens do not fit the model; expected 1 to {model.config.max_seq_len}")
    if len(stream) < 2:
        raise ValueError(f"perplexity needs at least 2 tokens, got {len(stream)}")
    device = model.device
    tokens = torch.from_numpy(np.asarray(stream, dtype=np.int64))
    num_full = (len(tokens) - 1) // length
    inputs = tokens[: num_full * length].view(num_full, length)
    targets = tokens[1 : num_full * length + 1].view(num_full, length)
    batches = list(zip(inputs.split(batch_size), targets.split(batch_size), strict=True)) if num_full else []
    if len(tokens) - 1 > num_full * length:
        batches.append((tokens[None, num_full * length : -1], tokens[None, num_full * length + 1 :]))
    sums, sizes = [], []
    for batch, target in tqdm(batches, desc="perplexity", unit="batch", leave=False):
        ids = batch.to(device)
        hidden = model.hidden_states(ids, row_source(ids) if row_source else None)
        nats = token_nats(model, hidden.flatten(0, 1), target.to(device).flatten())
        sums.append(nats.view(target.shape).sum(dim=1).cpu())
        sizes.append(torch.full((len(target),), target.shape[1]))
    window_nats, window_tokens = torch.cat(sums), torch.cat(sizes)
    total, count = float(window_nats.sum()), int(window_tokens.sum())
    return Perplexity(
        nats=total,
        num_tokens=count,
        stderr=_stderr(window_nats, window_tokens),
        num_bytes=num_bytes,
        num_words=num_words,
    )


def token_nats(model: Transformer, hidden: Float[Tensor, "N D"], targets: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Negative log-likelihood of each target, a chunk of logits at a time, in fp32 at least."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    chunks = zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True)
    losses = [F.cross_entropy(model.head(chunk).to(dtype), target, reduction="none") for chunk, target in chunks]
    return torch.cat(losses).double()


def _stderr(nats: Float[Tensor, " windows"], tokens: Int[Tensor, " windows"]) -> float:
    """Standard error of the ratio sum(nats) / sum(tokens) over windows."""
    windows = len(nats)
    if windows < 2:
        return math.nan
    residuals = nats - tokens * (nats.sum() / tokens.sum())
    return math.sqrt(float((residuals**2).sum()) * windows / (windows - 1)) / float(tokens.sum())
