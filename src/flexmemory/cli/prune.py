"""`flexmemory prune CHECKPOINT --method sparsegpt --match RUN --calibration DATA --out DIR`: pruned dense models."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated

import torch
import tyro

from flexmemory.cli.tol_plan import draw_windows
from flexmemory.config import ModelConfig
from flexmemory.device import resolve_device
from flexmemory.evaluate.pruning import BLOCK_COLUMNS, DAMPING, Method, Modules, Pruned, Sparsity, prune, sparsity_for
from flexmemory.model.accounting import count_parameters
from flexmemory.model.checkpoint import Checkpoint, save_checkpoint
from flexmemory.presets import PRESETS, get_preset
from flexmemory.provenance import provenance
from flexmemory.storage import atomic_folder, write_json

RECORD = "pruning.json"


def prune_checkpoint(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    method: Method,
    out: Path,
    sparsity: float | None = None,
    match: str | None = None,
    pattern: str | None = None,
    modules: Modules = "all",
    calibration: Path | None = None,
    calibration_tokens: int = 262_144,
    batch_size: int = 8,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Write a dense checkpoint with most weights of its blocks at zero, in fp32 arithmetic and the stored dtype.

    Args:
        checkpoint: A checkpoint or run folder of a dense model.
        method: magnitude, wanda or sparsegpt (docs/pruning.md).
        out: The checkpoint folder to make; its pruning.json says how it was made.
        sparsity: The share of weights that go.
        match: A preset, checkpoint or run: as many go as leave its active parameters.
        pattern: As 2:4: in every four inputs of a row, two weights are left.
        modules: All matrices of the blocks, or the FFNs' alone.
        calibration: A folder that `flexmemory prepare` wrote with the model's tokenizer, for wanda and sparsegpt:
            windows are drawn from its training split.
        calibration_tokens: How much of it to use.
        batch_size: Windows in one pass.
        seed: Of the draw.
        device: cpu, cuda, cuda:1 ..., or auto: the GPU where there is one.
    """
    opened = Checkpoint.open(checkpoint)
    wanted = _sparsity(opened.config, sparsity=sparsity, match=match, pattern=pattern, modules=modules)
    text = windows = None
    if calibration is not None:
        windows = draw_windows(calibration, opened, split="train", tokens=calibration_tokens, seed=seed)[:, :-1]
        text = {"data": str(calibration), "windows": len(windows), "window_tokens": windows.shape[1], "seed": seed}
    with atomic_folder(out) as folder:
        model = opened.load(device=resolve_device(device), dtype=torch.float32)
        made = prune(model, method=method, sparsity=wanted, calibration=windows, modules=modules, batch_size=batch_size)
        record = {
            "checkpoint_fingerprint": opened.fingerprint,
            "method": method,
            "sparsity": wanted,
            "match": match,
            "modules": modules,
            "calibration": text,
            "damping": DAMPING if method == "sparsegpt" else None,
            "block_columns": BLOCK_COLUMNS if method == "sparsegpt" else None,
            **dataclasses.asdict(made),
            "provenance": provenance(),
        }
        write_json(folder / RECORD, record)
        save_checkpoint(
            folder, model.to(opened.stored_dtype()), opened.tokenizer() if opened.tokenizer_fingerprint else None
        )
    print(describe(out, made, opened.config, method=method))


def describe(out: Path, made: Pruned, config: ModelConfig, *, method: Method) -> str:
    """The text that `flexmemory prune` prints."""
    return "\n".join(
        [
            f"{out}: {method}",
            f"  zeros   {made.zeros:,} of {made.weights:,} weights ({made.zeros / made.weights:.2%})",
            f"  active  {made.active:,} of {count_parameters(config).backbone:,} parameters, embedding and head apart",
        ]
    )


def _sparsity(
    base: ModelConfig, *, sparsity: float | None, match: str | None, pattern: str | None, modules: Modules
) -> Sparsity:
    """How much goes, by the one option that is given."""
    if sum(option is not None for option in (sparsity, match, pattern)) != 1:
        raise ValueError("how much shall go? give one of --sparsity, --match and --pattern")
    if match is not None:
        is_preset = match in PRESETS or not Path(match).exists()
        other = get_preset(match).model if is_preset else Checkpoint.open(match).config
        return sparsity_for(base, count_parameters(other).active, modules=modules)
    if pattern is not None:
        numbers = re.fullmatch(r"(\d+):(\d+)", pattern)
        if numbers is None:
            raise ValueError(f"--pattern is n:m, such as 2:4, got {pattern!r}")
        return int(numbers[1]), int(numbers[2])
    assert sparsity is not None
    return sparsity


def main(argv: list[str]) -> int:
    """Entry point of the verb."""
    tyro.cli(prune_checkpoint, args=argv, prog="flexmemory prune")
    return 0
