"""The intruder test finds planted clusters, and is at chance where labels or vectors mean nothing."""

import pytest
import torch
from torch.nn import functional as F

from flexmemory.interpret.intruders import CHANCE, draw_tests, intrusion, odd_ones
from flexmemory.interpret.pairs import permute_alike

SIZE, CLUSTERS = 2000, 40
KINDS = ["word" if i % 3 else "capitals" for i in range(SIZE)]
GENERATOR = torch.Generator().manual_seed(0)
COUNTS = torch.randint(1, 10_000, (SIZE,), generator=GENERATOR)
LABELS = torch.randint(CLUSTERS, (SIZE,), generator=GENERATOR)
PLANTED = torch.randn(CLUSTERS, 50, generator=GENERATOR)[LABELS] + 0.5 * torch.randn(SIZE, 50, generator=GENERATOR)


def accuracy(vectors: torch.Tensor, labels: torch.Tensor) -> tuple[float, float, float]:
    found = intrusion(vectors, draw_tests(labels, kinds=KINDS, counts=COUNTS, seed=1), resamples=200)
    return found.accuracy.low, found.accuracy.value, found.accuracy.high


def test_the_odd_one_is_that_of_a_slow_definition():
    vectors = torch.randn(30, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    tokens = torch.stack([torch.randperm(30, generator=torch.Generator().manual_seed(i))[:6] for i in range(20)])
    expected = []
    for row in tokens.tolist():
        means = [sum(F.cosine_similarity(vectors[a], vectors[b], dim=0).item() for b in row if b != a) / 5 for a in row]
        expected.append(means.index(min(means)))
    assert odd_ones(vectors, tokens).tolist() == expected
    assert len(set(expected)) > 2


def test_planted_clusters_are_found():
    low, value, high = accuracy(PLANTED, LABELS)
    assert 0.97 < low <= value <= high <= 1


def test_chance_is_one_in_six():
    """For a judge that knows nothing, and for labels that mean nothing."""
    random = torch.randn(SIZE, 50, generator=torch.Generator().manual_seed(4))
    low, value, high = accuracy(random, LABELS)
    assert low < CHANCE < high
    assert value == pytest.approx(CHANCE, abs=0.04)  # 800 tests: deviation 0.013
    permuted = LABELS[permute_alike(KINDS, COUNTS, seed=5)]
    assert not torch.equal(permuted, LABELS)
    assert accuracy(PLANTED, permuted)[1] == pytest.approx(CHANCE, abs=0.04)


def test_neither_kind_nor_frequency_gives_the_intruder_away():
    """A judge that knows these alone is at chance, even where clusters are mostly of one kind and frequency."""
    generator = torch.Generator().manual_seed(6)
    rank = COUNTS.argsort().argsort() / SIZE
    capitals = torch.tensor([kind == "capitals" for kind in KINDS])
    band = ((rank + 0.2 * torch.randn(SIZE, generator=generator)) * 5).long().clamp(0, 4)
    labels = band + 5 * (capitals ^ (torch.rand(SIZE, generator=generator) < 0.1))
    angle = 1.5 * rank + 3 * capitals
    judge = torch.stack([angle.cos(), angle.sin()], dim=1)
    tests = draw_tests(labels, kinds=KINDS, counts=COUNTS, tests=200)
    assert intrusion(judge, tests).accuracy.value == pytest.approx(CHANCE, abs=0.025)  # 2,000 tests: deviation 0.008
    unlike = draw_tests(labels, kinds=[""] * SIZE, counts=COUNTS, tests=200, window=SIZE)
    assert intrusion(judge, unlike).accuracy.value > 2 * CHANCE


def test_intruders_are_strangers_of_the_kind_of_a_member_and_near_in_frequency():
    labels = LABELS.clone()
    labels[::5] = -1
    labels[labels == 3] = -1
    labels[(labels == 4).nonzero()[:, 0][5:]] = -1  # five left, one too few
    tests = draw_tests(labels, kinds=KINDS, counts=COUNTS, tests=8, window=10, seed=2)
    found = tests.cluster.unique()
    assert found.tolist() == [i for i in range(CLUSTERS) if i not in (3, 4)]
    assert tests.cluster.bincount()[found].tolist() == [8] * len(found)
    rank = COUNTS.argsort().argsort()
    for row, cluster in zip(tests.tokens.tolist(), tests.cluster.tolist(), strict=True):
        *members, intruder = row
        assert len(set(members)) == 5
        assert (labels[members] == cluster).all()
        assert labels[intruder] not in (cluster, -1)
        own = (labels == cluster).nonzero()[:, 0].tolist()
        assert min(abs(int(rank[each] - rank[intruder])) for each in own if KINDS[each] == KINDS[intruder]) < 80
    again = draw_tests(labels, kinds=KINDS, counts=COUNTS, tests=8, window=10, seed=2)
    assert torch.equal(again.tokens, tests.tokens)


def test_a_cluster_that_holds_most_tokens_counts_by_them():
    """Half of the tokens, of all planted clusters, in one that means nothing; the others as they are."""
    labels = torch.where(torch.arange(SIZE) % 2 == 0, CLUSTERS, LABELS)
    tests = draw_tests(labels, kinds=KINDS, counts=COUNTS, tests=200)
    found = intrusion(PLANTED, tests, resamples=100)
    right = odd_ones(PLANTED, tests.tokens) == 5
    mixed = right[tests.cluster == CLUSTERS].float().mean().item()
    others = right[tests.cluster < CLUSTERS].float().mean().item()
    assert mixed < 0.3 < 0.95 < others
    assert found.accuracy.value == pytest.approx((mixed + CLUSTERS * others) / (CLUSTERS + 1), abs=0.01)
    assert found.by_token.value == pytest.approx((mixed + others) / 2, abs=0.01)


def test_a_member_without_strangers_of_its_kind_is_not_replaced():
    """All capitals are in one cluster: only its other members are replaced."""
    labels = torch.tensor([0 if kind == "capitals" else i % 4 for i, kind in enumerate(KINDS)])
    tests = draw_tests(labels, kinds=KINDS, counts=COUNTS)
    assert {KINDS[i] for i in tests.tokens[:, -1].tolist()} == {"word"}
    with pytest.raises(ValueError, match="make fewer clusters"):
        draw_tests(torch.arange(SIZE), kinds=KINDS, counts=COUNTS)


def test_a_permutation_keeps_kind_and_about_the_frequency():
    permutation = permute_alike(KINDS, COUNTS, seed=1, block=20)
    assert torch.equal(permutation.sort().values, torch.arange(SIZE))
    assert [KINDS[i] for i in permutation.tolist()] == KINDS
    assert (permutation != torch.arange(SIZE)).float().mean() > 0.9
    rank = COUNTS.argsort(stable=True).argsort()
    assert (rank[permutation] - rank).abs().max() < 120
