"""What a benchmark measures: a model and its rows, loaded or random, and an engine that may be told its tokens.

Speed does not depend on the values of weights, so random ones stand for those of any model of the same shape.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from flexmemory.config import ModelConfig
from flexmemory.engine.engine import Engine
from flexmemory.engine.int8 import Int8Part, quantize
from flexmemory.engine.loading import can_capture, engine_of
from flexmemory.engine.placement import PREFILL_TOKENS
from flexmemory.model.accounting import kv_cache_bytes
from flexmemory.model.transformer import Transformer
from flexmemory.storage import atomic_folder, write_json
from flexmemory.tol.contract import RowTier
from flexmemory.tol.format import MANIFEST, shard_header
from flexmemory.tol.hot import HotRows
from flexmemory.tol.layout import layout
from flexmemory.tol.store import ToLStore
from flexmemory.tol.tiers import DeviceRows


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A model and where its rows are."""

    model: Transformer
    tier: RowTier | None = None
    """None where the model computes its rows, or has none."""

    @property
    def num_ids(self) -> int:
        """Ids below which tokens must be."""
        return self.model.config.vocab_size if self.tier is None else self.tier.vocab_size

    @property
    def captured(self) -> bool:
        """Whether decode steps are CUDA graphs; these alone can be told their tokens."""
        return can_capture(self.model, self.tier)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that every decode step reads: all but the embedding."""
        parts = (self.model.blocks, self.model.norm, self.model.head)
        return sum(tensor.nbytes for part in parts for tensor in (*part.parameters(), *part.buffers()))

    @property
    def table_bytes(self) -> int:
        """Bytes of rows on the model's device."""
        hot, below = (self.tier.hot, self.tier.tier) if isinstance(self.tier, HotRows) else (None, self.tier)
        return (hot.nbytes if hot else 0) + (below.table.nbytes if isinstance(below, DeviceRows) else 0)

    def step_bytes(self, *, batch: int, context: int) -> int:
        """Fewest bytes that a decode step moves: weights once; embedding, rows, keys and values for each sequence."""
        config, itemsize = self.model.config, self.model.dtype.itemsize
        row = config.hidden_size * itemsize  # the embedding
        if self.tier is not None:
            row = (self.tier.num_slices + (not self.tier.embedding)) * config.hidden_size * self.tier.dtype.itemsize
        return self.weight_bytes + batch * (row + kv_cache_bytes(config, context=context, bytes_per_number=itemsize))

    def engine(
        self,
        *,
        forced: Int[Tensor, "S C"] | None = None,
        max_sequences: int = 1,
        max_length: int,
        prefill_chunk: int = PREFILL_TOKENS,
    ) -> Engine:
        """An engine; where steps are `captured` and `forced` is given, slot s takes token `forced[s, p]` at position p.

        Raises:
            ValueError: a size is impossible.
        """
        return engine_of(
            self.model,
            self.tier,
            forced=None if forced is None else forced.to(self.model.device),
            max_sequences=max_sequences,
            max_length=max_length,
            prefill_chunk=prefill_chunk,
        )


def random_model(
    config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    num_ids: int | None = None,
    embedding: bool = True,
    int8: Int8Part | None = None,
) -> Transformer:
    """A model with random weights, made on its device, without those that rows replace.

    Args:
        config: Its shape.
        device: Where it is made.
        dtype: Of its weights.
        num_ids: Ids that have rows, by default all: the head gives the others logits of 0, so that none is ever chosen.
        embedding: Whether it has the embedding, which rows can carry.
        int8: Weights to make int8.
    """
    with torch.device("meta"):
        model = Transformer(config, with_memory=False, with_embedding=embedding).to(dtype)
    model.to_empty(device=device)
    model.tie_head()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(0, 0.02)
        model.head.weight[num_ids or config.vocab_size :] = 0
    if int8 is not None:
        quantize(model, int8)
    return model.requires_grad_(False)


def random_store(folder: Path, config: ModelConfig, *, num_ids: int, embedding: bool = False) -> ToLStore:
    """Write a whole bf16 store of random rows for the first `num_ids` ids: the same rows in every block.

    Raises:
        FileExistsError: the folder exists.
        ValueError: the model has no memory.
    """
    manifest = layout(dataclasses.replace(config, vocab_size=num_ids), embedding=embedding)
    numbers = manifest.block_rows * manifest.stride_bytes // 2
    block = torch.empty(numbers, dtype=torch.bfloat16).normal_(0, 0.02).view(torch.uint8).numpy()
    digests: dict[int, str] = {}
    checksums: list[str] = []
    with atomic_folder(folder) as partial_folder:
        for shard in manifest.shards:
            with (partial_folder / shard.file).open("wb") as file:
                file.write(shard_header(manifest, shard))
                for first in range(0, shard.tokens, manifest.block_rows):
                    data = block[: min(manifest.block_rows, shard.tokens - first) * manifest.stride_bytes].data
                    file.write(data)
                    if len(data) not in digests:
                        digests[len(data)] = hashlib.sha256(data).hexdigest()
                    checksums.append(digests[len(data)])
        write_json(partial_folder / MANIFEST, manifest.with_blocks(checksums).to_json())
    return ToLStore.open(folder)
