"""Rows in at least fp32, as where stores are built, whatever the dtype of the weights."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flexmemory.interpret.patch import shared_copy
from flexmemory.interpret.tkv import TokenMemory
from flexmemory.model.transformer import MemoryBlock, Transformer


def precise_memory(model: Transformer, *, layer: int | None = None) -> TokenMemory:
    """The memory of `model`, or where it has fewer bits of a copy in which rows are computed in fp32.

    Args:
        model: A model with a memory, which is not changed.
        layer: The only layer whose rows will be asked for; by default all may be.

    Raises:
        ValueError: the layer does not exist, or the model has no memory.
    """
    memory = TokenMemory(model)
    layers = memory.layers if layer is None else (layer,)
    for number in layers:
        memory.cells(number)
    dtype = torch.promote_types(model.dtype, torch.float32)
    if dtype == model.dtype:
        return memory
    result = shared_copy(model)
    for number in layers:
        block = result.blocks[number]
        assert isinstance(block, MemoryBlock)
        block.memory = copy.deepcopy(model.memories[number]).to(dtype)
    assert result.embedding is not None
    result.embedding = copy.deepcopy(result.embedding).to(dtype)
    return TokenMemory(result)


def precise_rows(model: Transformer, token_ids: Int[Tensor, " U"], *, layer: int) -> Float[Tensor, "U D"]:
    """Rows of some tokens in one layer; errors as for `precise_memory`."""
    return precise_memory(model, layer=layer).rows(token_ids, layer=layer)
