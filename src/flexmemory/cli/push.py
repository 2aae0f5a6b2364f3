"""`flexmemory push FOLDER OWNER/NAME`: a checkpoint or a ToL store on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from flexmemory.hub import push as push_folder


def push(
    folder: Annotated[Path, tyro.conf.Positional],
    repo_id: Annotated[str, tyro.conf.Positional],
    /,
    *,
    private: tyro.conf.FlagCreatePairsOff[bool] = False,
    revision: str | None = None,
) -> None:
    """Check every byte, then upload, with a card where there is none. Log in first: `hf auth login`.

    Args:
        folder: A checkpoint, a run's folder (its newest checkpoint) or a ToL store.
        repo_id: OWNER/NAME on the hub; made if it does not exist.
        private: Whether a repository that is made is private.
        revision: A branch, by default the main one.
    """
    print(push_folder(folder, repo_id, private=private, revision=revision))


def main(argv: list[str]) -> int:
    """Entry point of the verb."""
    tyro.cli(push, args=argv, prog="flexmemory push")
    return 0
