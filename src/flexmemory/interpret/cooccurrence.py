"""Vectors of tokens by what stands near them in a text: no network, so a judge of clusters that no weights can sway.

Counts within a window, positive pointwise mutual information, singular vectors (Levy, Goldberg and Dagan 2015,
"Improving Distributional Similarity with Lessons Learned from Word Embeddings"). The judge knows the text that the
models were trained on, and nothing of the models. Dimension key: N tokens of the text, V ids, C contexts, M dimensions.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

CHUNK_TOKENS = 2**20
"""Pairs of one distance that exist at once."""
OVERSAMPLED = 50
"""Dimensions beyond those kept, which make the kept ones exacter."""


@torch.no_grad()
def cooccurrence_vectors(
    token_ids: Int[Tensor, " N"],
    *,
    vocab_size: int,
    boundary_id: int,
    window: int = 5,
    contexts: int = 4096,
    dimensions: int = 200,
    seed: int = 0,
) -> Float[Tensor, "V M"]:
    """A vector of each id; zero for one that the text lacks. Compare them by cosine.

    Args:
        token_ids: A text.
        vocab_size: V.
        boundary_id: Begins each document; pairs of two documents do not count.
        window: Tokens on either side that count as near, all alike.
        contexts: C: the most frequent ids alone count as what stands near, at most.
        dimensions: M, at most one fewer than C.
        seed: Of the randomised decomposition.
    """
    chosen = token_ids.long().bincount(minlength=vocab_size).argsort(descending=True, stable=True)[:contexts]
    counts = cooccurrences(
        token_ids, vocab_size=vocab_size, boundary_id=boundary_id, window=window, contexts=chosen.sort().values
    )
    weights = ppmi(counts)
    rank = min(dimensions + OVERSAMPLED, *weights.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        left, sizes, _ = torch.svd_lowrank(weights, q=rank, niter=4)
    return left[:, :dimensions] * sizes[:dimensions].sqrt()


@torch.no_grad()
def cooccurrences(
    token_ids: Int[Tensor, " N"], *, vocab_size: int, boundary_id: int, window: int, contexts: Int64[Tensor, " C"]
) -> Int[Tensor, "V C"]:
    """How often each id stands within `window` tokens of each context, before or after it, in one document; int32."""
    counts = torch.zeros(vocab_size * len(contexts), dtype=torch.int32)
    column = torch.full((vocab_size,), -1).scatter(0, contexts, torch.arange(len(contexts)))
    document = (token_ids == boundary_id).cumsum(0, dtype=torch.int32)
    for start in range(0, len(token_ids), CHUNK_TOKENS):
        for distance in range(1, window + 1):
            stop = min(start + CHUNK_TOKENS, len(token_ids) - distance)
            first = token_ids[start:stop].long()
            second = token_ids[start + distance : stop + distance].long()
            together = document[start:stop] == document[start + distance : stop + distance]
            for word, near in ((first, second), (second, first)):
                places = (word * len(contexts) + column[near])[together & (column[near] >= 0)]
                counts.index_add_(0, places, torch.ones(len(places), dtype=torch.int32))
    return counts.view(vocab_size, len(contexts))


@torch.no_grad()
def ppmi(counts: Int[Tensor, "V C"], *, smoothing: float = 0.75) -> Float[Tensor, "V C"]:
    """max(0, log of P(word, context) / (P(word) P(context))), contexts' counts to the power `smoothing`; fp32.

    The power makes rare contexts a little less surprising.
    """
    total = counts.double()
    word, context = total.sum(dim=1), total.sum(dim=0).pow(smoothing)
    expected = word[:, None] * (context / context.sum())
    total /= expected.clamp(min=torch.finfo(torch.float64).tiny)
    return total.log_().clamp_(min=0).float()
