"""`flexmemory bench decode|prefill|rows`: measure this machine (benchmarks/protocol.md says how)."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from flexmemory.config import ModelConfig
from flexmemory.device import resolve_device
from flexmemory.engine.bench import copy_rate, measure_decode, measure_prompt, measure_rows, sequences
from flexmemory.engine.int8 import Int8Part
from flexmemory.engine.loading import DTYPES, load_model
from flexmemory.engine.subject import Subject, random_model, random_store
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.presets import PRESETS, get_preset
from flexmemory.provenance import provenance
from flexmemory.storage import write_json
from flexmemory.tol.disk import DiskRows
from flexmemory.tol.hot import HotRows, HotSet
from flexmemory.tol.store import ToLStore
from flexmemory.tol.tiers import Where, open_rows
from flexmemory.train.data import TokenDataset

RANDOM_ROWS = 40_000
"""Ids that have rows where these are random, at most: 3.9 GB at the 1b size."""
STREAM_TOKENS = 100_000
"""Of the data, at most."""

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What is measured."""

    tol: Path | None = None
    """A ToL store built from the checkpoint; without it, rows are computed. A preset has random rows."""
    rows: Where | None = None
    """Where rows are: device, host or disk; by default disk with --tol, and device for a preset."""
    hot_rows: int = 0
    """Rows of frequent tokens kept on the device beside --rows host or disk; for a preset, the first ids."""
    data: Path | None = None
    """Prepared data whose held-out tokens are decoded; without it they are random."""
    int8: Int8Part | None = None
    """What of the weights is int8: head or all."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ..., or auto: the GPU where there is one."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Of weights and computation; auto is bf16 on a GPU, and else the stored dtype, or fp32 for a preset."""

    def torch_dtype(self, device: torch.device) -> torch.dtype | None:
        """The dtype; None for the stored one."""
        return DTYPES.get("bf16" if self.dtype == "auto" and device.type == "cuda" else self.dtype)


SubjectOptions = Annotated[Options, tyro.conf.arg(name="")]


def decode(
    target: Annotated[str, tyro.conf.Positional],
    /,
    *,
    options: SubjectOptions = Options(),
    batch: tuple[int, ...] = (1,),
    context: int = 1024,
    tokens: int = 100,
    json: Path | None = None,
) -> None:
    """Time of a token in the engine, beside the bytes that it must move and the rate at which this device copies.

    Args:
        target: A checkpoint or run folder, or a preset: its weights are then random, which changes no speed.
        options: What is measured.
        batch: Sequences at once; one line each.
        context: Tokens in a sequence half way through.
        tokens: Tokens of each sequence to time: up to 10, or a multiple of 10.
        json: A file to write the figures to, with where they come from.
    """
    device = resolve_device(options.device)
    with _subject(target, options, device=device) as subject:
        stream = _stream(options, subject)
        if not subject.captured:
            logger.info("steps are not captured here: each sequence goes on with what the model chooses")
        rate = copy_rate(device)
        entries = [
            dataclasses.asdict(
                measure_decode(subject, stream, batch=size, context=context, steps=tokens, copy_bytes_per_s=rate)
            )
            for size in batch
        ]
    columns = {
        "batch": "batch", "context": "context", "ms/token": "ms_per_token", "mean": "mean_ms_per_token",
        "tokens/s": "tokens_per_s", "MB moved": "step_bytes", "bound ms": "bound_ms", "of bound": "bound_share",
        "first token ms": "first_token_ms", "peak MB": "peak_bytes", "KV cache MB": "kv_cache_bytes",
    }  # fmt: skip
    print(f"{target} on {device}, copies at {rate / 1e9:,.1f} GB/s")
    print(_table([{label: entry[key] for label, key in columns.items()} for entry in entries]))
    _write(json, "decode", target, options, entries)


