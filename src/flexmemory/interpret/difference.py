"""How the memories of two models differ: every row, layer by layer and token by token."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from flexmemory.interpret.precise import precise_memory
from flexmemory.interpret.tkv import TokenMemory
from flexmemory.tol.diff import Difference, compare

EMBEDDING = "the embedding"


@torch.no_grad()
def memory_difference(first: TokenMemory, second: TokenMemory) -> Difference:
    """Compare the embeddings and all rows of two memory or flex models, computed in at least fp32.

    The second is compared with the first: with its own edited copy, with a later checkpoint of its training, or with a
    fine-tuned one. Tokens are compared by id, so both must have the same tokenizer, which nothing here can check.

    Raises:
        ValueError: a model is dense, or their shapes differ.
    """
    for memory in (first, second):
        if not memory.exact:
            raise ValueError("a dense model has no rows to compare: its FFN reads the residual stream")
    shapes = [(memory.vocab_size, memory.hidden_size, memory.num_layers) for memory in (first, second)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the models have V, D and L of {shapes[0]} and {shapes[1]}; give two of one shape")
    models = [precise_memory(memory.model).model for memory in (first, second)]

    def rows(which: int, ids: Int64[Tensor, " U"]) -> Float[Tensor, "U P D"]:
        model = models[which]
        ids = ids.to(model.device)
        return torch.cat((model.embed(ids)[:, None], model.compute_rows(ids)), dim=1).cpu()

    return compare(
        lambda ids: rows(0, ids),
        lambda ids: rows(1, ids),
        names=(EMBEDDING, *(f"layer {layer}" for layer in first.layers)),
        vocab_size=first.vocab_size,
    )
