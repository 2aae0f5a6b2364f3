"""From logits to the next token."""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How to choose the next token. The defaults are greedy."""

    temperature: float = 0.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Keep only the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Then keep the fewest of them whose probabilities sum to at least this."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        """Reject impossible settings."""
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")


def sample(
    logits: Float[Tensor, "B V"], sampling: Sampling, generator: torch.Generator | None = None
) -> Int[Tensor, " B"]:
    """Choose one token for each row of `logits`."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = (filter_logits(logits.float(), sampling) / sampling.temperature).softmax(dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def filter_logits(logits: Float[Tensor, "B V"], sampling: Sampling) -> Float[Tensor, "B V"]:
    """Logits with those outside top-k, then top-p, at minus infinity; top-p is taken at the sampling temperature."""
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = (ordered / sampling.temperature).softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities  # mass of the more likely tokens
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= sampling.top_p)
        logits = logits.masked_fill(dropped, -torch.inf)
    return logits
