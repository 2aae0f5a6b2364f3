"""Prompts as one batch, and what a model answers: the next token after each.

Dimension key: N prompts, T tokens (padded at the end, which a causal model does not see), V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flexmemory.model.transformer import Transformer
from flexmemory.tokenizer import Tokenizer

BATCH = 512
"""Prompts in one forward pass."""


@dataclasses.dataclass(frozen=True, slots=True)
class Questions:
    """Prompts, each after the boundary token, padded with it."""

    token_ids: Int[Tensor, "N T"]
    last: Int[Tensor, " N"]
    """Position of each prompt's last token."""

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], *, boundary_id: int, device: torch.device) -> Questions:
        """Prompts given by their tokens, without the boundary.

        Raises:
            ValueError: there are none.
        """
        if not prompts:
            raise ValueError("there is no prompt to ask")
        token_ids = torch.full((len(prompts), 1 + max(map(len, prompts))), boundary_id)
        for row, prompt in zip(token_ids, prompts, strict=True):
            row[1 : len(prompt) + 1] = torch.tensor(prompt, dtype=torch.int64)
        last = torch.tensor([len(prompt) for prompt in prompts])
        return cls(token_ids.to(device), last.to(device))

    @classmethod
    def ask(cls, prompts: Sequence[str], tokenizer: Tokenizer, *, device: torch.device) -> Questions:
        """Prompts given as text."""
        return cls.of(
            [tokenizer.encode(prompt) for prompt in prompts], boundary_id=tokenizer.boundary_id, device=device
        )

    def final(self, hidden: Float[Tensor, "N T D"]) -> Float[Tensor, "N D"]:
        """What is at the last position of each prompt."""
        return hidden[torch.arange(len(hidden), device=hidden.device), self.last]

    def log_probs(self, model: Transformer, *, batch: int | None = BATCH) -> Float[Tensor, "N V"]:
        """Log-probabilities of the next token after each prompt, in fp32 at least; with gradients where enabled.

        A forward pass takes `batch` prompts, or all.
        """
        size = batch or len(self.last)
        parts = zip(self.token_ids.split(size), self.last.split(size), strict=True)
        return torch.cat([_log_probs(model, Questions(ids, last)) for ids, last in parts])


def _log_probs(model: Transformer, questions: Questions) -> Float[Tensor, "N V"]:
    logits = model.head(questions.final(model.hidden_states(questions.token_ids)))
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


def word_id(word: str, tokenizer: Tokenizer) -> int:
    """The one token of a word after a space.

    Raises:
        ValueError: it has more.
    """
    token_ids = tokenizer.encode(f" {word}")
    if len(token_ids) != 1:
        raise ValueError(f"{word!r} is {len(token_ids)} tokens, expected one: make the facts with this tokenizer")
    return token_ids[0]
