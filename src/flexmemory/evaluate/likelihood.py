"""Log-likelihoods of continuations after contexts: many requests in few forward passes.

What a request is, and where it is cut, is as in the HFLM of EleutherAI's lm-evaluation-harness with
`add_bos_token=True`: the boundary token first (our models see one before every document), spaces at the end of the
context moved to the continuation, both encoded as one text and then cut, tokens beyond the longest sequence left out
on the left. Dimension key: R requests, N predicted tokens, B batch, T tokens (padded at the end, which a causal model
does not see), D model width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from flexmemory.engine.reference import RowSource
from flexmemory.evaluate.perplexity import HEAD_CHUNK
from flexmemory.model.transformer import Transformer
from flexmemory.tokenizer import Tokenizer

BATCH_TOKENS = 16_384
"""Positions of one forward pass, padding included."""


class Request(NamedTuple):
    """How likely is `continuation` after `context`?"""

    context: str
    continuation: str


class Pair(NamedTuple):
    """A request in token ids."""

    context: Sequence[int]
    continuation: Sequence[int]


class Likelihoods(NamedTuple):
    """The answers, in the order of the requests."""

    log_probs: Float[np.ndarray, " R"]
    """Sums over each continuation's tokens, in nats."""
    greedy: Bool[np.ndarray, " R"]
    """Whether every token of it was the likeliest."""


class Batch(NamedTuple):
    """One forward pass."""

    token_ids: Int[Tensor, "B T"]
    positions: Int[Tensor, " N"]
    """Where, in B * T, each predicted token's predecessor is."""
    targets: Int[Tensor, " N"]


@dataclasses.dataclass(frozen=True, slots=True)
class Continuations:
    """Requests, batched once to be scored many times."""

    batches: tuple[Batch, ...]
    places: Int[np.ndarray, " N"]
    """Of each predicted token, in the order of batches, its place in the order of requests."""
    starts: Int[np.ndarray, " R"]
    """Where each request begins in that order."""

    @classmethod
    def of(cls, pairs: Sequence[Pair], *, max_len: int, batch_tokens: int = BATCH_TOKENS) -> Continuations:
        """Batch requests by length, longest first; inputs that begin a longer one are read off that one.

        Args:
            pairs: The requests.
            max_len: The model's longest sequence.
            batch_tokens: Positions of one forward pass; a sequence that is longer has one of its own.

        Raises:
            ValueError: there is no request, one lacks context or continuation, or its continuation is too long.
        """
        if not pairs:
            raise ValueError("there is no request to score")
        for number, (context, continuation) in enumerate(pairs):
            if not context or not 0 < len(continuation) <= max_len:
                raise ValueError(
                    f"request {number} has {len(context)} tokens of context and {len(continuation)} of continuation; "
                    f"expected at least 1, and 1 to {max_len}"
                )
        inputs = [tuple([*context, *continuation][-(max_len + 1) : -1]) for context, continuation in pairs]
        sizes = np.array([len(continuation) for _, continuation in pairs])
        starts = np.concatenate([[0], sizes.cumsum()[:-1]])
        batches, places = [], []
        for group in _grouped(inputs, batch_tokens):
            length = len(group[0].tokens)
            token_ids = torch.zeros(len(group), length, dtype=torch.int64)
            positions, targets = [], []
            for row, sequence in enumerate(group):
                token_ids[row, : len(sequence.tokens)] = torch.tensor(sequence.tokens)
                for request in sequence.requests:
                    end, size = row * length + len(inputs[request]), int(sizes[request])
                    positions += range(end - size, end)
                    targets += pairs[request].continuation
                    places += range(starts[request], starts[request] + size)
            batches.append(Batch(token_ids, torch.tensor(positions), torch.tensor(targets)))
        return cls(tuple(batches), np.array(places), starts)

    def to(self, device: torch.device) -> Continuations:
        """The same, with its batches on a device."""
        batches = (Batch(*(tensor.to(device) for tensor in batch)) for batch in self.batches)
        return dataclasses.replace(self, batches=tuple(batches))

    @torch.inference_mode()
    def score(self, model: Transformer, *, row_source: RowSource | None = None) -> Likelihoods:
        """Ask the model.

        Args:
            model: The model; logits are made at predicted tokens only, and are fp32 at least.
            row_source: Where rows come from; computed by default.
        """
        log_probs, greedy = [], []
        for batch in tqdm(self.batches, desc="requests", unit="batch", leave=False):
            token_ids, positions, targets = (tensor.to(model.device) for tensor in batch)
            hidden = model.hidden_states(token_ids, row_source(token_ids) if row_source else None)
            predicting = hidden.flatten(0, 1)[positions]  # (N, D)
            for chunk, target in zip(predicting.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True):
                logits = model.head(chunk)
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                log_probs.append(-F.cross_entropy(logits, target, reduction="none"))
                greedy.append(logits.argmax(dim=-1) == target)
        ordered = np.empty(len(self.places))
        ordered[self.places] = torch.cat(log_probs).cpu().numpy()
        right = np.empty(len(self.places), dtype=bool)
        right[self.places] = torch.cat(greedy).cpu().numpy()
        return Likelihoods(np.add.reduceat(ordered, self.starts), np.logical_and.reduceat(right, self.starts))


def encode_requests(requests: Sequence[Request], tokenizer: Tokenizer) -> list[Pair]:
    """Requests in token ids, the boundary token first."""
    contexts, wholes = [], []
    for context, continuation in requests:
        contexts.append(context.rstrip())
        wholes.append(context + continuation)
    distinct = list(dict.fromkeys([*contexts, *wholes]))
    ids = dict(zip(distinct, tokenizer.encode_batch(distinct), strict=True))
    return [
        Pair([tokenizer.boundary_id, *ids[context]], ids[whole][len(ids[context]) :])
        for context, whole in zip(contexts, wholes, strict=True)
    ]


class _Sequence(NamedTuple):
    tokens: tuple[int, ...]
    requests: list[int]


def _grouped(inputs: Sequence[tuple[int, ...]], batch_tokens: int) -> list[list[_Sequence]]:
    """Batches of distinct inputs, none the beginning of another, each with the requests that it answers."""
    distinct: list[_Sequence] = []
    for request in sorted(range(len(inputs)), key=inputs.__getitem__, reverse=True):
        tokens = inputs[request]
        # In this order, whatever begins with `tokens` comes just before it.
        if distinct and distinct[-1].tokens[: len(tokens)] == tokens:
            distinct[-1].requests.append(request)
        else:
            distinct.append(_Sequence(tokens, [request]))
    distinct.sort(key=lambda sequence: len(sequence.tokens), reverse=True)
    groups: list[list[_Sequence]] = []
    for sequence in distinct:
        if not groups or len(groups[-1][0].tokens) * (len(groups[-1]) + 1) > batch_tokens:
            groups.append([])
        groups[-1].append(sequence)
    return groups