def prefill(
    target: Annotated[str, tyro.conf.Positional],
    /,
    *,
    options: SubjectOptions = Options(),
    prompt: int = 2048,
    chunk: int = 2048,
    json: Path | None = None,
) -> None:
    """Time from the submission of a prompt to its first token, alone in the engine.

    Args:
        target: A checkpoint or run folder, or a preset: its weights are then random, which changes no speed.
        options: What is measured.
        prompt: Tokens in the prompt. A preset's longest sequence is raised to hold it.
        chunk: Tokens computed at once, at most.
        json: A file to write the figures to, with where they come from.
    """
    if prompt < 1:
        raise ValueError(f"--prompt must be positive, got {prompt}")
    device = resolve_device(options.device)
    with _subject(target, options, device=device, length=prompt + 1) as subject:
        token_ids = sequences(_stream(options, subject), batch=1, length=prompt, num_ids=subject.num_ids)
        engine = subject.engine(max_length=prompt + 1, prefill_chunk=chunk)
        milliseconds = measure_prompt(engine, token_ids[0].tolist())
    entry = {"prompt": prompt, "ms": milliseconds, "tokens_per_s": 1e3 * prompt / milliseconds}
    print(f"{target} on {device}")
    print(_table([{"prompt": prompt, "ms": milliseconds, "tokens/s": entry["tokens_per_s"]}]))
    _write(json, "prefill", target, options, [entry])


def rows(
    *,
    tol: Path,
    rows: Where = "disk",
    cold: tyro.conf.FlagCreatePairsOff[bool] = False,
    device: str = "auto",
    json: Path | None = None,
) -> None:
    """Time of fetching rows onto a device, many at once and one, drawn by frequency where the store knows it.

    Args:
        tol: A ToL store.
        rows: Where rows are: device, host or disk.
        cold: Also take the store out of the page cache before each fetch; for rows on disk.
        device: Where rows go: cpu, cuda, cuda:1 ..., or auto: the GPU where there is one.
        json: A file to write the figures to, with where they come from.
    """
    if cold and rows != "disk":
        raise ValueError(f"--cold is for rows on disk, got --rows {rows}: they are read once, when they are loaded")
    place = resolve_device(device)
    store = ToLStore.open(tol)
    tier = DiskRows(store, direct="never") if rows == "disk" else open_rows(store, rows, device=place)
    figures = measure_rows(tier, store, device=place)
    if cold:
        figures += measure_rows(DiskRows(store), store, device=place, cold=True)
    entries = [dataclasses.asdict(figure) for figure in figures]
    drawn = "evenly" if store.manifest.counts is None else "by frequency"
    print(f"{tol}: rows of {store.row_bytes:,} bytes, drawn {drawn}, from {rows} to {place}")
    columns = {"rows": "rows", "us/row": "us_per_row", "GB/s": "gb_per_s"}
    if rows == "disk":
        columns |= {"cold": "cold", "in page cache": "cached_share", "around it": "direct"}
    print(_table([{label: entry[key] for label, key in columns.items()} for entry in entries]))
    if json is not None:
        write_json(
            json,
            {"bench": "rows", "store": str(tol), "rows": rows, "provenance": provenance(), "entries": entries},
        )


@contextlib.contextmanager
def _subject(target: str, options: Options, *, device: torch.device, length: int = 0) -> Iterator[Subject]:
    """What `target` names, measured as `options` say; a preset's longest sequence is at least `length`."""
    if options.hot_rows < 0:
        raise ValueError(f"--hot-rows must not be negative, got {options.hot_rows}")
    if target not in PRESETS and Path(target).exists():
        checkpoint = Checkpoint.open(target)
        loaded = load_model(
            checkpoint,
            tol=options.tol,
            rows=options.rows,
            device=device,
            dtype=options.torch_dtype(device),
            int8=options.int8,
        )
        store = None if options.tol is None else ToLStore.open(options.tol)
        yield Subject(model=loaded.model, tier=_with_hot_rows(loaded.tier, store, options, device=device))
        return
    config = get_preset(target).model
    config = dataclasses.replace(config, max_seq_len=max(config.max_seq_len, length))
    if options.tol is not None:
        raise ValueError(f"{target} is a preset, its rows are random: leave out --tol, or give a checkpoint")
    with tempfile.TemporaryDirectory(prefix="flexmemory-bench-") as folder:
        yield _random_subject(config, options, device=device, folder=Path(folder))


