"""Pairs of tokens for the claim that similar tokens share keys, each with the pairs that it is compared with.

Same-category pairs could be near for reasons other than meaning: strings alike ("brother", "brothers"), tokens equally
frequent, both capitalised. So every pair says whether its strings are alike and its kinds the same, and every
same-category pair has partners of the same frequency, and of the same frequency and kind, outside the category.
Dimension key: P pairs, S of them of one category.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from flexmemory.interpret.vocabulary import Vocabulary

LEAST_EDITS = 3
"""Between strings that are not alike."""
STEM = 4
"""Letters: strings that begin with the same ones, or one of which begins with the other, share a stem."""
WINDOW = 25
"""Tokens next in frequency on either side, one of which is drawn."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PairSet:
    """All pairs of the tokens of some categories."""

    names: tuple[str, ...]
    """Categories."""
    first: Int64[Tensor, " P"]
    second: Int64[Tensor, " P"]
    """Token ids."""
    groups: Int64[Tensor, "P 2"]
    """Category of either."""
    dissimilar: Bool[Tensor, " P"]
    """Strings are 3 edits or more apart, and share no stem."""
    same_kind: Bool[Tensor, " P"]
    """As `Vocabulary.kind` has it: case, above all."""
    partners: dict[str, Int64[Tensor, " S"]]
    """For the pairs of one category: in place of `second` a token outside it that is `frequency`-matched, or
    matched in `frequency and kind`."""

    @property
    def same(self) -> Bool[Tensor, " P"]:
        """Whether both are of one category."""
        return self.groups[:, 0] == self.groups[:, 1]


def pair_set(vocabulary: Vocabulary, categories: dict[str, list[int]], *, seed: int = 0) -> PairSet:
    """All pairs of tokens of the categories, first and second in random order; partners are in the mask.

    Raises:
        ValueError: there are not two categories of two tokens, a token is in two or outside the mask, or tokens were
            not counted.
    """
    if len(categories) < 2 or min(map(len, categories.values())) < 2:
        raise ValueError("pairs need two categories or more, of two tokens or more each")
    tokens = torch.tensor([token for members in categories.values() for token in members])
    if len(tokens.unique()) < len(tokens):
        raise ValueError("a token is in two categories")
    if not vocabulary.mask[tokens].all():
        raise ValueError("a category has tokens outside the vocabulary's mask; labels.categories leaves them out")
    sizes = torch.tensor([len(members) for members in categories.values()])
    group = torch.arange(len(sizes)).repeat_interleave(sizes)
    generator = torch.Generator().manual_seed(seed)
    either = torch.combinations(torch.arange(len(tokens)), 2)  # (P, 2)
    turned = torch.rand(len(either), generator=generator) < 0.5
    either = torch.where(turned[:, None], either.flip(1), either)
    first, second, groups = tokens[either[:, 0]], tokens[either[:, 1]], group[either]
    strings = [text.strip().lower() for text in vocabulary.text]
    kinds = torch.tensor([sorted(set(vocabulary.kind)).index(kind) for kind in vocabulary.kind])
    unlike = [dissimilar(strings[a], strings[b]) for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    same = groups[:, 0] == groups[:, 1]
    of_token = torch.full((len(vocabulary),), -1).scatter(0, tokens, group)
    partners = {
        name: _partners(second[same], vocabulary=vocabulary, groups=of_token, classes=classes, generator=generator)
        for name, classes in (("frequency", torch.zeros_like(kinds)), ("frequency and kind", kinds))
    }
    return PairSet(
        names=tuple(categories),
        first=first,
        second=second,
        groups=groups,
        dissimilar=torch.tensor(unlike),
        same_kind=kinds[first] == kinds[second],
        partners=partners,
    )


def _partners(
    tokens: Tensor, *, vocabulary: Vocabulary, groups: Tensor, classes: Tensor, generator: torch.Generator
) -> Tensor:
    """For each token one of another category (or none), of its class and next to it in frequency."""
    if vocabulary.counts is None:
        raise ValueError("tokens of the same frequency need counts; give the vocabulary those of a text")
    order = vocabulary.counts.argsort(stable=True)
    order = order[vocabulary.mask[order]]
    windows: dict[int, Tensor] = {}
    drawn = []
    for token in tokens.tolist():
        if token not in windows:
            allowed = (groups[order] != groups[token]) & (classes[order] == classes[token])
            place = int((order == token).nonzero())
            below, above = order[:place][allowed[:place]], order[place:][allowed[place:]]
            windows[token] = torch.cat([below[-WINDOW:], above[:WINDOW]])
        window = windows[token]
        drawn.append(window[int(torch.randint(len(window), (1,), generator=generator))])
    return torch.stack(drawn)


def permute_alike(
    kinds: Sequence[str], counts: Int64[Tensor, " N"], *, seed: int, block: int = 50
) -> Int64[Tensor, " N"]:
    """A permutation (N,) of tokens among those of their kind and about their frequency.

    Whatever is said of tokens through it is said of others like them: what remains of a figure is due to kind and
    frequency alone (C3 and C5 at once).

    Args:
        kinds: Of each token.
        counts: Occurrences of each.
        seed: Of the permutation.
        block: So many of a kind, next to each other in frequency, change places.
    """
    generator = torch.Generator().manual_seed(seed)
    order = counts.argsort(stable=True)
    permutation = torch.arange(len(kinds))
    for kind in sorted(set(kinds)):
        members = order[torch.tensor([kinds[i] == kind for i in order.tolist()])]
        for places in members.split(block):
            permutation[places] = places[torch.randperm(len(places), generator=generator)]
    return permutation


def dissimilar(first: str, second: str) -> bool:
    """Whether two strings are `LEAST_EDITS` apart and share no stem.

    >>> dissimilar("brother", "brothers"), dissimilar("january", "february"), dissimilar("one", "seventeen")
    (False, True, True)
    """
    short = min(len(first), len(second), STEM)
    return first[:short] != second[:short] and edit_distance(first, second) >= LEAST_EDITS


@functools.lru_cache(maxsize=2**18)
def edit_distance(first: str, second: str) -> int:
    """Levenshtein's: insertions, deletions and substitutions."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        above, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    return row[-1]
