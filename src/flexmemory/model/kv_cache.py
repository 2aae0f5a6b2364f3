"""Keys and values of earlier tokens, behind the protocol of transformers' `Cache`."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from flexmemory.config import ModelConfig


@runtime_checkable
class KVCacheLike(Protocol):
    """What the model needs of a cache; transformers' `DynamicCache` is one."""

    def get_seq_length(self) -> int:
        """Tokens cached so far, of the longest sequence."""
        ...

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, /) -> tuple[Tensor, Tensor]:
        """Append one layer's new keys and values; return all of that layer's."""
        ...


class KVCache:
    """A cache of fixed capacity, allocated once.

    Shapes: (B, G, capacity, E) a layer for keys and as much for values.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch_size: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Allocate room for `capacity` tokens of each of `batch_size` sequences."""
        shape = (config.num_layers, 2, batch_size, config.num_kv_heads, capacity, config.head_size)
        self._bind(torch.empty(shape, device=device, dtype=dtype), 0)

    @classmethod
    def over(cls, states: Float[Tensor, "L 2 B G C E"], *, length: int) -> KVCache:
        """A cache in memory that another owns, with `length` tokens in it."""
        cache = cls.__new__(cls)
        cache._bind(states, length)
        return cache

    def _bind(self, states: Tensor, length: int) -> None:
        self._states = states
        self.capacity = states.shape[-2]
        self._lengths = [length] * len(states)

    def get_seq_length(self) -> int:
        """Tokens cached so far."""
        return self._lengths[0]

    def update(
        self, key_states: Float[Tensor, "B G T E"], value_states: Float[Tensor, "B G T E"], layer_idx: int, /
    ) -> tuple[Float[Tensor, "B G S E"], Float[Tensor, "B G S E"]]:
        """Append one layer's new keys and values; return views of all of that layer's.

        Raises:
            ValueError: the cache is full.
        """
        start = self._lengths[layer_idx]
        stop = start + key_states.shape[2]
        if stop > self.capacity:
            raise ValueError(f"the KV cache holds {self.capacity} tokens, got {stop}; allocate a larger capacity")
        keys, values = self._states[layer_idx]
        keys[:, :, start:stop] = key_states
        values[:, :, start:stop] = value_states
        self._lengths[layer_idx] = stop
        return keys[:, :, :stop], values[:, :, :stop]
