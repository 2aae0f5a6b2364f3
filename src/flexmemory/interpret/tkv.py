"""Token, key, value: what the memory of a token is made of (Sec. 2.3.1).

A token's query q = LN_L(E[t]) meets K keys (rows of W_up); cell i contributes its value (column i of W_down) times
c_i(t) = (q . W_up[i]) * SiLU(q . W_gate[i]), Eq. 2.7. As the query space is the vocabulary, every statement here is
exact: nothing is sampled.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from flexmemory.model.transformer import Transformer

VOCABULARY_CHUNK = 4096
"""Tokens whose coefficients exist at once."""


def coefficients(model: Transformer, token_ids: Int[Tensor, " U"], *, layer: int) -> Float[Tensor, "U K"]:
    """c(t) of Eq. 2.7 for each token in one layer.

    Raises:
        ValueError: the layer does not exist, or has no FFN-M (a dense model, a free table, weights not loaded).
    """
    memories = model.memories
    if not 0 <= layer < len(memories):
        raise ValueError(f"layer {layer} is out of range: the model has layers 0 to {len(memories) - 1}")
    if memories[layer].ffn is None:
        raise ValueError("a free table has no keys and values: coefficients need memory_kind ffn or ffn+table")
    return memories[layer].coefficients(model.embed(token_ids))


@torch.no_grad()
def nearest_tokens(model: Transformer, token_id: int, *, layer: int = 0, count: int = 5) -> list[tuple[int, float]]:
    """The tokens whose coefficients point most nearly the same way: (id, cosine), nearest first, itself left out.

    Raises:
        ValueError: as for `coefficients`, or the id is out of range.
    """
    vocab_size = model.config.vocab_size
    if not 0 <= token_id < vocab_size:
        raise ValueError(f"token id {token_id} is out of range: the vocabulary has {vocab_size} ids")
    device = model.device
    query = F.normalize(coefficients(model, torch.tensor([token_id], device=device), layer=layer)[0], dim=0)
    everything = torch.arange(vocab_size, device=device).split(VOCABULARY_CHUNK)
    cosines = torch.cat([F.normalize(coefficients(model, ids, layer=layer), dim=1) @ query for ids in everything])
    cosines[token_id] = -torch.inf
    best = cosines.topk(min(count, vocab_size - 1))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
