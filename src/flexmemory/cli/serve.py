"""`flexmemory serve CHECKPOINT`: an OpenAI-compatible server."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated

import tyro

from flexmemory.cli.model_options import ModelOptions
from flexmemory.model.checkpoint import Checkpoint


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What requests may take."""

    max_sequences: int = 8
    """Sequences that run at once; each has its part of the KV cache."""
    max_tokens: int | None = None
    """Longest sequence, prompt and new tokens together; the model's by default."""
    queue: int = 64
    """Sequences that may wait; more are answered 429."""
    timeout: float = 300.0
    """Seconds that a request may take, waiting included."""
    max_body: int = 1 << 20
    """Bytes of a request."""
    grace: float = 30.0
    """Seconds for running requests to finish after SIGTERM."""

    def __post_init__(self) -> None:
        """Reject impossible limits."""
        positive = {"max-sequences": self.max_sequences, "timeout": self.timeout, "max-body": self.max_body}
        for name, value in positive.items():
            if not value > 0:
                raise ValueError(f"--{name} must be positive, got {value}")
        for name, value in {"queue": self.queue, "grace": self.grace}.items():
            if not value >= 0:
                raise ValueError(f"--{name} must not be negative, got {value}")


def run(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    options: Annotated[ModelOptions, tyro.conf.arg(name="")] = ModelOptions(),  # noqa: B008 - frozen
    limits: Annotated[Limits, tyro.conf.arg(name="")] = Limits(),
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    api_key_file: Path | None = None,
) -> bool:
    """Serve a model to clients of OpenAI's completions and chats (docs/serving.md).

    Args:
        checkpoint: A checkpoint or run folder.
        options: How the model is loaded.
        limits: What requests may take.
        host: Address to listen at; others than of this machine alone should have an API key and TLS before it.
        port: 0 takes a free one.
        name: Of the model, for clients; the folder's by default.
        api_key_file: A file with the key that clients have to send.
    """
    try:
        from flexmemory.serve import server
        from flexmemory.serve.api import Served
        from flexmemory.serve.chat import ChatTemplate
        from flexmemory.serve.listening import listen
        from flexmemory.serve.scheduler import Scheduler
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is missing: pip install 'flexmemory[serve]'") from error
    opened = Checkpoint.open(checkpoint)
    tokenizer = opened.tokenizer()
    template = ChatTemplate.load(opened.path, tokenizer)
    api_key = None if api_key_file is None else server.read_key(api_key_file)
    length = limits.max_tokens or opened.config.max_seq_len
    with listen(host, port) as listening:
        loaded = options.load(opened, sequences=limits.max_sequences, length=length)
        engine = loaded.engine(max_sequences=limits.max_sequences, max_length=length)
        served = Served(
            name=name or checkpoint.resolve().name,
            fingerprint=opened.fingerprint,
            tokenizer=tokenizer,
            vocab_size=opened.config.vocab_size,
            template=template,
            created=int(time.time()),
        )
        scheduler = Scheduler(engine, slots=limits.max_sequences, waiting=limits.queue, timeout_s=limits.timeout)
        return server.serve(
            served,
            scheduler,
            listening,
            api_key=api_key,
            max_body_bytes=limits.max_body,
            grace_s=limits.grace,
        )


def main(argv: list[str]) -> int:
    """Entry point of the verb."""
    return 0 if tyro.cli(run, args=argv, prog="flexmemory serve") else 1
