"""What a benchmark measures: a model and its rows, loaded or random, and an engine that may be told its tokens.

Speed does not depend on the values of weights, so random ones stand for those of any model of the same shape.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from flexmemory.config import ModelConfig
from flexmemory.engine.engine import Engine
from flexmemory.engine.int8 import Int8Part, quantize
from flexmemory.engine.loading import can_capture, engine_of
from flexmemory.engine.placement import PREFILL_TOKENS
from flexmemory.model.accounting import kv_cache_bytes
from flexmemory.model.transformer import Transformer
from flexmemory.storage import atomic_folder, write_json
from flexmemory.tol.codec import CODECS as PLAIN_CODECS
from flexmemory.tol.coded_rows import CodedRows
from flexmemory.tol.coding import Coding, SliceTensors, coding_of
from flexmemory.tol.contract import RowTier
from flexmemory.tol.disk import DiskRows
from flexmemory.tol.format import MANIFEST, Manifest, shard_header
from flexmemory.tol.hot import HotRows
from flexmemory.tol.layout import layout
from flexmemory.tol.scheme import Band, Scheme, tensors_to_file
from flexmemory.tol.store import TENSORS, ToLStore
from flexmemory.tol.tiers import DeviceRows

RANDOM_ROWS = 4
"""Random rows of a store in few bits that differ."""


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
        """Bytes of rows on the model's device, and of what it decodes them with."""
        hot, below = (self.tier.hot, self.tier.tier) if isinstance(self.tier, HotRows) else (None, self.tier)
        on_device = below.nbytes if isinstance(below, DeviceRows) else 0
        if isinstance(below, CodedRows):
            on_device = below.bytes_on(self.model.device)
        return (hot.nbytes if hot else 0) + on_device

    def step_bytes(self, *, batch: int, context: int) -> int:
        """Fewest bytes that a decode step moves: weights once; embedding, rows, keys and values for each sequence."""
        config, itemsize = self.model.config, self.model.dtype.itemsize
        row = config.hidden_size * itemsize  # the embedding
        if self.tier is not None:
            carried = 0 if self.tier.embedding else config.hidden_size * self.tier.dtype.itemsize
            row = self._row_bytes() + carried
        return self.weight_bytes + batch * (row + kv_cache_bytes(config, context=context, bytes_per_number=itemsize))

    def _row_bytes(self) -> int:
        """Bytes of a row where rows are: as numbers, or of one in few bits on the average of tokens."""
        tier = self.tier.tier if isinstance(self.tier, HotRows) else self.tier
        assert tier is not None
        if isinstance(tier, CodedRows):
            return tier.nbytes // tier.vocab_size
        if isinstance(tier, DiskRows) and not tier.store.plain:
            return tier.store.nbytes // tier.vocab_size
        return tier.num_slices * tier.hidden_size * tier.dtype.itemsize

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


def random_store(
    folder: Path, config: ModelConfig, *, num_ids: int, embedding: bool = False, codec: str = "bf16"
) -> ToLStore:
    """Write a whole store of random rows for the first `num_ids` ids: the same rows in every block.

    Args:
        folder: Where.
        config: The model.
        num_ids: Ids that have rows.
        embedding: Whether rows carry it.
        codec: How rows are written; `planned` is like what a plan for a tenth of bf16 chooses (`planned_bands`).

    Raises:
        FileExistsError: the folder exists.
        ValueError: the model has no memory, or there is no such codec.
    """
    config = dataclasses.replace(config, vocab_size=num_ids)
    scheme = None if codec in PLAIN_CODECS else random_scheme(config, codec=codec, embedding=embedding)
    manifest = layout(config, codec=codec, embedding=embedding, scheme=scheme)
    blocks = [_random_block(manifest, scheme, band) for band in range(1 if scheme is None else len(scheme.bands))]
    digests: dict[bytes, str] = {}
    checksums: list[str] = []
    with atomic_folder(folder) as partial_folder:
        for shard in manifest.shards:
            with (partial_folder / shard.file).open("wb") as file:
                file.write(shard_header(manifest, shard))
                for first in range(0, shard.tokens, manifest.block_rows):
                    size = min(manifest.block_rows, shard.tokens - first) * manifest.stride_of(shard)
                    data = blocks[shard.band][:size].data
                    file.write(data)
                    key = b"%d %d" % (shard.band, size)
                    if key not in digests:
                        digests[key] = hashlib.sha256(data).hexdigest()
                    checksums.append(digests[key])
        if scheme is not None:
            assert manifest.coded is not None
            tensors = save(tensors_to_file(scheme.tensors, encoder=False))
            (partial_folder / TENSORS).write_bytes(tensors)
            coded = dataclasses.replace(manifest.coded, tensors_sha256=hashlib.sha256(tensors).hexdigest())
            manifest = dataclasses.replace(manifest, coded=coded)
        write_json(partial_folder / MANIFEST, manifest.with_blocks(checksums).to_json())
    return ToLStore.open(folder)


