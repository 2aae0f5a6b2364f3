"""`flexmemory info PRESET|CHECKPOINT`: what a model costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import tyro

from flexmemory.config import ModelConfig
from flexmemory.engine.int8 import Int8Part
from flexmemory.engine.loading import store_facts
from flexmemory.engine.placement import Budget, parse_size, place
from flexmemory.model.accounting import (
    count_parameters,
    decode_bytes_per_token,
    kv_cache_bytes,
    row_numbers,
    train_flops_per_token,
)
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.presets import PRESETS, get_preset
from flexmemory.tol.codec import CODECS
from flexmemory.tol.store import ToLStore

UNIQUE_SHARES = (1.0, 0.5, 0.25, 0.1, 0.05)


def info(
    target: Annotated[str, tyro.conf.Positional],
    /,
    *,
    context: int | None = None,
    memory_budget: str | None = None,
    host_budget: str | None = None,
    tol: Path | None = None,
    int8: Int8Part | None = None,
) -> None:
    """Print parameters, ToL bytes per codec, FLOPs per trained token and bytes per decoded token.

    With a memory budget, print instead what would live where, in bf16 and for one sequence; nothing is loaded.

    Args:
        target: A preset's name, or a checkpoint or run folder.
        context: Tokens of context for the decode figures, by default half of the model's longest; with a memory budget,
            the length to have room for, by default the longest.
        memory_budget: Memory of the device, such as 2GiB.
        host_budget: Host memory beside a GPU; without it, the model is to run on a CPU.
        tol: A ToL store that rows would come from.
        int8: Weights that would be int8: of the output head, or of all projections.
    """
    checkpoint = None if target in PRESETS or not Path(target).exists() else Checkpoint.open(target)
    config = get_preset(target).model if checkpoint is None else checkpoint.config
    if memory_budget is None:
        if (host_budget, tol, int8) != (None, None, None):
            raise ValueError("--host-budget, --tol and --int8 are of a placement: give --memory-budget too")
        print(describe(config, name=target, context=context or config.max_seq_len // 2))
        return
    if tol is not None and checkpoint is None:
        raise ValueError(f"a ToL store is of one checkpoint: give that instead of the preset {target!r}")
    placement = place(
        config,
        budget=Budget(device=parse_size(memory_budget), host=None if host_budget is None else parse_size(host_budget)),
        dtype=torch.bfloat16,
        store=None if tol is None else store_facts(ToLStore.open(tol, checkpoint=checkpoint)),
        int8=int8,
        length=context,
    )
    print(placement.table())


def describe(config: ModelConfig, *, name: str, context: int) -> str:
    """The text that `flexmemory info` prints."""
    counts = count_parameters(config)
    shape = (
        f"{name}: {config.architecture}, L {config.num_layers}, D {config.hidden_size}, H {config.num_heads}"
        f"/{config.num_kv_heads}, K {config.intermediate_size}, V {config.vocab_size}"
        + (f", b {config.flex_ratio} ({config.ffn_c})" if config.flex_ratio else "")
        + (f", memory {config.memory_kind}" if config.has_memory else "")
    )
    ffn = "FFN-C" if config.architecture == "flex" else "FFN"
    lines = [
        shape,
        "",
        "parameters (embedding and head apart, as in the paper)",
        *_row("attention", _millions(counts.attention)),
        *_row(ffn, _millions(counts.ffn), when=counts.ffn > 0),
        *_row("norms", _millions(counts.norms)),
        *_row("memory", _millions(counts.memory), "offloadable", when=config.has_memory),
        *_row("total", _millions(counts.backbone)),
        *_row("resident", _millions(counts.active), "the paper's active count"),
        *_row("embedding", _millions(counts.embedding)),
        *_row("head", _millions(counts.head), "tied to the embedding" if config.tie_embeddings else ""),
        "",
    ]
    if config.has_memory:
        lines += ["token-wise lookups (ToL), all tokens and layers"]
        for codec in CODECS.values():
            row_bytes = codec.row_bytes(config.num_layers, config.hidden_size)
            per_row = f"{row_bytes:,} bytes a row"
            lines += _row(codec.name, f"{row_bytes * config.vocab_size / 1e9:,.3f} GB", per_row)
        lines += [""]
    lines += [f"FLOPs per trained token, sequences of {config.max_seq_len}"]
    if config.has_memory:
        for share in UNIQUE_SHARES:
            note = "FFN-M on every position" if share == 1 else "FFN-M on unique ids"
            flops = train_flops_per_token(config, unique_share=share)
            lines += _row(f"unique {share:.0%}", f"{flops / 1e9:,.3f} G", note)
    else:
        lines += _row("", f"{train_flops_per_token(config, unique_share=1.0) / 1e9:,.3f} G")
    cache = kv_cache_bytes(config, context=context, bytes_per_number=2)
    rows = row_numbers(config) * 2
    decode = decode_bytes_per_token(config, context=context)
    lines += [
        "",
        f"bytes per decoded token, bf16, batch 1, context {context}",
        *_row("weights", f"{(decode - cache - rows) / 1e6:,.2f} MB"),
        *_row("KV cache", f"{cache / 1e6:,.2f} MB"),
        *_row("row", f"{rows / 1e6:,.3f} MB", when=config.has_memory),
        *_row("all", f"{decode / 1e6:,.2f} MB"),
    ]
    return "\n".join(lines)


def _millions(count: int) -> str:
    return f"{count / 1e6:,.3f} M"


def _row(label: str, value: str, note: str = "", *, when: bool = True) -> list[str]:
    return [f"  {label:<12}{value:>14}  {note}".rstrip()] if when else []


def main(argv: list[str]) -> int:
    """Entry point of the verb."""
    tyro.cli(info, args=argv, prog="flexmemory info")
    return 0
