"""Small texts, and how tests of preparing look at folders."""

import json
import random
from pathlib import Path

import pytest

from flexmemory.storage import sha256_file
from flexmemory.train import prepare

WORDS = ["the", "fox", "crow", "miller", "river", "lantern", "bishop", "follows", "forgets", "answers", "naïve", "東京"]


def documents(count: int, *, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 60))) + ".\n" for _ in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in folder.iterdir()}


def take_small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of a few documents, pieces of a few lines, and a commit after every batch."""
    monkeypatch.setattr(prepare, "BATCH_CHARACTERS", 400)
    monkeypatch.setattr(prepare, "PIECE_CHARACTERS", 300)
    monkeypatch.setattr(prepare, "COMMIT_BYTES", 1)
