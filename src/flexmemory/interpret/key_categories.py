"""Do keys stand for categories of meaning? Each key's best, by the interpretability score of Senel et al. 2018.

"Semantic Structure and Interpretability of Word Embeddings" scores a dimension and a category of n words by the share
of them among the first m n words of the dimension, m from 1 on, and takes the best category and the better end. Their
categories (SEMCAT) are not at hand; any sets of tokens do. The best of many is above 0 by chance: compare it with the
same of permuted tokens (`pairs.permute_alike`). Dimension key: N tokens, K keys, n tokens of a category.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

CHUNK_KEYS = 256
"""Keys whose tokens are sorted at once."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class KeyScores:
    """Of each key the category that it fits best."""

    score: Float[Tensor, " K"]
    """Share of the category's tokens among the key's first tokens, in [0, 1]."""
    category: Int64[Tensor, " K"]
    """Number of it; the first of equals."""
    sign: Int64[Tensor, " K"]
    """At which end its tokens are: 1 for large coefficients, -1 for small."""


@torch.no_grad()
def end_ranks(points: Float[Tensor, "N K"]) -> Int32[Tensor, "2 N K"]:
    """The place of each token among a key's, from 0, by large coefficients and by small ones; ties as tokens come."""
    ranks = torch.empty(2, *points.shape, dtype=torch.int32, device=points.device)
    counting = torch.arange(len(points), dtype=torch.int32, device=points.device)[:, None]
    for start in range(0, points.shape[1], CHUNK_KEYS):
        part = points[:, start : start + CHUNK_KEYS]
        for end, signed in enumerate((part, -part)):
            order = signed.argsort(dim=0, descending=True, stable=True)
            ranks[end, :, start : start + CHUNK_KEYS].scatter_(0, order, counting.expand_as(order))
    return ranks


@torch.no_grad()
def category_scores(
    ranks: Int32[Tensor, "2 N K"], categories: Sequence[Int64[Tensor, " _"]], *, reach: int = 1
) -> Float[Tensor, "J 2 K"]:
    """The score of each of J categories at either end of each key, in [0, 1].

    Args:
        ranks: Of tokens at the ends of keys (`end_ranks`), which serve for many sets of categories.
        categories: Places of the tokens of each category, none twice.
        reach: m: a category of n tokens is sought among the first m n tokens of an end.

    Raises:
        ValueError: there are no categories, or one is empty.
    """
    if not categories or min(map(len, categories)) == 0:
        raise ValueError("keys are scored by categories: expected one or more, none of them empty")
    return torch.stack([(ranks[:, each] < reach * len(each)).float().mean(dim=1) for each in categories])


def key_scores(scores: Float[Tensor, "J 2 K"]) -> KeyScores:
    """The best of all categories and both ends, of each key."""
    best, place = scores.flatten(0, 1).max(dim=0)
    return KeyScores(score=best, category=place // 2, sign=1 - 2 * (place % 2))
