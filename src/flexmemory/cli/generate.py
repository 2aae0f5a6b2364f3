"""`flexmemory generate CHECKPOINT --prompt TEXT`: continue prompts."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from flexmemory.device import resolve_device
from flexmemory.engine.int8 import Int8Part
from flexmemory.engine.loading import DTYPES, RowPlace, load_model
from flexmemory.engine.placement import parse_size
from flexmemory.engine.sampling import Sampling
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.tokenizer import until_stop

logger = logging.getLogger(__name__)


def run(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    tol: Path | None = None,
    rows: RowPlace | None = None,
    keep_layers: int | None = None,
    memory_budget: str | None = None,
    host_budget: str | None = None,
    int8: Int8Part | None = None,
    max_tokens: int = 128,
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling(),  # noqa: B008 - frozen
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    device: str = "auto",
    dtype: Literal["auto", "fp32", "bf16"] = "auto",
) -> None:
    r"""Continue prompts with a trained model, all at once; the text streams to stdout, in the order of the prompts.

    Args:
        checkpoint: A checkpoint or run folder.
        prompt: Text to continue; may be given several times. Without it, a new document begins.
        tol: A ToL store built from the checkpoint: rows are looked up, and FFN-M weights are never loaded.
        rows: Where rows come from; by default as near as budgets allow, disk where none is given, and compute without
            --tol.
        keep_layers: Layers of each row to read, the first ones in the store's order; the others add nothing.
        memory_budget: Memory of the device to use, such as 2GiB: decides what lives where (docs/placement.md).
        host_budget: Host memory to use beside a GPU.
        int8: Weights to make int8: of the output head, or of all projections.
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
    texts = prompt or ("",)
    prompts = [[tokenizer.boundary_id, *tokenizer.encode(text)] for text in texts]
    longest = min(max(map(len, prompts)) + max_tokens, opened.config.max_seq_len)
    loaded = load_model(
        opened,
        tol=tol,
        rows=rows,
        keep_layers=keep_layers,
        device=place,
        dtype=DTYPES.get(name),
        int8=int8,
        memory_budget=None if memory_budget is None else parse_size(memory_budget),
        host_budget=None if host_budget is None else parse_size(host_budget),
        sequences=len(prompts),
        length=longest,
    )
    if loaded.placement is not None:
        logger.info("%s", loaded.placement.table())
    logger.info("%s", loaded.describe())
    engine = loaded.engine(max_sequences=len(prompts), max_length=longest)
    stop_ids = {tokenizer.boundary_id}
    requests = [engine.submit(ids, sampling=sampling, max_new_tokens=max_tokens, stop_ids=stop_ids) for ids in prompts]
    for text, request in zip(texts, requests, strict=True):
        sys.stdout.write(text)
        try:
            for piece in until_stop(tokenizer.decode_stream(engine.stream(request)), stop):
                sys.stdout.write(piece)
                sys.stdout.flush()
        finally:
            sys.stdout.write("\n")
        engine.cancel(request)  # it may go on beyond a stop


def main(argv: list[str]) -> int:
    """Entry point of the verb."""
    tyro.cli(run, args=argv, prog="flexmemory generate")
    return 0