def _random_subject(config: ModelConfig, options: Options, *, device: torch.device, folder: Path) -> Subject:
    if not config.has_memory and (options.rows or options.hot_rows):
        raise ValueError("a dense preset has no rows; leave out --rows and --hot-rows")
    num_ids = min(config.vocab_size, RANDOM_ROWS) if config.has_memory else config.vocab_size
    dtype = options.torch_dtype(device) or torch.float32
    model = random_model(config, device=device, dtype=dtype, num_ids=num_ids, int8=options.int8)
    if not config.has_memory:
        return Subject(model=model)
    store = random_store(folder / "tol", config, num_ids=num_ids)
    tier = open_rows(store, options.rows or "device", device=device)
    return Subject(model=model, tier=_with_hot_rows(tier, None, options, device=device))


def _with_hot_rows(tier: Any, store: ToLStore | None, options: Options, *, device: torch.device) -> Any:
    """`tier` behind its hot set: by the counts of `store`, or the first ids where there is none."""
    if not options.hot_rows:
        return tier
    if tier is None or options.rows == "device" or (store is None and options.rows is None):
        raise ValueError("--hot-rows are kept beside rows in host memory or on disk: give --rows host or disk")
    count = min(options.hot_rows, tier.vocab_size)
    ids = torch.arange(count) if store is None else store.hot_ids(count)
    return HotRows(tier, HotSet.load(tier, ids, device=device))


def _stream(options: Options, subject: Subject) -> Tensor:
    """The ids to decode: held-out text where data is given."""
    if options.data is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(subject.num_ids, (STREAM_TOKENS,), generator=generator)
    dataset = TokenDataset.open(options.data)
    if dataset.vocab_size > subject.model.config.vocab_size:
        raise ValueError(
            f"{options.data} has {dataset.vocab_size:,} ids, the model {subject.model.config.vocab_size:,}; "
            "give data of the model's tokenizer"
        )
    split = dataset.validation or dataset.train
    stream = torch.from_numpy(split.read(0, min(STREAM_TOKENS, len(split))))
    if without := int((stream >= subject.num_ids).sum()):
        logger.info("%d of %d tokens have no random row and become id %d", without, len(stream), subject.num_ids - 1)
    return stream


def _table(entries: Sequence[dict[str, Any]]) -> str:
    """Entries as aligned columns."""
    cells = [[_cell(label, value) for label, value in entry.items()] for entry in entries]
    lines = [list(entries[0]), *cells]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _cell(label: str, value: int | float | bool | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if label in ("of bound", "in page cache"):
        return f"{value:.0%}"
    if "MB" in label.split():
        return f"{value / 1e6:,.2f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"


def _write(json: Path | None, bench: str, target: str, options: Options, entries: list[dict[str, Any]]) -> None:
    if json is None:
        return
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in _fields(options)}
    write_json(
        json,
        {"bench": bench, "target": target, **settings, "provenance": provenance(), "entries": entries},
    )


def _fields(options: Options) -> list[tuple[str, Any]]:
    return [(field.name, getattr(options, field.name)) for field in dataclasses.fields(options)]


def main(argv: list[str]) -> int:
    """Entry point of the verb."""
    verbs = {"decode": decode, "prefill": prefill, "rows": rows}
    tyro.extras.subcommand_cli_from_dict(
        verbs, args=argv, prog="flexmemory bench", description="Measure decoding, prompts or rows on this machine."
    )
    return 0
