"""Categories of WordNet's format, from a file made here."""

from pathlib import Path

import pytest
import torch

from flexmemory.interpret.vocabulary import Vocabulary
from flexmemory.interpret.wordnet import NAMES, wordnet_categories, wordnet_words
from flexmemory.tokenizer import Tokenizer
from tests.cli.conftest import REPOSITORY

LINES = """\
horse%1:05:00:: 1 30
horse%1:05:02:: 2 3
horse%1:06:00:: 3 1
play%1:10:01:: 1 10
play%2:33:00:: 1 12
large%3:00:00:: 1 50
three%5:00:00:cardinal:00 1 221
january%1:28:00:: 1 9
evening%1:28:00:: 1 31
london%1:15:00:: 1 13
john%1:05:00:: 1 4
food%1:03:00:: 1 20
cat%1:05:00:: 1 18
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "cntlist.rev").write_text(LINES)
    return tmp_path


def test_words_of_a_clear_category(folder):
    assert wordnet_words(folder) == {
        "horse": "noun.animal",
        "january": "noun.time",
        "evening": "noun.time",
        "london": "noun.location",
        "john": "noun.animal",
    }
    assert len(NAMES) == 45
    assert (NAMES[3], NAMES[28], NAMES[43]) == ("noun.Tops", "noun.time", "verb.weather")


def test_categories_are_single_tokens_of_the_mask(folder):
    tokenizer = Tokenizer.load(Path(REPOSITORY) / "models" / "mini-memory")
    vocabulary = Vocabulary.of(tokenizer, vocab_size=8192)
    found = wordnet_categories(vocabulary, folder, least=1)
    texts = {name: [vocabulary.text[i] for i in members] for name, members in found.items()}
    assert texts == {
        "noun.animal": [" horse"],  # John is capitalised: not the animal
        "noun.location": [" London"],
        "noun.time": [" evening", " January"],
    }
    assert list(wordnet_categories(vocabulary, folder, least=2)) == ["noun.time"]
    counts = torch.ones(8192, dtype=torch.int64)
    counts[found["noun.time"][0]] = 0
    masked = Vocabulary.of(tokenizer, vocab_size=8192, counts=counts)
    assert len(wordnet_categories(masked, folder, least=1)["noun.time"]) == 1


def test_what_is_no_wordnet(tmp_path):
    with pytest.raises(FileNotFoundError, match="wordnet-base has it"):
        wordnet_words(tmp_path)
    (tmp_path / "cntlist.rev").write_text("horse%1:05:00:: 1 30\nhorse 12\n")
    with pytest.raises(ValueError, match="line 2: expected a sense, its number and its count"):
        wordnet_words(tmp_path)