def planned_bands(width: int, num_ids: int) -> list[tuple[int, Coding]]:
    """Tokens and codings of layers: a fiftieth of tokens in 3.5 bits a number, a fifth in 2.25, the others in 1.25."""
    frequent, common, half, quarter = -(-num_ids // 50), num_ids // 5, width // 16 * 8, width // 32 * 8
    parts = [((4, half), (3, width - half)), ((3, quarter), (2, width - quarter)), ((2, quarter), (1, width - quarter))]
    sizes = (frequent, common, num_ids - frequent - common)
    codings = [Coding(levels="trellis", widths=widths, group=width) for widths in parts]
    return list(zip(sizes, codings, strict=True))


def random_scheme(config: ModelConfig, *, codec: str, embedding: bool) -> Scheme:
    """How rows of a model are written by a codec, or as if `planned`, the embedding in bf16; its tensors are random.

    Raises:
        ValueError: there is no such codec.
    """
    width = config.hidden_size
    kinds = [(config.vocab_size, coding_of(codec, width))] if codec != "planned" else None
    kinds = kinds or planned_bands(width, config.vocab_size)
    carried = [coding_of("bf16", width)] if embedding else []
    bases = {
        layer: torch.linalg.qr(torch.randn(width, coding.num_coefficients)).Q.T
        for layer in range(config.num_layers)
        for _, coding in kinds
        if coding.basis
    }

    def tensors_of(layer: int, coding: Coding) -> SliceTensors:
        codes = coding.num_coefficients // coding.vector
        return SliceTensors(
            mean=torch.zeros(width),
            gain=torch.full((coding.num_coefficients,), 0.1),
            basis=bases.get(layer),
            codebook=torch.randn(codes, 256, coding.vector) if coding.levels == "pq" else None,
        )

    return Scheme(
        codec=codec,
        layers=tuple(range(config.num_layers)),
        embedding=embedding,
        hidden_size=width,
        bands=tuple(Band(tokens=size, slices=(*carried, *[coding] * config.num_layers)) for size, coding in kinds),
        tensors=tuple(
            (*[SliceTensors() for _ in carried], *[tensors_of(layer, coding) for layer in range(config.num_layers)])
            for _, coding in kinds
        ),
    )


def _random_block(manifest: Manifest, scheme: Scheme | None, band: int) -> UInt8[np.ndarray, " bytes"]:
    """Random rows of a band as they are stored; in few bits there are few, again and again, as encoding is slow."""
    if scheme is None:
        numbers = manifest.block_rows * manifest.stride_bytes // 2
        return torch.empty(numbers, dtype=torch.bfloat16).normal_(0, 0.02).view(torch.uint8).numpy()
    assert manifest.coded is not None
    rows = torch.empty((min(RANDOM_ROWS, manifest.block_rows), scheme.num_slices, scheme.hidden_size)).normal_(0, 0.02)
    data = F.pad(scheme.encode(rows, band), (0, manifest.coded.strides[band] - scheme.bands[band].row_bytes))
    return data.repeat(-(-manifest.block_rows // len(data)), 1).flatten().numpy()
