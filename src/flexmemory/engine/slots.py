"""Slots: room for one sequence each, in which requests come and go while a batch goes on.

A decode step runs the slots [0, n). It reads each slot's next input and settings from tensors and writes keys and
values at the slot's length, so a CUDA graph can replay it. A slot in [0, n) that is not active computes garbage, which
lands at the end of its own sequence, where the next chunk of its prompt, or the next request's, is written.
Dimension key: S slots, L layers, G key and value heads, C capacity, E head width, n slots of a step.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flexmemory.config import ModelConfig
from flexmemory.engine.sampling import How, Sampling, SamplingTensors, how_to_sample, sample
from flexmemory.model.attention import rotary_table
from flexmemory.model.kv_cache import KVCache


class Slots:
    """The state of every slot, on the device, and their KV cache."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_slots: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Allocate `num_slots` slots of `capacity` tokens each."""
        shape = (config.num_layers, 2, num_slots, config.num_kv_heads, capacity, config.head_size)
        self.states = torch.empty(shape, device=device, dtype=dtype)
        """Keys and values, (L, 2, S, G, C, E)."""
        self.capacity = capacity
        self.rotary = rotary_table(
            torch.arange(capacity, device=device), head_size=config.head_size, theta=config.rope_theta, dtype=dtype
        )
        """Cosines and sines of every position, (2, C, E)."""
        self.token_ids = torch.zeros(num_slots, dtype=torch.int64, device=device)
        """The next input of each slot."""
        self.lengths = torch.zeros(num_slots, dtype=torch.int32, device=device)
        """Tokens in the cache, which is the position of the next input."""
        self.active = torch.zeros(num_slots, dtype=torch.bool, device=device)
        """Whether a decode step moves the slot on."""
        self.sampling = SamplingTensors.of([Sampling()] * num_slots, device=device)
        """The settings of each slot."""
        self.how: How = "greedy"
        """What the settings of all slots need of a decode step."""
        self.running: set[int] = set()
        """The active slots, as the host knows them."""
        self.fresh: set[int] = set()
        """Active slots whose next input no decode step chose: a decoder that must know it looks, and clears this."""
        self.scored: set[int] = set()
        """Slots whose tokens are wanted with their log-probabilities."""
        self.masked = False
        """Whether all that reads the cache leaves out what lies beyond a slot's length; else slots are cleared."""
        self._settings = [Sampling()] * num_slots

    def open(self, slot: int, sampling: Sampling, *, scored: bool = False) -> None:
        """Take a slot for a new sequence, whose log-probabilities are wanted if it is `scored`.

        Its cache is cleared, unless `masked`: where what lies beyond its length is multiplied by zero, NaN from
        whatever was there would pass.
        """
        if not self.masked:
            self.states[:, :, slot] = 0
        self._reset(slot, sampling)
        if scored:
            self.scored.add(slot)

    def close(self, slot: int) -> None:
        """Give a slot back."""
        self._reset(slot, Sampling())

    def _reset(self, slot: int, sampling: Sampling) -> None:
        self.active[slot].fill_(False)  # unlike `= False`, it waits for no GPU
        self.lengths[slot].fill_(0)
        for slots in (self.running, self.fresh, self.scored):
            slots.discard(slot)
        self._set_sampling(slot, sampling)

    def _set_sampling(self, slot: int, sampling: Sampling) -> None:
        if sampling != self._settings[slot]:
            self.sampling[slot] = sampling
        self._settings[slot] = sampling
        self.how = how_to_sample(self._settings)

    def filled(self, slot: int, length: int) -> None:
        """`length` tokens of the prompt are in the cache."""
        self.lengths[slot].fill_(length)

    def start(self, slot: int, logits: Float[Tensor, "1 V"]) -> Int[Tensor, " 1"]:
        """Choose the first new token of a filled slot, its next input; a decode step moves it on from here."""
        one = slice(slot, slot + 1)
        token = sample(logits, self.sampling[one], self.lengths[one], self._settings[slot].how)
        self.token_ids[one] = token
        self.active[slot].fill_(True)
        self.running.add(slot)
        self.fresh.add(slot)
        return token

    def stop(self, slot: int) -> None:
        """Decode no further; what was launched stays valid."""
        self.active[slot].fill_(False)
        self.running.discard(slot)
        self.fresh.discard(slot)

    def move(self, source: int, target: int, *, length: int) -> None:
        """Move a sequence of at most `length` tokens to a free slot, and give its own back."""
        self.open(target, self._settings[source], scored=source in self.scored)
        self.states[:, :, target, :, :length] = self.states[:, :, source, :, :length]
        for tensor in (self.token_ids, self.lengths, self.active):
            tensor[target] = tensor[source]
        if source in self.running:
            self.running.add(target)
            self.fresh.add(target)
        self.close(source)

    def advance(self, logits: Float[Tensor, "n V"], how: How) -> Int[Tensor, " n"]:
        """End a decode step over the slots [0, n): choose tokens, which are the next inputs. `how`: see `self.how`."""
        n = len(logits)
        lengths = self.lengths[:n]
        tokens = sample(logits, self.sampling[:n], lengths + 1, how)
        self.token_ids[:n] = tokens
        lengths += self.active[:n]
        return tokens

    def prompt_cache(self, slot: int, *, length: int) -> KVCache:
        """The cache of one slot, to append a chunk of its prompt after the first `length` tokens."""
        return KVCache.over(self.states[:, :, slot : slot + 1], length=length)

    def step_cache(self, num_slots: int, *, longest: int) -> StepCache:
        """The cache of a decode step over the slots [0, num_slots), of which the longest has `longest` tokens."""
        return StepCache(self.states[:, :, :num_slots], self.lengths[:num_slots], longest=longest)


class StepCache:
    """The cache of one decode step: writes one token a slot, at the slot's length."""

    def __init__(self, states: Float[Tensor, "L 2 n G C E"], lengths: Int[Tensor, " n"], *, longest: int) -> None:
        """Bind to the slots' states; `longest` is the largest of `lengths`, known to the host."""
        self._states = states
        self._positions = lengths.long()
        self._slots = torch.arange(len(lengths), device=lengths.device)
        self._longest = longest

    def get_seq_length(self) -> int:
        """Tokens cached so far, of the longest sequence."""
        return self._longest

    def update(
        self, key_states: Float[Tensor, "n G 1 E"], value_states: Float[Tensor, "n G 1 E"], layer_idx: int, /
    ) -> tuple[Float[Tensor, "n G S E"], Float[Tensor, "n G S E"]]:
        """Write one layer's new keys and values; return views of all of that layer's, up to the longest."""
        keys, values = self._states[layer_idx]
        keys[self._slots, :, self._positions] = key_states[:, :, 0]
        values[self._slots, :, self._positions] = value_states[:, :, 0]
        stop = self._longest + 1
        return keys[:, :, :stop], values[:, :, :stop]
