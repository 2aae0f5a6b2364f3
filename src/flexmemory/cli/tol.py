"""`flexmemory tol build|plan|requantize|diff|info|verify`: token-wise lookups."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro
from jaxtyping import Int64
from torch import Tensor

from flexmemory.device import resolve_device
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.storage import write_json
from flexmemory.tokenizer import Tokenizer
from flexmemory.tol.build import build_store
from flexmemory.tol.diff import Difference, difference
from flexmemory.tol.edited import edited_tokens
from flexmemory.tol.plan import load_plan
from flexmemory.tol.requantize import requantize
from flexmemory.tol.store import ToLStore
from flexmemory.tol.verify import SAMPLE, verify_store
from flexmemory.train.data import TokenDataset
from flexmemory.train.frequency import token_counts


def build(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    out: Path,
    codec: str = "bf16",
    embedding: tyro.conf.FlagCreatePairsOff[bool] = False,
    layers: tuple[int, ...] | None = None,
    plan: Path | None = None,
    counts: Path | None = None,
    device: str = "auto",
) -> None:
    """Compute every token's rows and write them to a new folder; run again, it goes on where it was interrupted.

    Args:
        checkpoint: A checkpoint or run folder.
        out: The folder to make.
        codec: How numbers are written: bf16, fp32, fp8, int8, int4, int3, int2, nf4, normal1 to normal6, trellis1 to
            trellis6, svdRANK, svdRANK+normal4 and such, pq4x8, pq8x8 (docs/tol-format.md).
        embedding: Store each token's input embedding with its rows, so that the model needs no table of it in memory.
        layers: Layers to keep, the most important first; by default all.
        plan: A folder that `flexmemory tol plan` wrote, instead of the three above.
        counts: A folder that `flexmemory prepare` wrote with the model's tokenizer: how often each token occurs in its
            training split is stored, so that frequent rows can be kept in fast memory.
        device: Where rows are computed: cpu, cuda, cuda:1 ..., or auto: the GPU where there is one.
    """
    if plan is not None and (codec, embedding, layers) != ("bf16", False, None):
        raise ValueError("a plan says how rows are written: leave out --codec, --embedding and --layers")
    opened = Checkpoint.open(checkpoint)
    store = build_store(
        opened,
        out,
        codec=codec,
        embedding=embedding,
        layers=layers,
        scheme=None if plan is None else load_plan(plan, opened),
        counts=None if counts is None else counts_of(counts, opened),
        device=resolve_device(device),
    )
    print(describe(store))


def counts_of(data: Path, checkpoint: Checkpoint) -> Int64[Tensor, " V"]:
    """How often each of the checkpoint's tokens occurs in the training split of prepared data.

    Raises:
        ValueError: the data is of another tokenizer.
    """
    dataset = TokenDataset.open(data)
    if dataset.tokenizer_fingerprint != checkpoint.tokenizer_fingerprint:
        raise ValueError(
            f"{data} was prepared with another tokenizer than {checkpoint.path} has; its counts would be of other "
            "tokens: prepare the text with `--tokenizer` of the checkpoint, or leave out --counts"
        )
    return token_counts(dataset.train, vocab_size=checkpoint.config.vocab_size)


def requantize_store(
    store: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    out: Path,
    codec: str,
    layers: tuple[int, ...] | None = None,
    device: str = "auto",
) -> None:
    """Write the rows of a store in another codec, without the checkpoint; run again, it goes on where it was.

    Args:
        store: A folder that `flexmemory tol build` wrote.
        out: The folder to make.
        codec: How numbers are to be written, as in `flexmemory tol build`.
        layers: Layers to keep, the most important first; by default those of the store.
        device: Where rows are encoded: cpu, cuda, cuda:1 ..., or auto: the GPU where there is one.
    """
    made = requantize(ToLStore.open(store), out, codec=codec, layers=layers, device=resolve_device(device))
    print(describe(made))


def diff(
    first: Annotated[Path, tyro.conf.Positional],
    second: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    worst: int = 10,
    out: Path | None = None,
) -> None:
    """Say how far the rows of two stores are apart: layer by layer, and for the tokens that differ most.

    Args:
        first: A folder that `flexmemory tol build` wrote.
        second: Another, of the same model or of one of the same shape.
        worst: Tokens to name.
        out: A JSON file for all of it, every token included.
    """
    print_difference(lambda: difference(ToLStore.open(first), ToLStore.open(second)), worst=worst, out=out)


def print_difference(
    compare: Callable[[], Difference], *, worst: int, out: Path | None, tokenizer: Tokenizer | None = None
) -> None:
    """Say what `compare` finds, and write all of it to `out`; refuse bad options before it begins."""
    if worst < 0:
        raise ValueError(f"--worst must not be negative, got {worst}")
    if out is not None and out.exists():
        raise FileExistsError(f"{out} already exists; choose another file or remove it")
    found = compare()
    width = max(map(len, found.names))
    print(f"{'':{width}}  relative error      rms error  largest error  tokens that differ")
    for place, name in enumerate(found.names):
        print(
            f"{name:{width}}  {found.relative[place]:14.4%}  {found.rms[place]:13.6g}  {found.largest[place]:13.6g}  "
            f"{int(found.changed[place]):18,}"
        )
    if found.missing:
        print(f"not compared, as one of the two lacks it: {', '.join(found.missing)}")
    for token, name, error in found.worst(worst):
        text = "" if tokenizer is None else f" ({tokenizer.token(token)!r})"
        print(f"token {token}{text}: {error:.4%} in {name}")
    if out is not None:
        write_json(out, found.to_json())


def info(store: Annotated[Path, tyro.conf.Positional], /) -> None:
    """Say what a store holds.

    Args:
        store: A folder that `flexmemory tol build` wrote.
    """
    print(describe(ToLStore.open(store)))


def verify(
    store: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    checkpoint: Path | None = None,
    sample: int | None = None,
) -> None:
    """Check every byte of a store against its checksums and, given the checkpoint, some rows against the model.

    Args:
        store: A folder that `flexmemory tol build` wrote.
        checkpoint: The checkpoint or run folder that it should have been built from.
        sample: Random rows to recompute from the checkpoint (64 unless told otherwise), beside the first and the last.
    """
    if checkpoint is None and sample is not None:
        raise ValueError("--sample recomputes rows and needs --checkpoint")
    verified = verify_store(
        store,
        checkpoint=None if checkpoint is None else Checkpoint.open(checkpoint),
        sample=SAMPLE if sample is None else sample,
    )
    print(f"{store}: all blocks match their checksums ({verified.blocks})")
    if checkpoint is not None:
        print(f"{store}: all sampled rows are those of {checkpoint} ({verified.sampled})")


def describe(store: ToLStore) -> str:
    """The text that `flexmemory tol info` prints."""
    manifest = store.manifest
    padding = 0 if manifest.coded else manifest.stride_bytes - store.row_bytes
    entries = {
        "codec": store.codec,
        "bands": ", ".join(f"{band.tokens:,} tokens of {band.row_bytes:,} bytes" for band in store.bands) or "none",
        "embedding": "in the row" if store.embedding else "not in the row",
        "layers": f"{len(store.layers)} of {manifest.num_layers}: {' '.join(map(str, store.layers))}",
        "shape": f"V {store.vocab_size:,}, L {len(store.layers)}, D {store.hidden_size:,}",
        "size": f"{store.nbytes / 1e9:,.3f} GB",
        "row": f"{store.row_bytes:,} bytes" + (f" and {padding:,} of padding" if padding else ""),
        "checkpoint": manifest.checkpoint_fingerprint[:12],
        "tokenizer": manifest.tokenizer_fingerprint[:12] or "none",
        "counts": "none" if manifest.counts is None else f"of {manifest.counts.total:,} tokens",
        "blocks": f"{sum(1 for _ in manifest.blocks()):,} of {manifest.block_rows:,} rows",
    }
    if manifest.edits:
        edited = len(edited_tokens(manifest.edits))
        entries["edited"] = f"rows of {edited:,} tokens, in {len(manifest.edits)} edits (docs/editing.md)"
    lines = [str(store.path), *(f"  {name:<12}{value}" for name, value in entries.items()), "  shards"]
    for shard in manifest.shards:
        last = shard.first_token + shard.tokens - 1
        size = f"{manifest.shard_bytes(shard):,} bytes"
        lines.append(f"    {shard.file}  tokens {shard.first_token:,} to {last:,}  {size}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Entry point of the verb."""
    from flexmemory.cli.tol_plan import plan  # it takes `counts_of` from here

    verbs = {
        "build": build,
        "plan": plan,
        "requantize": requantize_store,
        "diff": diff,
        "info": info,
        "verify": verify,
    }
    tyro.extras.subcommand_cli_from_dict(
        verbs, args=argv, prog="flexmemory tol", description="Token-wise lookups: every token's memory rows on disk."
    )
    return 0
