"""How often each token occurs in prepared data."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from flexmemory.train.data import TokenStream

CHUNK_TOKENS = 2**24
"""Tokens counted at once: 128 MiB of them."""


def token_counts(stream: TokenStream, *, vocab_size: int) -> Int64[Tensor, " V"]:
    """Occurrences of each id below `vocab_size` in `stream`.

    Raises:
        ValueError: it holds another id.
    """
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(stream), CHUNK_TOKENS):
        found = np.bincount(stream.read(start, min(CHUNK_TOKENS, len(stream) - start)), minlength=vocab_size)
        if len(found) > vocab_size:
            raise ValueError(f"{stream.name} holds token id {len(found) - 1}, expected ids below {vocab_size}")
        counts += found
    return torch.from_numpy(counts)
