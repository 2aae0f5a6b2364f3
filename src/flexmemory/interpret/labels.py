"""What tokens have in common apart from any model: classes of the string, and categories of meaning.

The categories are short word lists of our own (`word_lists.json`). A word belongs to its category as the token that
has a space before it, and only if it is one token.
"""

from __future__ import annotations

import functools
from pathlib import Path

from flexmemory.interpret.vocabulary import Vocabulary
from flexmemory.storage import read_json

LEAST_MEMBERS = 5
"""Of a category, in a vocabulary; smaller ones are left out."""
SUFFIXES = (
    "tion", "sion", "ment", "ness", "ship", "able", "ible", "ance", "ence", "less", "ward", "ing", "ity", "ous", "ive",
    "ful", "ism", "ist", "est", "ed", "ly", "er", "or", "al", "ic", "en", "s",
)  # fmt: skip
"""Longest first."""
LEAST_STEM = 3
"""Letters before a suffix."""


@functools.cache
def word_lists() -> dict[str, tuple[str, ...]]:
    """Words by category; no word is in two."""
    lists = read_json(Path(__file__).with_name("word_lists.json"))["categories"]
    return {name: tuple(words) for name, words in lists.items()}


def categories(vocabulary: Vocabulary, *, least: int = LEAST_MEMBERS) -> dict[str, list[int]]:
    """Token ids by category, of tokens in the vocabulary's mask; those with fewer than `least` are left out."""
    ids = {text: i for i, text in enumerate(vocabulary.text) if vocabulary.mask[i]}
    found = {name: [ids[f" {word}"] for word in words if f" {word}" in ids] for name, words in word_lists().items()}
    return {name: members for name, members in found.items() if len(members) >= least}


def surface_classes(vocabulary: Vocabulary) -> dict[str, list[str]]:
    """Classes of every token by its string alone, "" where a class means nothing.

    `kind` as the vocabulary has it; `space` before the letters or not; `case`; `suffix` of words of one token.
    """
    letters = [text.strip() if text.strip().isalpha() else "" for text in vocabulary.text]
    spaced = [text.startswith(" ") for text in vocabulary.text]
    return {
        "kind": list(vocabulary.kind),
        "space": [("space" if has else "none") if body else "" for body, has in zip(letters, spaced, strict=True)],
        "case": [_case(body) for body in letters],
        "suffix": [_suffix(body) if has else "" for body, has in zip(letters, spaced, strict=True)],
    }


def _case(body: str) -> str:
    if len(body) < 2:
        return ""
    if body.isupper():
        return "capitals"
    if body.islower():
        return "lower"
    return "capitalised" if body[0].isupper() and body[1:].islower() else ""


def _suffix(body: str) -> str:
    word = body.lower()
    return next((each for each in SUFFIXES if word.endswith(each) and len(word) >= len(each) + LEAST_STEM), "")
