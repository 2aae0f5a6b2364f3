"""A tokenizer in which every name and object of SynthKB is one token, and facts made with it."""

import re

import pytest

from flexmemory.evaluate.facts import SynthKB
from flexmemory.evaluate.relations import ALIAS, GENERATION, RELATIONS, WARD
from flexmemory.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def names_tokenizer() -> Tokenizer:
    wordings = [text for each in RELATIONS for text in (each.prompt, *each.wordings, *each.objects)]
    words = set(re.findall(r"\w+", " ".join([*wordings, *WARD, *ALIAS, *GENERATION])))
    names = {f"{first}{vowel}{last}o" for first in "BDFGKLMN" for vowel in "aeiou" for last in "bdg"}
    return Tokenizer.train([" ".join(f" {word}" for word in sorted(words | names))] * 20, vocab_size=1400)


@pytest.fixture(scope="session")
def facts(names_tokenizer: Tokenizer) -> SynthKB:
    return SynthKB.make(names_tokenizer, num_facts=160, seed=3)
