"""A folder of prepared text, as studies have it."""

from pathlib import Path

import pytest

from flexmemory.tokenizer import Tokenizer
from tests.train.conftest import encode, structured_text, write_prepared


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A study's folder with some 20,000 training tokens, 600 for validation and another text."""
    tokenizer = Tokenizer.train(structured_text(sentences=400, seed=0), vocab_size=300)

    def tokens(sentences: int, seed: int) -> list[list[int]]:
        return [encode(tokenizer, structured_text(sentences=sentences, seed=seed))]

    splits = {"train": tokens(2400, 0), "validation": tokens(64, 1)}
    write_prepared(tmp_path / "data" / "train", tokenizer=tokenizer, splits=splits)
    write_prepared(
        tmp_path / "data" / "wikitext", tokenizer=tokenizer, splits={"train": tokens(64, 2), "validation": [[]]}
    )
    return tmp_path
