"""`flexmemory tol plan CHECKPOINT --budget 800MB --calibration DATA`: how to write rows so that a store fits."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from jaxtyping import Int64
from torch import Tensor

from flexmemory.cli.tol import counts_of
from flexmemory.device import resolve_device
from flexmemory.engine.placement import parse_size
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.provenance import provenance
from flexmemory.tol.build import ModelRows
from flexmemory.tol.plan import LEAST_WINDOWS, Plan, make_plan, rise_to_json, save_plan
from flexmemory.tol.rise import HeldRows, Rise, measure_rise
from flexmemory.tol.sensitivity import cached_sensitivity
from flexmemory.tol.table import sensitivity_table
from flexmemory.tol.tune import tune
from flexmemory.train.data import TokenDataset

logger = logging.getLogger(__name__)


def plan(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    budget: str,
    calibration: Path,
    out: Path = Path("plan"),
    split: Literal["validation", "train"] = "train",
    tokens: int = 131_072,
    basis: bool | None = None,
    low_rank: tyro.conf.FlagCreatePairsOff[bool] = False,
    counts: Path | None = None,
    embedding: tyro.conf.FlagCreatePairsOff[bool] = False,
    measure_table: tyro.conf.FlagCreatePairsOff[bool] = False,
    cache: Path | None = None,
    tune_tokens: int = 0,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Choose how each layer's rows are written, by token frequency, so that a store of a size costs least quality.

    Half of the calibration text says what errors of rows cost, the other half measures what the plan costs.

    Args:
        checkpoint: A checkpoint or run folder of a memory or flex model.
        budget: Bytes of the store, as 800MB, 1.5GiB or 800000000.
        calibration: A folder that `flexmemory prepare` wrote with the model's tokenizer.
        out: The folder to make, for `flexmemory tol build --plan`.
        split: The split of the calibration text.
        tokens: How much of it to use, drawn evenly in windows of the model's longest sequence.
        basis: Whether layers have a basis; by default both ways are tried.
        low_rank: Write bf16 coefficients, and choose only how many.
        counts: Prepared text whose training split says how frequent tokens are; by default the calibration text's.
        embedding: Store each token's input embedding with its rows.
        measure_table: Measure what each codec costs in each layer too, beside the prediction.
        cache: Where sensitivities are kept; by default `sensitivity` in the checkpoint's folder.
        tune_tokens: Tune what codes are decoded with on so many further tokens of the calibration text.
        seed: Of windows, drawn next tokens and samples.
        device: cpu, cuda, cuda:1 ..., or auto: the GPU where there is one.
    """
    budget_bytes = parse_size(budget)
    if out.exists():
        raise FileExistsError(f"{out} already exists; choose another folder or remove it")
    opened = Checkpoint.open(checkpoint)
    if not opened.config.has_memory:
        raise ValueError("a dense model has no memory to plan for; ToL needs a memory or flex architecture")
    drawn = draw_windows(calibration, opened, split=split, tokens=tokens + tune_tokens, seed=seed)
    windows = drawn[: len(drawn) * tokens // (tokens + tune_tokens)]
    frequencies = counts_of(calibration if counts is None else counts, opened)
    chosen = resolve_device(device)
    model = opened.load(device=chosen, dtype=torch.float32).requires_grad_(False)
    half = len(windows) // 2
    sensitivity = cached_sensitivity(
        model,
        windows[:half, :-1],
        folder=opened.path / "sensitivity" if cache is None else cache,
        fingerprint=opened.fingerprint,
        seed=seed,
    )
    source = ModelRows(opened, device=chosen)
    made = make_plan(
        source,
        sensitivity,
        counts=frequencies,
        budget_bytes=budget_bytes,
        embedding=embedding,
        basis=basis,
        low_rank=low_rank,
        seed=seed,
        device=chosen,
    )
    if tune_tokens:
        tuned = tune(made.scheme, model, source, drawn[len(windows) :], seed=seed, device=chosen)
        made = dataclasses.replace(made, scheme=tuned)
    scheme = made.scheme
    rise = measure_rise(
        model,
        windows[half:],
        HeldRows(scheme, source, windows[half:, :-1].unique(), device=chosen),
        layers=scheme.layers,
        embedding=embedding,
    )
    table = sensitivity_table(
        source,
        sensitivity,
        counts=frequencies,
        model=model,
        windows=windows[half:] if measure_table else None,
        device=chosen,
    )
    extra: dict[str, Any] = {
        "budget": budget_bytes,
        "measured": rise_to_json(rise),
        "calibration": {
            "data": str(calibration),
            "split": split,
            "tokenizer_fingerprint": opened.tokenizer_fingerprint,
            "windows": len(windows),
            "window_tokens": windows.shape[1] - 1,
            "seed": seed,
        },
        "bytes_per_layer": layer_bytes(made),
        "table": table,
        "provenance": provenance(),
    }
    save_plan(out, made, opened, extra=extra)
    print(describe(out, made, rise, budget_bytes=budget_bytes))


def draw_windows(
    data: Path, checkpoint: Checkpoint, *, split: Literal["validation", "train"], tokens: int, seed: int
) -> Int64[Tensor, "B T"]:
    """Windows of a split, drawn without repeats, in the order of the draw; each has one token more than is read.

    Raises:
        ValueError: the data is of another tokenizer, lacks the split, or is too short.
    """
    dataset = TokenDataset.open(data)
    if dataset.tokenizer_fingerprint != checkpoint.tokenizer_fingerprint:
        raise ValueError(
            f"{data} was prepared with another tokenizer than {checkpoint.path} has; prepare the text with "
            "`--tokenizer` of the checkpoint"
        )
    stream = dataset.train if split == "train" else dataset.validation
    length = checkpoint.config.max_seq_len
    needed = LEAST_WINDOWS * length + 1
    available = 0 if stream is None else len(stream)
    if stream is None or min(tokens, available - 1) < needed - 1:
        raise ValueError(
            f"{data} ({split}, --tokens {tokens:,}) has {available:,} tokens of calibration text, of which "
            f"{min(tokens, available):,} may be used; an error bar needs {needed:,} at least"
        )
    total = stream.num_windows(length)
    drawn = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[: tokens // length].tolist()
    return torch.stack([torch.from_numpy(stream.window(number, seq_len=length)) for number in drawn])


def layer_bytes(plan: Plan) -> dict[str, int]:
    """Bytes of all tokens' slices of each layer, tensors apart."""
    scheme = plan.scheme
    found = {}
    for number, layer in enumerate(scheme.layers):
        codings = [(band.tokens, band.slices[scheme.embedding + number]) for band in scheme.bands]
        found[str(layer)] = sum(tokens * coding.nbytes for tokens, coding in codings if coding)
    return dict(sorted(found.items(), key=lambda item: int(item[0])))


def describe(out: Path, plan: Plan, rise: Rise, *, budget_bytes: int) -> str:
    """The text that `flexmemory tol plan` prints."""
    size = plan.size
    lines = [
        str(out),
        f"  bytes       {size.total:,} of {budget_bytes:,}: rows {size.rows:,}, "
        f"tensors {size.tensors:,}, order {size.order:,}",
        f"  perplexity  {rise.percent:+.3f} % +- {rise.percent_stderr:.3f} on {rise.tokens:,} tokens "
        f"(predicted {100 * plan.predicted:+.3f} %)",
        "  bits a number, by layer and band (the most frequent tokens first)",
    ]
    return "\n".join([*lines, *_bits(plan)])


def _bits(plan: Plan) -> Sequence[str]:
    scheme = plan.scheme
    rows: Mapping[int, str] = {
        layer: " ".join(
            f"{8 * coding.nbytes / scheme.hidden_size:6.2f}" if coding else "     -"
            for coding in (band.slices[scheme.embedding + number] for band in scheme.bands)
        )
        for number, layer in enumerate(scheme.layers)
    }
    return [f"    layer {layer:>3} {rows[layer]}" for layer in sorted(rows)]
