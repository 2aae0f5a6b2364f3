"""`flexmemory generate CHECKPOINT --prompt TEXT`: continue a prompt."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from flexmemory.device import resolve_device
from flexmemory.engine.engine import Engine
from flexmemory.engine.loading import DTYPES, RowPlace, load_model
from flexmemory.engine.sampling import Sampling
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.tokenizer import until_stop

logger = logging.getLogger(__name__)


def run(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    prompt: str = "",
    tol: Path | None = None,
    rows: RowPlace | None = None,
    max_tokens: int = 128,
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling(),  # noqa: B008 - frozen
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    device: str = "auto",
    dtype: Literal["auto", "fp32", "bf16"] = "auto",
) -> None:
    r"""Continue a prompt with a trained model; the text streams to stdout.

    Args:
        checkpoint: A checkpoint or run folder.
        prompt: Text to continue; without it, a new document begins.
        tol: A ToL store built from the checkpoint: rows are looked up, and FFN-M weights are never loaded.
        rows: Where rows come from; by default disk with --tol and compute without.
        max_tokens: Tokens to generate, at most.
        sampling: How to choose the next token.
        stop: End before this text appears; may be given several times.
        device: cpu, cuda, cuda:1 ..., or auto: the GPU where there is one.
        dtype: Of the computation; auto is bf16 on a GPU and the stored dtype on a CPU.
    """
    if max_tokens < 1:
        raise ValueError(f"--max-tokens must be positive, got {max_tokens}")
    place = resolve_device(device)
    opened = Checkpoint.open(checkpoint)
    tokenizer = opened.tokenizer()
    name = "bf16" if dtype == "auto" and place.type == "cuda" else dtype
    loaded = load_model(opened, tol=tol, rows=rows, device=place, dtype=DTYPES.get(name))
    logger.info("%s", loaded.describe())
    prompt_ids = [tokenizer.boundary_id, *tokenizer.encode(prompt)]
    longest = min(len(prompt_ids) + max_tokens, opened.config.max_seq_len)
    engine = Engine(loaded.model, row_source=loaded.row_source, max_length=longest)
    request = engine.submit(prompt_ids, sampling=sampling, max_new_tokens=max_tokens, stop_ids={tokenizer.boundary_id})
    sys.stdout.write(prompt)
    for piece in until_stop(tokenizer.decode_stream(engine.stream(request)), stop):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def main(argv: list[str]) -> int:
    """Entry point of the verb."""
    tyro.cli(run, args=argv, prog="flexmemory generate")
    return 0
