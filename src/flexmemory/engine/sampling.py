"""From logits to the next token, without waiting for the device.

A draw is a function of the request alone: of its logits, its settings, its seed and the position it fills. It does not
matter which other requests are in the batch, so a batch draws what each of its requests would draw by itself.
Dimension key: B requests, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

How = Literal["greedy", "plain", "filtered"]
"""What a batch needs: the most likely token, draws, or draws among the most likely tokens only."""


ALTERNATIVES = 20
"""Most likely tokens whose log-probabilities are given with that of a chosen one."""


@dataclasses.dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely the model held a token to be, before settings of sampling: natural logarithms."""

    logprob: float
    """Of the chosen token."""
    alternatives: tuple[tuple[int, float], ...]
    """The most likely tokens and their log-probabilities, the first `ALTERNATIVES` of them."""


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
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must not be negative nor infinite, got {self.temperature}")
        if not 0 <= self.top_k < 2**31:
            raise ValueError(f"top_k must not be negative (nor above 2**31), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must fit 64 bits with a sign, got {self.seed}")

    @property
    def how(self) -> How:
        """The least that chooses by these settings."""
        if self.temperature == 0:
            return "greedy"
        return "filtered" if self.top_k > 0 or self.top_p < 1 else "plain"


class SamplingTensors:
    """The settings of B requests, on a device."""

    def __init__(
        self,
        temperature: Float[Tensor, " B"],
        top_k: Int[Tensor, " B"],
        top_p: Float[Tensor, " B"],
        seeds: Int[Tensor, " B"],
    ) -> None:
        """Bind the tensors: fp32, int32, fp32, int64."""
        self.temperature, self.top_k, self.top_p, self.seeds = temperature, top_k, top_p, seeds

    @classmethod
    def of(cls, settings: Sequence[Sampling], *, device: torch.device | str) -> SamplingTensors:
        """Tensors of `settings`."""
        return cls(
            torch.tensor([one.temperature for one in settings], dtype=torch.float32, device=device),
            torch.tensor([one.top_k for one in settings], dtype=torch.int32, device=device),
            torch.tensor([one.top_p for one in settings], dtype=torch.float32, device=device),
            torch.tensor([one.seed for one in settings], dtype=torch.int64, device=device),
        )

    def __setitem__(self, request: int, sampling: Sampling) -> None:
        """Set one request's."""
        self.temperature[request].fill_(sampling.temperature)
        self.top_k[request].fill_(sampling.top_k)
        self.top_p[request].fill_(sampling.top_p)
        self.seeds[request].fill_(sampling.seed)

    def __getitem__(self, some: slice) -> SamplingTensors:
        """Views of some requests'."""
        return SamplingTensors(self.temperature[some], self.top_k[some], self.top_p[some], self.seeds[some])


def how_to_sample(settings: Iterable[Sampling]) -> How:
    """The least that chooses for each of a batch."""
    needed = {sampling.how for sampling in settings}
    return "filtered" if "filtered" in needed else "plain" if "plain" in needed else "greedy"


def sample(
    logits: Float[Tensor, "B V"],
    settings: SamplingTensors,
    positions: Int[Tensor, " B"],
    how: How = "filtered",
) -> Int[Tensor, " B"]:
    """Choose the token at each of `positions`; all that suffice among `how` choose the same ones.

    Nothing here waits for the device or depends on values, so that it can be captured in a CUDA graph.
    """
    if how == "greedy":
        return logits.argmax(dim=-1)
    kept = filter_logits(logits, settings) if how == "filtered" else logits
    drawn = draw(kept, settings.temperature, uniforms(settings.seeds, positions))
    return torch.where(settings.temperature > 0, drawn, logits.argmax(dim=-1))


def draw(
    logits: Float[Tensor, "B V"], temperature: Float[Tensor, " B"], uniform: Float[Tensor, " B"]
) -> Int[Tensor, " B"]:
    """The first token at which the cumulative probability exceeds `uniform`; meaningless at temperature 0.

    Sums are in fp64: what a token's probability adds is not lost, and their order (which differs between devices and
    batch sizes) hardly matters.
    """
    sums = _probabilities(logits, temperature).double().cumsum(dim=-1)  # (B, V)
    return (sums <= uniform[:, None] * sums[:, -1:]).sum(dim=-1).clamp(max=logits.shape[-1] - 1)


def log_probabilities(logits: Float[Tensor, "B V"], token_ids: Int[Tensor, " B"]) -> tuple[Tensor, Tensor, Tensor]:
    """Of chosen tokens, and of the most likely ones, whatever the settings of sampling.

    Like `sample`, it can be captured in a CUDA graph.

    Returns:
        Log-probabilities of the tokens, (B,), and of the k most likely ones, (B, k); the ids of these, (B, k).
    """
    logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
    top, top_ids = logs.topk(min(ALTERNATIVES, logs.shape[-1]), dim=-1)
    return logs.gather(1, token_ids[:, None])[:, 0], top, top_ids


def filter_logits(logits: Float[Tensor, "B V"], settings: SamplingTensors) -> Float[Tensor, "B V"]:
    """Logits with those outside top-k, then top-p, at minus infinity; top-p is taken at the sampling temperature."""
    vocab_size = logits.shape[-1]
    ordered, order = logits.sort(dim=-1, descending=True)
    top_k = torch.where(settings.top_k > 0, settings.top_k, vocab_size).clamp(max=vocab_size)
    smallest = ordered.gather(1, top_k[:, None].long() - 1)  # (B, 1)
    probabilities = _probabilities(ordered.masked_fill(ordered < smallest, -torch.inf), settings.temperature).double()
    before = probabilities.cumsum(dim=-1) - probabilities  # mass of the more likely tokens
    top_p = settings.top_p[:, None]
    dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, (before >= top_p) & (top_p < 1))
    return logits.masked_fill(dropped | (logits < smallest), -torch.inf)


def uniforms(seeds: Int[Tensor, " B"], positions: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """One number in [0, 1), in fp64, for each seed and position: the same bits on every device.

    A counter-based generator: SplitMix64's output function of a counter that starts where the same function takes the
    seed. 52 bits, so that a product with a sum is below the sum.
    """
    counters = _mix(seeds) + (positions.long() + 1) * _signed(0x9E3779B97F4A7C15)
    return _shifted(_mix(counters), 12).double() * 2.0**-52


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # >> repeats the sign; this does not


def _signed(constant: int) -> int:
    return constant - (1 << 64)  # int64 wraps around as uint64 does


def _probabilities(logits: Tensor, temperature: Tensor) -> Tensor:
    """Softmax at a temperature in at least fp32; the largest is taken off first, as a tiny temperature overflows."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    relative = logits - logits.amax(dim=-1, keepdim=True)
    return (relative / torch.where(temperature > 0, temperature, 1)[:, None]).softmax(dim=-1)
