"""Verify a ToL store: every byte against its checksum, and a sample of rows against the model."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from flexmemory.model.checkpoint import Checkpoint
from flexmemory.model.transformer import Transformer
from flexmemory.tol.build import load_for_rows
from flexmemory.tol.codec import Codec, get_codec
from flexmemory.tol.disk import DiskRows
from flexmemory.tol.edited import edited_tokens
from flexmemory.tol.format import Block
from flexmemory.tol.store import ToLStore

SAMPLE = 64
"""Rows recomputed unless told otherwise."""
SLACK = 32
"""How many times the rounding error of one fp32 computation another may make. Measured (L 24, D 2048, built on an H200,
verified on a CPU, 66 rows): 2 is too little, 8 enough."""
NAMED = 8
"""Damaged places to name before counting the rest."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """What was found right."""

    store: ToLStore
    blocks: int
    """Blocks that match their checksums: all."""
    sampled: int
    """Rows that were recomputed; 0 without a checkpoint."""


def verify_store(
    path: str | Path, *, checkpoint: Checkpoint | None = None, sample: int = SAMPLE, seed: int = 0
) -> Verified:
    """Check every byte of a store and, given its checkpoint, recompute some of its rows.

    Args:
        path: The store's folder.
        checkpoint: The model it should have been built from.
        sample: Random rows to recompute with `checkpoint`, beside those of the first and last token and of edited
            tokens; the latter only with a checkpoint that was edited alike.
        seed: Which rows.

    Raises:
        FileNotFoundError: there is no whole store at `path`.
        OSError: a file cannot be read.
        ToLMismatchError: the store was built from another checkpoint or with another tokenizer.
        ValueError: the store is damaged, or a row is not the model's.
    """
    if sample < 0:
        raise ValueError(f"sample must not be negative, got {sample}")
    store = ToLStore.open(path, checkpoint=checkpoint)
    store.counts()
    damaged = store.damaged_blocks()
    if damaged:
        raise ValueError(f"ToL store {store.path} is damaged in {_enumerate(damaged)}; build it again")
    sampled = 0 if checkpoint is None else _verify_rows(store, checkpoint, sample=sample, seed=seed)
    return Verified(store=store, blocks=sum(1 for _ in store.manifest.blocks()), sampled=sampled)


@torch.inference_mode()
def _verify_rows(store: ToLStore, checkpoint: Checkpoint, *, sample: int, seed: int) -> int:
    """Compare a sample of rows with the model; how many there were."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(store.vocab_size, generator=generator)[:sample]
    token_ids = torch.cat((chosen, torch.tensor([0, store.vocab_size - 1])))
    edited = torch.tensor(edited_tokens(store.manifest.edits), dtype=torch.int64)
    if checkpoint.fingerprint == store.manifest.checkpoint_fingerprint:  # it does not know of edits
        token_ids = token_ids[~torch.isin(token_ids, edited)]
    else:
        token_ids = torch.cat((token_ids, edited))
    token_ids = token_ids.unique()
    stored = torch.empty((len(token_ids), store.num_slices, store.hidden_size), dtype=store.decoded_dtype)
    with DiskRows(store) as rows:
        rows.gather(token_ids, stored)
    model = load_for_rows(checkpoint, device="cpu")
    exact, margin = _exact(model, token_ids, store.layers)
    if store.embedding:
        exact = torch.cat((model.embed(token_ids)[:, None].double(), exact), dim=1)
        margin = F.pad(margin, (0, 0, 1, 0))  # moved, not computed: these bits and no others
    if store.plain:
        codec = get_codec(store.codec)
        low, high = _as_stored(exact - margin, codec), _as_stored(exact + margin, codec)
    else:
        assert store.manifest.coded is not None
        places = token_ids if store.positions is None else store.positions[token_ids]
        errors = torch.tensor(store.manifest.coded.errors, dtype=torch.float64)[store.band_of(places)]  # (U, slices)
        # As decoded, rounded to bf16 at last.
        margin = margin + errors[..., None] * 1.001 + torch.finfo(torch.bfloat16).eps * stored.double().abs()
        low, high = exact - margin, exact + margin
    inside = (low <= stored) & (stored <= high)  # false for NaN
    if not inside.all():
        row, place, element = (~inside).nonzero()[0].tolist()
        raise ValueError(
            f"ToL store {store.path} does not hold the model's row of token {int(token_ids[row])}: "
            f"{store.manifest.slice_name(place)} has {float(stored[row, place, element]):.9g} at {element}, expected "
            f"{float(low[row, place, element]):.9g} to {float(high[row, place, element]):.9g}; build it again"
        )
    return len(token_ids)


def _exact(
    model: Transformer, token_ids: Int[Tensor, " U"], layers: tuple[int, ...]
) -> tuple[Float[Tensor, "U slices D"], Float[Tensor, "U slices 1"]]:
    """Rows in fp64, and how far from them a number may have been before it was stored.

    GEMMs of another height round differently, so rows are not bitwise what they were at building. But they are within
    rounding of the exact row, and how large rounding is for this token and layer shows in one computation: a few times
    its largest error. Plain codecs round monotonically, so what is stored lies between the two ends as stored; rows in
    few bits are as far off as the manifest says, at most.
    """
    kept = list(layers)
    embeddings = model.embed(token_ids).double()
    exact = torch.stack([copy.deepcopy(m).double()(token_ids, embeddings) for m in model.memories], dim=1)[:, kept]
    computed = model.compute_rows(token_ids)[:, kept]
    error = (computed.double() - exact).abs().amax(dim=-1, keepdim=True)
    scale = exact.abs().amax(dim=-1, keepdim=True)
    return exact, SLACK * (error + torch.finfo(computed.dtype).eps * scale)


def _as_stored(rows: Float[Tensor, "U slices D"], codec: Codec) -> Float[Tensor, "U slices D"]:
    out = torch.empty(rows.shape, dtype=codec.dtype)
    codec.decode(codec.encode(rows), out)
    return out


def _enumerate(damaged: list[Block]) -> str:
    named = "; ".join(str(block) for block in damaged[:NAMED])
    return named + (f"; and {len(damaged) - NAMED} more blocks" if len(damaged) > NAMED else "")
