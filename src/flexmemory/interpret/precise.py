"""Rows in at least fp32, as where stores are built, whatever the dtype of the weights."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flexmemory.interpret.patch import shared_copy
from flexmemory.interpret.tkv import TokenMemory
from flexmemory.model.transformer import MemoryBlock, Transformer


def precise_memory(model: Transformer, *, layer: int) -> TokenMemory:
    """The memory of `model`, or where it has fewer bits of a copy in which this layer's rows are computed in fp32.

    Raises:
        ValueError: the layer does not exist, or there is no memory in it.
    """
    memory = TokenMemory(model)
    memory.cells(layer)
    dtype = torch.promote_types(model.dtype, torch.float32)
    if dtype == model.dtype:
        return memory
    result = shared_copy(model)
    block = result.blocks[layer]
    assert isinstance(block, MemoryBlock)
    assert result.embedding is not None
    block.memory = copy.deepcopy(model.memories[layer]).to(dtype)
    result.embedding = copy.deepcopy(result.embedding).to(dtype)
    return TokenMemory(result)


def precise_rows(model: Transformer, token_ids: Int[Tensor, " U"], *, layer: int) -> Float[Tensor, "U D"]:
    """Rows of some tokens in one layer; errors as for `precise_memory`."""
    return precise_memory(model, layer=layer).rows(token_ids, layer=layer)
