"""Classes of strings and our word lists, on the tokenizer of the models in this repository."""

import dataclasses
from pathlib import Path

import pytest
import torch

from flexmemory.interpret.labels import categories, surface_classes, word_lists
from flexmemory.interpret.vocabulary import Vocabulary
from flexmemory.tokenizer import Tokenizer
from tests.cli.conftest import REPOSITORY


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    tokenizer = Tokenizer.load(Path(REPOSITORY) / "models" / "mini-memory")
    return Vocabulary.of(tokenizer, vocab_size=8192)


def test_no_word_is_in_two_lists():
    words = [word for members in word_lists().values() for word in members]
    assert len(words) == len(set(words)) > 500
    assert all(word.isalpha() or word == "I" for word in words)


def test_categories_are_single_tokens_of_the_mask(vocabulary):
    found = categories(vocabulary)
    assert len(found) > 15
    assert [vocabulary.text[i] for i in found["months"]][:2] == [" January", " February"]
    assert min(map(len, found.values())) >= 5
    assert "US states" not in found  # three of them are tokens
    months = torch.tensor(found["months"])
    masked = dataclasses.replace(vocabulary, mask=vocabulary.mask.scatter(0, months[:6], value=False))
    assert "months" not in categories(masked)
    assert categories(masked, least=4)["months"] == months[6:].tolist()


@pytest.mark.parametrize(
    ("text", "space", "case", "suffix"),
    [
        (" January", "space", "capitalised", ""),
        (" officials", "space", "lower", "s"),
        (" clearly", "space", "lower", "ly"),
        (" king", "space", "lower", ""),  # no stem before -ing
        ("AL", "none", "capitals", ""),
        ("tion", "none", "lower", ""),  # a piece of a word
        (" ", "", "", ""),
        ("3", "", "", ""),
    ],
)
def test_surface_classes(vocabulary, text, space, case, suffix):
    classes = surface_classes(vocabulary)
    token = vocabulary.text.index(text)
    assert {name: each[token] for name, each in classes.items() if name != "kind"} == {
        "space": space, "case": case, "suffix": suffix,
    }  # fmt: skip
    assert classes["kind"] == list(vocabulary.kind)
