"""The `flexmemory` command: one module per verb, imported only when it is called.

Results go to stdout, progress and messages to stderr. Exit codes: 0 done, 1 the work failed, 2 a user's mistake, 128
and a signal's number where a signal stopped it.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback

from flexmemory import __version__
from flexmemory.config import nearest

VERBS = {
    "demo": "train three small models on this machine's text, build lookups, generate from disk",
    "info": "parameters, bytes and operations of a preset or checkpoint",
    "prepare": "turn text into token shards",
    "train": "train a preset on prepared data",
    "plot": "compare runs: loss by tokens, time and compute",
    "convert": "a Llama checkpoint as a dense base, a dense model as a Flex-MemoryLLM",
    "tol": "build, describe or verify token-wise lookups",
    "index": "list, for all tokens, which memory cells each uses and which use it",
    "explore": "see tokens, keys, maps and layers of a memory in a browser, and edit it",
    "edit": "change rows, values and keys of a memory by patches, and take that back",
    "generate": "continue a prompt",
    "serve": "an OpenAI-compatible server",
    "eval": "measure a checkpoint",
    "prune": "a dense checkpoint with fewer weights, to compare with",
    "reproduce": "the paper's tables and figures again, on models trained here",
    "export": "write a model for other runtimes (ONNX)",
    "push": "upload a checkpoint or lookups to the Hugging Face Hub",
    "bench": "time tokens, prompts or rows on this machine",
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb; a user's mistake is one sentence on stderr and exit code 2."""
    args = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in args
    args = [arg for arg in args if arg != "--traceback"]
    if args[:1] == ["--version"]:
        print(f"flexmemory {__version__}")
        return 0
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return 0 if args else 2
    if args[0] not in VERBS:
        return _fail(f"unknown verb {args[0]!r}{nearest(args[0], VERBS)}\n\n{_usage()}", code=2)
    is_main = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts, one speaks for all
    logging.basicConfig(level=logging.INFO if is_main else logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        return importlib.import_module(f"flexmemory.cli.{args[0]}").main(args[1:])
    except (ValueError, OSError, ImportError) as error:
        if show_traceback:
            traceback.print_exc()
        return _fail(str(error), code=2)
    except FloatingPointError as error:
        return _fail(str(error), code=1)
    except KeyboardInterrupt:
        return _fail("interrupted; run again, a command that makes a folder goes on where it was", code=130)


def _usage() -> str:
    verbs = "\n".join(f"  {name:<10}{text}" for name, text in VERBS.items())
    return f"usage: flexmemory VERB ... [--traceback]\n\n{verbs}\n\n`flexmemory VERB --help` tells more."


def _fail(message: str, *, code: int) -> int:
    print(f"flexmemory: error: {message}", file=sys.stderr)
    return code
