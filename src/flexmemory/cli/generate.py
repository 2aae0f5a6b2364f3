"""`flexmemory generate CHECKPOINT --prompt TEXT`: continue prompts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

from flexmemory.cli.model_options import ModelOptions
from flexmemory.engine.sampling import Sampling
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.tokenizer import until_stop


def run(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    options: Annotated[ModelOptions, tyro.conf.arg(name="")] = ModelOptions(),  # noqa: B008 - frozen
    max_tokens: int = 128,
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling(),  # noqa: B008 - frozen
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
) -> None:
    r"""Continue prompts with a trained model, all at once; the text streams to stdout, in the order of the prompts.

    Args:
        checkpoint: A checkpoint or run folder.
        prompt: Text to continue; may be given several times. Without it, a new document begins.
        options: How the model is loaded.
        max_tokens: Tokens to generate, at most.
        sampling: How to choose the next token.
        stop: End before this text appears; may be given several times.
    """
    if max_tokens < 1:
        raise ValueError(f"--max-tokens must be positive, got {max_tokens}")
    opened = Checkpoint.open(checkpoint)
    tokenizer = opened.tokenizer()
    texts = prompt or ("",)
    prompts = [[tokenizer.boundary_id, *tokenizer.encode(text)] for text in texts]
    longest = min(max(map(len, prompts)) + max_tokens, opened.config.max_seq_len)
    loaded = options.load(opened, sequences=len(prompts), length=longest)
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
