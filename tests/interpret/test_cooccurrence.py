"""The judge's vectors: counts and PMI against slow definitions, and words of like surroundings near each other."""

import math

import pytest
import torch
from torch.nn import functional as F

from flexmemory.interpret import cooccurrence
from flexmemory.interpret.cooccurrence import cooccurrence_vectors, cooccurrences, ppmi


def slow_counts(tokens: list[int], *, vocab_size: int, boundary: int, window: int, contexts: list[int]) -> torch.Tensor:
    counts = torch.zeros(vocab_size, len(contexts), dtype=torch.int32)
    for i, word in enumerate(tokens):
        for j in range(max(0, i - window), min(len(tokens), i + window + 1)):
            between = tokens[min(i, j) + 1 : max(i, j) + 1]
            if i != j and boundary not in between and tokens[j] in contexts:
                counts[word, contexts.index(tokens[j])] += 1
    return counts


@pytest.mark.parametrize("chunk", [7, 2**20])
def test_counts_are_those_of_all_pairs(monkeypatch, chunk):
    monkeypatch.setattr(cooccurrence, "CHUNK_TOKENS", chunk)
    tokens = torch.randint(9, (60,), generator=torch.Generator().manual_seed(0))
    contexts = [0, 2, 3, 7]
    found = cooccurrences(tokens, vocab_size=11, boundary_id=0, window=3, contexts=torch.tensor(contexts))
    expected = slow_counts(tokens.tolist(), vocab_size=11, boundary=0, window=3, contexts=contexts)
    assert torch.equal(found, expected)
    assert expected.sum() > 50
    assert not found[10].any()  # not in the text


def test_a_text_shorter_than_the_window_has_its_pairs():
    found = cooccurrences(torch.tensor([1, 2]), vocab_size=3, boundary_id=0, window=5, contexts=torch.arange(3))
    assert found.tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0]]


def test_ppmi_is_that_of_its_definition():
    counts = torch.randint(6, (7, 5), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    counts[3] = 0
    found = ppmi(counts, smoothing=0.75)
    total = counts.sum().item()
    powers = [counts[:, j].sum().item() ** 0.75 for j in range(5)]
    for i in range(7):
        for j in range(5):
            both, word = counts[i, j].item() / total, counts[i].sum().item() / total
            chance = word * powers[j] / sum(powers)
            expected = max(0.0, math.log(both / chance)) if both else 0.0
            assert found[i, j].item() == pytest.approx(expected, rel=1e-5)


def test_words_of_like_surroundings_are_alike():
    """Tokens 1 to 4 stand before 9, tokens 5 to 8 before 10; within either group nothing tells them apart."""
    generator = torch.Generator().manual_seed(2)
    group = torch.rand(4000, generator=generator) < 0.5
    word = torch.randint(1, 5, (4000,), generator=generator) + 4 * group
    tokens = torch.stack([torch.zeros(4000, dtype=torch.int64), word, 9 + group.long()], dim=1).flatten()
    vectors = cooccurrence_vectors(tokens, vocab_size=12, boundary_id=0, window=1, dimensions=3, seed=1)
    assert vectors.shape == (12, 3)
    directions = F.normalize(vectors, dim=1)
    cosines = directions[1:9] @ directions[1:9].T
    assert min(cosines[:4, :4].min(), cosines[4:, 4:].min()) > 0.9 > 0.7 > cosines[:4, 4:].max()
    assert not vectors[11].any()
    state = torch.random.get_rng_state()
    again = cooccurrence_vectors(tokens, vocab_size=12, boundary_id=0, window=1, dimensions=3, seed=1)
    assert torch.equal(again, vectors)
    assert torch.equal(torch.random.get_rng_state(), state)
