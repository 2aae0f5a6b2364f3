"""`flexmemory convert llama | flex`: checkpoints of another kind as models of ours."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Annotated

import torch
import tyro

from flexmemory.cli.tol_plan import draw_windows
from flexmemory.config import TrainConfig
from flexmemory.convert.flex import convert
from flexmemory.convert.llama import convert_llama
from flexmemory.device import resolve_device
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.train.loop import train

RECIPE = TrainConfig(
    total_tokens=26_214_400, batch_tokens=131_072, lr=1e-3, lr_final=1e-4, warmup_steps=20, eval_every=50,
    save_every=200,
)  # fmt: skip
logger = logging.getLogger(__name__)


def llama(source: Annotated[Path, tyro.conf.Positional], /, *, out: Path) -> None:
    """Make a dense base of a Llama-family checkpoint of transformers, with the same logits.

    Args:
        source: A folder with config.json, safetensors and tokenizer.json.
        out: The checkpoint folder to make.
    """
    config = convert_llama(source, out)
    print(f"{out}: dense, L {config.num_layers}, D {config.hidden_size}, K {config.intermediate_size}")


def flex(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    data: Path,
    out: Path,
    flex_ratio: int = 3,
    calibration_tokens: int = 131_072,
    teacher: bool = True,
    device: str = "auto",
    recipe: Annotated[TrainConfig, tyro.conf.arg(name="")] = RECIPE,
) -> None:
    """Make a Flex-MemoryLLM (or with --flex-ratio 0 a MemoryLLM) of a dense model, and train it on from there.

    The FFN's cells are divided between FFN-M and FFN-C by how much they depend on the context, measured on text.

    Args:
        checkpoint: A checkpoint or run folder of a dense model.
        data: A folder that `flexmemory prepare` wrote with the model's tokenizer.
        out: The run's folder to make; its last checkpoint is the model.
        flex_ratio: b of Flex-MemoryLLM-b h^2: FFN-C gets b * D / 3 cells. 0 is a MemoryLLM.
        calibration_tokens: Text by which the cells are divided.
        teacher: Learn the dense model's predictions instead of the text's next tokens.
        device: cpu, cuda, cuda:1 ..., or auto: the GPU where there is one.
        recipe: The recipe of the training; sequences are no longer than the model's longest.
    """
    dense = Checkpoint.open(checkpoint)
    windows = draw_windows(data, dense, split="train", tokens=calibration_tokens, seed=recipe.seed)
    converted, fits = convert(
        dense.load(device=resolve_device(device), dtype=torch.float32), windows[:, :-1], flex_ratio=flex_ratio
    )
    for layer, fit in enumerate(fits):
        logger.info("layer %d: the token explains %.0f %% of what its FFN reads", layer, 100 * fit.explained)
    length = min(recipe.seq_len, dense.config.max_seq_len)
    result = train(
        converted.config,
        train_config=dataclasses.replace(recipe, seq_len=length),
        data=data,
        out=out,
        start=converted,
        teacher=dense if teacher else None,
        device=device,
        argv=["convert", "flex", str(checkpoint)],
    )
    print(f"{result.step} steps: loss {result.loss:.4f}, {result.checkpoint}")


def main(argv: list[str]) -> int:
    """Entry point of the verb."""
    tyro.extras.subcommand_cli_from_dict(
        {"llama": llama, "flex": flex}, args=argv, prog="flexmemory convert", description="Other models as ours."
    )
    return 0
