"""`flexmemory export onnx`: a model for runtimes that are not PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from flexmemory.export.onnx import GRAPH, export_onnx
from flexmemory.model.checkpoint import Checkpoint


def onnx(checkpoint: Annotated[Path, tyro.conf.Positional], /, *, out: Path) -> None:
    """Write an ONNX graph whose rows are an input, so that the table can stay on storage.

    Args:
        checkpoint: A checkpoint or run folder of a memory or flex model.
        out: The folder to make: the graph in fp32, its interface, and the tokenizer.
    """
    export_onnx(Checkpoint.open(checkpoint), out)
    size = sum(file.stat().st_size for file in out.glob(f"{GRAPH}*"))
    print(f"{out / GRAPH}: {size:,} bytes without FFN-M; rows are an input (examples/onnx_generate.py)")


def main(argv: list[str]) -> int:
    """Entry point of the verb."""
    tyro.extras.subcommand_cli_from_dict(
        {"onnx": onnx}, args=argv, prog="flexmemory export", description="Models for other runtimes."
    )
    return 0
