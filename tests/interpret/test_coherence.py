"""Measures of coherence: against slow definitions and scikit-learn, and the traps that scaling and nulls are for."""

import itertools

import pytest
import torch
from sklearn.metrics import adjusted_rand_score, silhouette_samples, v_measure_score

from flexmemory.interpret.clusters import kmeans, robust_scale
from flexmemory.interpret.coherence import (
    MEASURES,
    Measurement,
    adjusted_rand,
    against_null,
    coherence,
    cos_gap,
    graph_coefficient,
    nearest,
    permute_columns,
    silhouette,
)

QUICK = Measurement(clusters=20, sample=400, neighbours=8)


def draw(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of a known kind, and of which group each is."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(1200, 128, generator=generator)
    labels = torch.arange(1200) % 20
    if kind == "shared mean":
        points += 3 * torch.randn(128, generator=generator)
    if kind in ("groups", "outliers"):
        points += torch.randn(20, 128, generator=generator)[labels]
    if kind == "outliers":
        heavy = torch.randn(1200, 2, generator=generator) / torch.rand(1200, 2, generator=generator).pow(0.7)
        points[:, :2] = 30 * heavy
    return points, labels


def within(points: torch.Tensor, labels: torch.Tensor) -> float:
    """The raw measure: mean cosine of pairs in a cluster."""
    directions = torch.nn.functional.normalize(points, dim=1)
    cosines = (directions @ directions.T).fill_diagonal_(0)
    same = (labels[:, None] == labels).float().fill_diagonal_(0)
    return ((cosines * same).sum() / same.sum()).item()


def test_a_shared_mean_is_no_cluster():
    """Trap 1: cosine within clusters is near 1 where there are none; the gap to all pairs is not."""
    points, _ = draw("shared mean")
    labels = kmeans(points, count=20, spherical=False).labels
    assert within(points, labels) > 0.85
    assert cos_gap(points, labels) < 0.02
    scaled, plain = robust_scale(points), robust_scale(draw("independent")[0])
    gaps = [cos_gap(each, kmeans(each, count=20, spherical=False).labels) for each in (scaled, plain)]
    assert gaps[0] == pytest.approx(gaps[1], abs=0.01)


def test_outlier_keys_raise_every_measure_and_hide_the_clusters():
    """Trap 2, and that scaling columns undoes it."""
    (clear, truth), (heavy, _) = draw("groups"), draw("outliers")
    labels = {name: kmeans(each, count=20, spherical=False, restarts=3).labels for name, each in (
        ("clear", clear), ("heavy", heavy), ("scaled", robust_scale(heavy)))}  # fmt: skip
    agreement = {name: v_measure_score(truth, each) for name, each in labels.items()}
    assert agreement["clear"] > 0.9
    assert agreement["heavy"] < 0.3
    assert agreement["scaled"] > 0.9
    measured = {name: coherence(each, measurement=QUICK) for name, each in (
        ("clear", clear), ("heavy", heavy), ("scaled", robust_scale(heavy)))}  # fmt: skip
    assert measured["heavy"].cos_gap > measured["clear"].cos_gap + 0.1
    assert measured["heavy"].evr > 0.9 > measured["clear"].evr
    assert measured["scaled"].cos_gap == pytest.approx(measured["clear"].cos_gap, abs=0.05)
    assert measured["scaled"].evr == pytest.approx(measured["clear"].evr, abs=0.05)


def test_against_the_null():
    """Independent points are as their null has it; groups are far from theirs in every measure."""
    independent = against_null(draw("independent")[0], measurement=QUICK)
    assert set(independent) == set(MEASURES)
    for name, each in independent.items():
        assert each.value == pytest.approx(each.null, abs=0.01), name
    for name, each in against_null(robust_scale(draw("groups")[0]), measurement=QUICK).items():
        assert each.z is not None
        assert each.z > 10, name
        assert each.value > each.null + 0.1, name
        assert each.null == pytest.approx(independent[name].null, abs=0.03), name


def test_permuted_columns_keep_their_values_and_lose_their_rows():
    points, _ = draw("groups")
    permuted = permute_columns(points, seed=3)
    assert torch.equal(permuted.sort(dim=0).values, points.sort(dim=0).values)
    assert not (permuted == points).all(dim=0).any()
    assert torch.equal(permuted, permute_columns(points, seed=3))
    assert not torch.equal(permuted, permute_columns(points, seed=4))
    order = [(points[:, column, None] == permuted[:, column]).int().argmax(dim=0) for column in (0, 1)]
    assert not torch.equal(order[0], order[1])  # each on its own


@pytest.mark.parametrize("weighted", [False, True])
def test_cos_gap_is_its_definition(weighted):
    points, _ = draw("groups")
    points, labels = points[:60].double(), torch.arange(60) % 7
    labels[0] = 7  # alone
    weights = torch.rand(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    weights = weights if weighted else torch.ones(60, dtype=torch.float64)
    gaps = []
    for i in range(60):

        def mean_cosine(others: list[int], i: int = i) -> float:
            shares = weights[others] / weights[others].sum()
            return (shares * torch.nn.functional.cosine_similarity(points[i, None], points[others])).sum().item()

        others = [j for j in range(60) if j != i]
        own = [j for j in others if labels[j] == labels[i]]
        gaps.append(mean_cosine(own) - mean_cosine(others) if own else 0.0)
    expected = (torch.tensor(gaps, dtype=torch.float64) * weights).sum() / weights.sum()
    found = cos_gap(points, labels, weights=weights if weighted else None)
    assert found == pytest.approx(expected.item())


def test_silhouette_is_that_of_scikit_learn():
    points, labels = draw("groups")
    points, labels = points[:200].double(), labels[:200] * 2  # numbers without a point too
    labels[0] = 41
    expected = torch.from_numpy(silhouette_samples(points.numpy(), labels.numpy())).double()
    assert silhouette(points, labels, sample=200) == pytest.approx(expected.mean().item(), abs=1e-5)
    chosen = torch.randperm(200, generator=torch.Generator().manual_seed(5))[:30]
    assert silhouette(points, labels, sample=30, seed=5) == pytest.approx(expected[chosen].mean().item(), abs=1e-5)


def test_evr_and_weights():
    points, _ = draw("groups")
    weights = torch.arange(1200) % 5 + 0.5
    found = coherence(points, measurement=QUICK, weights=weights)
    assert found.silhouette is None
    assert found.graph is None
    labels = [
        kmeans(points, count=20, spherical=False, weights=weights, seed=seed, iterations=25).labels for seed in (0, 1)
    ]

    def scatter(rows: torch.Tensor, of: torch.Tensor) -> float:
        mean = (rows * of[:, None]).sum(dim=0) / of.sum()
        return (of * (rows - mean).square().sum(dim=1)).sum().item()

    shares = []
    for each in labels:
        inside = sum(scatter(points[each == c], weights[each == c]) for c in range(20))
        shares.append(1 - inside / scatter(points, weights))
    assert found.evr == pytest.approx(sum(shares) / 2, abs=1e-3)
    assert found.stability == pytest.approx(adjusted_rand_score(*labels))
    assert adjusted_rand(labels[0], labels[0]) == 1
    assert adjusted_rand(torch.zeros(9).long(), torch.zeros(9).long()) == 1
    generator = torch.Generator().manual_seed(0)
    chance = adjusted_rand(*torch.randint(20, (2, 1200), generator=generator))
    assert chance == pytest.approx(0, abs=0.01)


def test_neighbours_and_their_graph():
    points, labels = draw("groups")
    points = points[:150]
    near = nearest(points, count=6)
    cosines = torch.nn.functional.cosine_similarity(points[:, None], points[None], dim=2).fill_diagonal_(-2)
    assert torch.equal(near, cosines.argsort(dim=1, descending=True)[:, :6])
    links = {frozenset((i, j)) for i, row in enumerate(near.tolist()) for j in row}
    shares = [sum(frozenset(pair) in links for pair in itertools.combinations(row, 2)) / 15 for row in near.tolist()]
    assert graph_coefficient(near) == pytest.approx(sum(shares) / 150)
    assert 0.1 < graph_coefficient(near) < 1
    cliques = torch.tensor([[j for j in range(5) if j != i] for i in range(5)])
    assert graph_coefficient(torch.cat([cliques, cliques + 5])) == 1
    assert (labels[nearest(draw("groups")[0], count=1)[:, 0]] == labels).float().mean() > 0.9


def test_what_cannot_be_measured():
    with pytest.raises(ValueError, match="two seeds"):
        Measurement(seeds=(0,))
    with pytest.raises(ValueError, match="two permutations"):
        against_null(torch.randn(50, 3), measurement=QUICK, permutations=1)
    with pytest.raises(ValueError, match="5 neighbours of each of 5 points"):
        nearest(torch.eye(5), count=5)
