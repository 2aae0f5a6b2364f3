"""Suppress a concept: how much of it is left and what else suffers, by edits of the memory and by a decode-time ban.

Figures are about a lexicon, a set S of tokens, in the output of a small model; they are not those of toxicity
benchmarks. Dimension key: N prompts, T tokens, V vocabulary, S tokens of the set, R others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from flexmemory.evaluate.questions import Questions
from flexmemory.model.transformer import Transformer
from flexmemory.tokenizer import Tokenizer

SAMPLES = 25
"""Continuations of a prompt, as RealToxicityPrompts has it."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Suppressed:
    """What is left of a concept, and the price. Pairs are a mean and its standard error."""

    asked_mass: tuple[float, float]
    """Probability of S after prompts whose answer is in S."""
    step_mass: tuple[float, float]
    """Probability of S at each step of sampled continuations."""
    hit: tuple[float, float]
    """Share of prompts with a token of S in at least one of 25 continuations."""
    clean_nats: tuple[float, float]
    """Loss of held-out text where the next token is not in S."""
    neighbour_nats: tuple[float, float]
    """Loss where the next token is one of about the same frequency as those of S, but not of S."""

    @property
    def clean_perplexity(self) -> float:
        """Perplexity of the text but for S."""
        return math.exp(self.clean_nats[0])


def variants(words: Sequence[str], tokenizer: Tokenizer) -> Int64[Tensor, " S"]:
    """The single tokens of words: after a space or not, as they are and capitalised.

    Raises:
        ValueError: there are none.
    """
    texts = {text for word in words for text in (word, word.capitalize(), f" {word}", f" {word.capitalize()}")}
    encoded = [tokenizer.encode(text) for text in sorted(texts)]
    found = sorted({ids[0] for ids in encoded if len(ids) == 1})
    if not found:
        raise ValueError(f"none of {list(words)[:5]} is a token of the tokenizer")
    return torch.tensor(found)


def frequency_matched(
    token_ids: Int64[Tensor, " S"], *, counts: Int64[Tensor, " V"], allowed: Bool[Tensor, " V"]
) -> Int64[Tensor, " S"]:
    """For each token the one of the nearest count among the `allowed`, none twice and none of the set."""
    free = allowed.clone()
    free[token_ids] = False
    chosen = []
    for token in token_ids.tolist():
        distance = (counts.double().log1p() - counts[token].double().log1p()).abs().masked_fill(~free, torch.inf)
        chosen.append(int(distance.argmin()))
        free[chosen[-1]] = False
    return torch.tensor(chosen)


@torch.no_grad()
def measure(
    model: Transformer,
    *,
    concept: Int64[Tensor, " S"],
    neighbours: Int64[Tensor, " R"],
    asking: Questions,
    prompts: Questions,
    text: Int[Tensor, "W T"],
    ban: bool = False,
    steps: int = 16,
    seed: int = 0,
) -> Suppressed:
    """All figures of a model, edited or not.

    Args:
        model: The model.
        concept: S.
        neighbours: Other tokens, of about the same frequencies.
        asking: Prompts whose answer is in S.
        prompts: Beginnings to go on from.
        text: Held-out windows.
        ban: Whether tokens of S are forbidden: the trivial baseline.
        steps: Tokens of a continuation.
        seed: Of the sampling, which starts anew for each call.
    """
    device = model.device
    inside = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=device)
    inside[concept.to(device)] = True
    near = torch.zeros_like(inside)
    near[neighbours.to(device)] = True

    def allowed(log_probs: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        return log_probs.masked_fill(inside, -torch.inf).log_softmax(dim=-1) if ban else log_probs

    asked = allowed(asking.log_probs(model)).exp()[:, inside].sum(dim=1)
    masses, hits = _continue(model, prompts, inside, allowed, steps=steps, seed=seed)
    clean, nearby = [], []
    for part in text.split(16):
        logits = model(part)[:, :-1].flatten(0, 1)
        targets = part[:, 1:].flatten()
        nats = -allowed(logits.float().log_softmax(dim=-1)).gather(1, targets[:, None])[:, 0]
        clean.append(nats[~inside[targets]])
        nearby.append(nats[near[targets]])
    return Suppressed(
        asked_mass=_mean(asked),
        step_mass=_mean(masses),
        hit=_mean(hits),
        clean_nats=_mean(torch.cat(clean)),
        neighbour_nats=_mean(torch.cat(nearby)),
    )


def _continue(
    model: Transformer,
    prompts: Questions,
    inside: Bool[Tensor, " V"],
    allowed: Callable[[Tensor], Tensor],
    *,
    steps: int,
    seed: int,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Sample 25 continuations of each prompt: the mean mass of S by prompt, and whether any continuation hit it."""
    generator = torch.Generator(model.device).manual_seed(seed)
    count = len(prompts.last)
    last = prompts.last.repeat_interleave(SAMPLES)
    token_ids = torch.nn.functional.pad(prompts.token_ids, (0, steps)).repeat_interleave(SAMPLES, dim=0)
    mass, hit = (
        torch.zeros(len(last), device=model.device),
        torch.zeros(len(last), dtype=torch.bool, device=model.device),
    )
    for step in range(steps):
        probs = allowed(Questions(token_ids, last + step).log_probs(model)).exp()
        mass += probs[:, inside].sum(dim=1) / steps
        drawn = torch.multinomial(probs, 1, generator=generator)[:, 0]
        hit |= inside[drawn]
        token_ids.scatter_(1, (last + step + 1)[:, None], drawn[:, None])
    return mass.view(count, SAMPLES).mean(dim=1), hit.view(count, SAMPLES).any(dim=1).double()


def _mean(values: Tensor) -> tuple[float, float]:
    if not len(values):
        return math.nan, math.nan
    spread = float(values.double().std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.double().mean()), spread
