"""Serving until a signal, and stopping gracefully."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import stat
from collections.abc import Iterable
from pathlib import Path

import uvicorn

from flexmemory.serve.api import Served, create_app
from flexmemory.serve.guard import LOOPBACK
from flexmemory.serve.listening import address
from flexmemory.serve.scheduler import Scheduler

logger = logging.getLogger(__name__)
MIN_KEY = 16
"""Characters of an API key, at least."""
LAST_WORDS_S = 5
"""Seconds for errors of requests that were ended to reach their clients."""


def read_key(path: Path) -> str:
    """The API key that is all of a file but the white space around it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the key is too short, or could not stand in a header.
    """
    key = path.read_text(encoding="utf-8").strip()
    if len(key) < MIN_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"{path} should hold one API key of {MIN_KEY} or more printable ASCII characters, no spaces")
    if path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        logger.warning("warning: others can read %s; `chmod 600` it", path)
    return key


def serve(
    served: Served,
    scheduler: Scheduler,
    listening: socket.socket,
    *,
    api_key: str | None,
    max_body_bytes: int,
    grace_s: float,
) -> bool:
    """Serve until SIGTERM or SIGINT, then finish what runs within `grace_s`; a second signal does not wait.

    Returns:
        Whether it was a signal that ended it, not a failure of the engine.
    """
    host = listening.getsockname()[0]
    if host not in LOOPBACK:
        logger.warning(
            "warning: reachable from other machines, unencrypted%s; docs/serving.md says what to put before it",
            "" if api_key else " and without an API key (--api-key-file)",
        )

    def stop() -> None:
        server.force_exit = server.should_exit
        server.should_exit = True
        scheduler.stop(within_s=grace_s)

    def on_start() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop)
        logger.info("%s is served at %s/v1 (Ctrl+C ends it)", served.name, address(listening))

    hosts: Iterable[str] | None = LOOPBACK if host in LOOPBACK else None
    scheduler.on_failure = stop
    app = create_app(served, scheduler, hosts=hosts, api_key=api_key, max_body_bytes=max_body_bytes, on_start=on_start)
    config = uvicorn.Config(
        app, log_level="warning", ws="none", server_header=False, timeout_graceful_shutdown=int(grace_s) + LAST_WORDS_S
    )
    server = uvicorn.Server(config)
    server.run(sockets=[listening])
    return not scheduler.failed
