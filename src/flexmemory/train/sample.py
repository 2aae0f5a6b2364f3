"""Sample text during training: the smallest loop that generates."""

from __future__ import annotations

import torch

from flexmemory.model.kv_cache import KVCache
from flexmemory.model.transformer import Transformer
from flexmemory.tokenizer import Tokenizer

TEMPERATURE = 0.8


def sample_text(model: Transformer, *, tokenizer: Tokenizer, num_tokens: int, seed: int) -> str:
    """The first `num_tokens` of a document by `model`, at temperature 0.8; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    device, dtype = model.device, model.dtype
    cache = KVCache(model.config, batch_size=1, capacity=num_tokens, device=device, dtype=dtype)
    token_ids = [tokenizer.boundary_id]
    with torch.no_grad():
        for _ in range(num_tokens):
            logits = model(torch.tensor([token_ids[-1:]], device=device), kv_cache=cache)[0, -1]  # (V,)
            chances = (logits.double().cpu() / TEMPERATURE).softmax(dim=-1)
            token_ids.append(int(torch.multinomial(chances, 1, generator=generator)))
            if token_ids[-1] == tokenizer.boundary_id:
                break
    return tokenizer.decode(token_ids)
