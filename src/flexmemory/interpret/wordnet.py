"""Categories of meaning from WordNet: what a word mostly means, in one of its lexicographers' files (animal, motion).

Of WordNet's database only `cntlist.rev` is read: how often each sense of a word was tagged in text (WordNet 3.0: the
semantic concordances). It comes with WordNet and with Debian's package wordnet-base, in /usr/share/wordnet; nothing of
it is in this repository.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

from flexmemory.interpret.labels import LEAST_MEMBERS
from flexmemory.interpret.vocabulary import Vocabulary

FILE = "cntlist.rev"
CLEAR = 0.75
"""Share of a word's tagged occurrences that its category must hold."""
LEAST_LETTERS = 4
"""Of a word: tokens of fewer are mostly the beginnings of others."""
NAMES = (
    "adj.all", "adj.pert", "adv.all", "noun.Tops", "noun.act", "noun.animal", "noun.artifact", "noun.attribute",
    "noun.body", "noun.cognition", "noun.communication", "noun.event", "noun.feeling", "noun.food", "noun.group",
    "noun.location", "noun.motive", "noun.object", "noun.person", "noun.phenomenon", "noun.plant", "noun.possession",
    "noun.process", "noun.quantity", "noun.relation", "noun.shape", "noun.state", "noun.substance", "noun.time",
    "verb.body", "verb.change", "verb.cognition", "verb.communication", "verb.competition", "verb.consumption",
    "verb.contact", "verb.creation", "verb.emotion", "verb.motion", "verb.perception", "verb.possession",
    "verb.social", "verb.stative", "verb.weather", "adj.ppl",
)  # fmt: skip
"""Lexicographers' files by number (lexnames(5WN))."""
CATEGORIES = frozenset(name for name in NAMES if name.startswith(("noun.", "verb."))) - {"noun.Tops"}
"""Those that say something of meaning."""
WITH_NAMES = frozenset({"noun.group", "noun.location", "noun.object", "noun.person", "noun.time"})
"""Those in which a capitalised word may be: elsewhere it is mostly someone's name."""


def wordnet_words(folder: str | Path) -> dict[str, str]:
    """The category of each word of one that is clear; words are in lower case.

    Raises:
        FileNotFoundError: the folder has no WordNet database.
        ValueError: its file is not as expected.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"no WordNet in {folder}: expected {FILE}; Debian's package wordnet-base has it")
    tagged: dict[str, Counter[int]] = defaultdict(Counter)
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            sense, _, times = line.split()
            word, _, rest = sense.partition("%")
            tagged[word][int(rest.split(":")[1])] += int(times)
        except (ValueError, IndexError) as error:
            raise ValueError(
                f"{path}, line {number}: expected a sense, its number and its count, got {line!r}"
            ) from error
    found = {}
    for word, times in tagged.items():
        category, most = times.most_common(1)[0]
        if most >= CLEAR * times.total() and NAMES[category] in CATEGORIES and len(word) >= LEAST_LETTERS:
            found[word] = NAMES[category]
    return found


def wordnet_categories(
    vocabulary: Vocabulary, folder: str | Path, *, least: int = LEAST_MEMBERS
) -> dict[str, list[int]]:
    """Token ids by category, of tokens in the vocabulary's mask; those with fewer than `least` are left out.

    A word is the token with a space before it, in lower case; where there is none, in a category that may hold names,
    the capitalised one. Inflected forms have no category of their own. Errors as for `wordnet_words`.
    """
    ids = {text: i for i, text in enumerate(vocabulary.text) if vocabulary.mask[i]}
    found: dict[str, list[int]] = defaultdict(list)
    for word, category in sorted(wordnet_words(folder).items()):
        named = ids.get(f" {word.capitalize()}") if category in WITH_NAMES else None
        token = ids.get(f" {word}", named)
        if token is not None:
            found[category].append(token)
    return {name: found[name] for name in sorted(found) if len(found[name]) >= least}
