"""`flexmemory edit row|swap|cell|rank-one|suppress|show|spill|diff|apply|revert`: edits of a memory, as patches."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import torch
import tyro
from jaxtyping import Int64
from torch import Tensor

from flexmemory.cli.tol import counts_of, print_difference
from flexmemory.device import resolve_device
from flexmemory.interpret.apply import apply_to_checkpoint, apply_to_store, is_store
from flexmemory.interpret.apply import revert as take_back
from flexmemory.interpret.difference import memory_difference
from flexmemory.interpret.edit import Editor
from flexmemory.interpret.patch import Patch, check_base
from flexmemory.interpret.promotion import Level
from flexmemory.interpret.spill import spill as spill_of
from flexmemory.interpret.tkv import TokenMemory
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.tol.store import ToLStore

_POSITIONAL = tyro.conf.Positional


def row(
    checkpoint: Annotated[Path, _POSITIONAL],
    /,
    *,
    token: str,
    out: Path,
    like: str | None = None,
    scale: float | None = None,
    layers: tuple[int, ...] | None = None,
    why: str = "",
) -> None:
    """Give a token the rows of another one, or its own times a factor; no other token's rows change by a bit.

    Args:
        checkpoint: A checkpoint or run folder.
        token: Text that is one token, or T and an id (T123).
        out: The patch to write.
        like: The token whose rows to take.
        scale: What to multiply rows by: 0 disables the token's memory.
        layers: By default all.
        why: A note to keep in the patch.
    """
    if (like is None) == (scale is None):
        raise ValueError("give either --like TOKEN or --scale FACTOR")
    opened, memory = _open(checkpoint)
    target = _token(opened, token)
    with memory.edit(opened) as edit:
        for layer in memory.layers if layers is None else layers:
            if scale is not None:
                edit.scale_row(target, layer=layer, factor=scale)
            elif like is not None:
                edit.set_row(target, layer=layer, row=edit.row(_token(opened, like), layer=layer))
    _save(edit, out, why)


def swap(
    checkpoint: Annotated[Path, _POSITIONAL],
    /,
    *,
    tokens: tuple[str, str],
    out: Path,
    layers: tuple[int, ...] | None = None,
    why: str = "",
) -> None:
    """Exchange the rows of two tokens.

    Args:
        checkpoint: A checkpoint or run folder.
        tokens: The two, each text that is one token, or T and an id.
        out: The patch to write.
        layers: By default all.
        why: A note to keep in the patch.
    """
    opened, memory = _open(checkpoint)
    first, second = (_token(opened, token) for token in tokens)
    with memory.edit(opened) as edit:
        edit.swap_rows(first, second, layers=layers)
    _save(edit, out, why)


def cell(
    checkpoint: Annotated[Path, _POSITIONAL],
    /,
    *,
    cells: tuple[str, ...],
    scale: float,
    out: Path,
    tokens: tuple[str, ...] = (),
    why: str = "",
) -> None:
    """Multiply what cells add: their values, for all tokens, or for some tokens their part of the rows.

    Args:
        checkpoint: A checkpoint or run folder.
        cells: Names such as L12K3071: layer 12, key 3071.
        scale: What to multiply by: 0 switches a cell off.
        out: The patch to write.
        tokens: Only these tokens, each text that is one token, or T and an id; by default all, in one value.
        why: A note to keep in the patch.
    """
    opened, memory = _open(checkpoint)
    ids = _tokens(opened, tokens) if tokens else None
    with memory.edit(opened) as edit:
        changes: dict[int, list[int]] = {}
        for name in cells:
            found = re.fullmatch(r"L(\d+)K(\d+)", name)
            if not found:
                raise ValueError(f"cells have names such as L12K3071 (layer 12, key 3071), got {name!r}")
            changes.setdefault(int(found[1]), []).append(int(found[2]))
        for layer, keys in changes.items():
            if ids is not None:
                edit.scale_keys(keys, layer=layer, factor=scale, token_ids=ids)
                continue
            for key in keys:
                edit.scale_value(layer=layer, key=key, factor=scale)
    _save(edit, out, why)


def rank_one(
    checkpoint: Annotated[Path, _POSITIONAL],
    /,
    *,
    token: str,
    layer: int,
    like: str,
    out: Path,
    counts: Path | None = None,
    device: str = "auto",
    why: str = "",
) -> None:
    """Give a token another one's row in one layer through W_down, which moves all rows, together as little as can be.

    Args:
        checkpoint: A checkpoint or run folder.
        token: Text that is one token, or T and an id.
        layer: The layer.
        like: The token whose row it shall have.
        out: The patch to write.
        counts: A folder that `flexmemory prepare` wrote with the model's tokenizer: rows of its frequent tokens move
            least. By default all tokens count the same.
        device: Where it is computed: cpu, cuda, cuda:1 ..., or auto: the GPU where there is one.
        why: A note to keep in the patch.
    """
    opened, memory = _open(checkpoint, device)
    target, source = (_token(opened, name) for name in (token, like))
    with memory.edit(opened) as edit:
        counted = None if counts is None else counts_of(counts, opened)
        edit.rank_one(target, layer=layer, row=edit.row(source, layer=layer), counts=counted)
    _save(edit, out, why)


def suppress(
    checkpoint: Annotated[Path, _POSITIONAL],
    /,
    *,
    tokens: tuple[str, ...],
    out: Path,
    level: Level = "values",
    strength: float = 1.0,
    count: int = 64,
    layers: tuple[int, ...] | None = None,
    device: str = "auto",
    why: str = "",
) -> None:
    """Lower the values or rows that most promote some tokens, by their projection on the vocabulary.

    Args:
        checkpoint: A checkpoint or run folder.
        tokens: What shall come up less: each text that is one token, or T and an id.
        out: The patch to write.
        level: Whether to lower values, which all tokens share, or what raises these tokens in rows of single tokens.
        strength: From 0, nothing, to 1.
        count: How many values or rows to lower.
        layers: By default all.
        device: Where it is computed: cpu, cuda, cuda:1 ..., or auto: the GPU where there is one.
        why: A note to keep in the patch.
    """
    opened, memory = _open(checkpoint, device)
    tokenizer = opened.tokenizer()
    with memory.edit(opened) as edit:
        ids = _tokens(opened, tokens)
        found = edit.suppress(ids, level=level, strength=strength, count=count, layers=layers)
    for layer, place, share in found[:10]:
        name = f"L{layer}K{place}" if level == "values" else f"layer {layer}, {tokenizer.token(place)!r} (T{place})"
        print(f"{name}: {share:.1%} of its top logits")
    _save(edit, out, why)


def show(patches: Annotated[tuple[Path, ...], _POSITIONAL], /) -> None:
    """Say what patches change.

    Args:
        patches: Files that `flexmemory edit` wrote.
    """
    for path in patches:
        print(describe(Patch.load(path), path))


def spill(
    patch: Annotated[Path, _POSITIONAL],
    checkpoint: Annotated[Path, _POSITIONAL],
    /,
    *,
    counts: Path | None = None,
    worst: int = 10,
    device: str = "auto",
) -> None:
    """Say whose rows a patch would move, and how far, over the whole vocabulary.

    Args:
        patch: A file that `flexmemory edit` wrote.
        checkpoint: The checkpoint or run folder that it was made for.
        counts: A folder that `flexmemory prepare` wrote with the model's tokenizer, for a mean weighted by frequency.
        worst: Tokens to name.
        device: Where it is computed: cpu, cuda, cuda:1 ..., or auto: the GPU where there is one.
    """
    if worst < 0:
        raise ValueError(f"--worst must not be negative, got {worst}")
    opened, memory = _open(checkpoint, device)
    loaded = Patch.load(patch)
    _check(loaded, opened)
    report = spill_of(memory, loaded)
    tokenizer = opened.tokenizer()
    print(f"exact over {memory.vocab_size:,} tokens, without those that the edit is about: {len(report.tokens):,}")
    print("layer  moved at all  moved 1 %            max           mean  weighted mean     row length")
    for entry in report.summary(counts=None if counts is None else counts_of(counts, opened)):
        sizes = "  ".join(f"{entry[name]:13.4g}" for name in ("max", "mean", "weighted_mean", "row_length"))
        print(f"{entry['layer']:5}  {entry['any']:12,}  {entry['moved']:9,}  {sizes}")
    for token, layer, moved in report.worst(worst):
        print(f"{tokenizer.token(token)!r} (T{token}) in layer {layer}: {moved:.4g}")


def diff(
    first: Annotated[Path, _POSITIONAL],
    second: Annotated[Path, _POSITIONAL],
    /,
    *,
    worst: int = 10,
    out: Path | None = None,
    device: str = "auto",
) -> None:
    """Say how far the rows of two checkpoints are apart (of stores: `flexmemory tol diff`).

    Args:
        first: A checkpoint or run folder.
        second: Another of the same shape and tokenizer.
        worst: Tokens to name.
        out: A JSON file for all of it, every token included.
        device: Where rows are computed: cpu, cuda, cuda:1 ..., or auto: the GPU where there is one.
    """
    (one, first_memory), (other, second_memory) = (_open(path, device) for path in (first, second))
    if one.tokenizer_fingerprint != other.tokenizer_fingerprint:
        raise ValueError(f"{first} and {second} have different tokenizers: their rows are of different tokens")
    tokenizer = one.tokenizer() if one.tokenizer_fingerprint else None
    print_difference(lambda: memory_difference(first_memory, second_memory), tokenizer=tokenizer, worst=worst, out=out)


def apply(
    patches: Annotated[tuple[Path, ...], _POSITIONAL],
    /,
    *,
    to: Path,
    out: Path,
) -> None:
    """Write an edited copy of a checkpoint or of a ToL store; files that do not change are links to the old ones.

    Args:
        patches: Files that `flexmemory edit` wrote, in the order in which to apply them.
        to: A checkpoint or run folder, or a store. A store takes patches of rows alone.
        out: The folder to make.
    """
    loaded = [Patch.load(path) for path in patches]
    if not is_store(to):
        print(f"{apply_to_checkpoint(Checkpoint.open(to), loaded, out).path}: {len(loaded)} patches applied")
        return
    made = apply_to_store(ToLStore.open(to), loaded, out)
    print(
        f"{made.store.path}: {len(loaded)} patches applied; codec {made.store.codec} took at most "
        f"{made.relative_error:.3%} off an edited row"
    )


def revert(edited: Annotated[Path, _POSITIONAL], /, *, out: Path) -> None:
    """Write a copy of a checkpoint or store without its last edit, byte for byte what it was.

    Args:
        edited: A folder that `flexmemory edit apply` wrote.
        out: The folder to make.
    """
    take_back(edited, out)
    print(f"{out}: as before the last edit of {edited}")


def describe(patch: Patch, path: Path) -> str:
    """The text that `flexmemory edit show` prints."""
    kinds: dict[str, int] = {}
    for step in patch.steps:
        kinds[step.kind] = kinds.get(step.kind, 0) + len(step.numbers)
    changes = {"outer": "outer products on W_down", "embedding": "embeddings"}
    entries = {
        "why": patch.description or "not said",
        "changes": ", ".join(f"{count:,} {changes.get(kind, kind)}" for kind, count in kinds.items()),
        "layers": " ".join(map(str, sorted({step.layer for step in patch.steps if step.layer >= 0}))) or "none",
        "tokens": ", ".join(f"T{token}" for token in patch.tokens[:10]) + (" ..." if len(patch.tokens) > 10 else ""),
        "size": f"{patch.nbytes:,} bytes of numbers",
        "for": f"checkpoint {patch.base[:12]}, tokenizer {patch.tokenizer[:12] or 'none'}",
        "stores": "can be applied to stores" if patch.rows_only else "changes weights: build stores again",
        "hash": patch.fingerprint[:12],
    }
    steps = [f"  - {line}" for line in patch.what]
    return "\n".join([str(path), *(f"  {name:<9}{value}" for name, value in entries.items()), *steps])


def _open(path: Path, device: str = "cpu") -> tuple[Checkpoint, TokenMemory]:
    opened = Checkpoint.open(path)
    return opened, TokenMemory(opened.load(device=resolve_device(device)))


def _token(checkpoint: Checkpoint, name: str) -> int:
    """The id of T123, or of text that is one token."""
    if re.fullmatch(r"T\d+", name):
        return int(name[1:])
    tokenizer = checkpoint.tokenizer()
    ids = tokenizer.encode(name)
    if len(ids) != 1:
        parts = ", ".join(f"{tokenizer.token(token)!r} (T{token})" for token in ids)
        raise ValueError(
            f"{name!r} is {len(ids)} tokens ({parts or 'none'}), and an edit is of one: give one of them; words within "
            "a text mostly begin with a space"
        )
    return ids[0]


def _tokens(checkpoint: Checkpoint, names: Iterable[str]) -> Int64[Tensor, " U"]:
    return torch.tensor([_token(checkpoint, name) for name in names], dtype=torch.int64).unique()


def _check(patch: Patch, checkpoint: Checkpoint) -> None:
    check_base(
        patch,
        fingerprints={checkpoint.fingerprint, *checkpoint.lineage},
        tokenizer=checkpoint.tokenizer_fingerprint,
        target=checkpoint.path,
    )


def _save(edit: Editor, out: Path, why: str) -> None:
    patch = dataclasses.replace(edit.patch, description=why)
    patch.save(out)
    print(describe(patch, out))


def main(argv: list[str]) -> int:
    """Entry point of the verb."""
    verbs: dict[str, Callable[..., None]] = {
        "row": row,
        "swap": swap,
        "cell": cell,
        "rank-one": rank_one,
        "suppress": suppress,
        "show": show,
        "spill": spill,
        "diff": diff,
        "apply": apply,
        "revert": revert,
    }
    tyro.extras.subcommand_cli_from_dict(
        verbs, args=argv, prog="flexmemory edit", description="Edits of a memory: small patches, exact and reversible."
    )
    return 0
