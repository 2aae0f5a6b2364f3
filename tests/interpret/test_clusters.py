"""Clusters: found where there are some, the same for the same seed, and as scikit-learn has them."""

from typing import Any

import pytest
import sklearn.cluster
import torch
from sklearn.metrics import v_measure_score
from torch.nn import functional as F

from flexmemory.interpret.clusters import cluster_facts, kmeans, robust_scale

KMeans: Any = sklearn.cluster.KMeans  # its stubs know no array of centres


def groups(*, points: int = 400, keys: int = 24, count: int = 8, noise: float = 0.3, seed: int = 0):
    """Points around `count` centres, of which they are the labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(points) % count
    centres = torch.randn(count, keys, generator=generator)
    return centres[labels] + noise * torch.randn(points, keys, generator=generator), labels


@pytest.mark.parametrize("spherical", [False, True])
def test_real_groups_are_found(spherical):
    points, labels = groups()
    found = kmeans(points, count=8, restarts=5, spherical=spherical)
    assert v_measure_score(labels, found.labels) == pytest.approx(1.0)
    lengths = torch.logspace(-2, 2, len(points))[:, None]  # of no account on the sphere alone
    agrees = v_measure_score(labels, kmeans(points * lengths, count=8, restarts=5, spherical=spherical).labels)
    assert (agrees == pytest.approx(1.0)) == spherical


def test_from_the_same_centres_as_scikit_learn():
    points, _ = groups(noise=1.5, seed=3)  # no clear groups: every step counts
    points = points.double()
    found = kmeans(points, count=10, spherical=False, tolerance=0.0, iterations=100)
    again = KMeans(10, init=found.centres.numpy(), n_init=1, tol=0).fit(points.numpy())
    assert found.labels.tolist() == again.labels_.tolist()  # nothing is left to improve
    assert found.inertia == pytest.approx(again.inertia_)
    best = KMeans(10, n_init=20, random_state=0).fit(points.numpy())
    assert kmeans(points, count=10, spherical=False, restarts=10).inertia < 1.02 * best.inertia_


@pytest.mark.parametrize("spherical", [False, True])
def test_labels_centres_and_inertia_belong_together(spherical):
    points, _ = groups(noise=1.0)
    points = points.double()
    weights = torch.rand(len(points), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = kmeans(points, count=12, spherical=spherical, weights=weights, iterations=3, chunk_rows=64)
    scaled = F.normalize(points, dim=1) if spherical else points
    distances = torch.cdist(scaled, found.centres)
    assert torch.equal(distances.argmin(dim=1), found.labels)
    nearest = distances.min(dim=1).values.square()
    assert found.inertia == pytest.approx(((weights / weights.mean()) * nearest).sum().item())


@pytest.mark.parametrize("spherical", [False, True])
def test_weights_are_repetitions(spherical):
    points, _ = groups(points=120, noise=1.0)
    points = points.double()
    times = torch.arange(120) % 4  # some not at all
    repeated = points.repeat_interleave(times, dim=0)
    weighted = kmeans(points, count=6, weights=times.double(), spherical=spherical, tolerance=0.0, iterations=100)
    alone = KMeans(6, init=weighted.centres.numpy(), n_init=1, tol=0).fit(repeated.numpy())
    if spherical:  # centres that no update moves
        members = F.one_hot(weighted.labels, 6).double() * times[:, None]
        torch.testing.assert_close(F.normalize(members.T @ F.normalize(points, dim=1), dim=1), weighted.centres)
    else:
        assert alone.labels_.tolist() == weighted.labels.repeat_interleave(times).tolist()


def test_the_same_seed_gives_the_same_bits_and_chunks_change_rounding_only():
    points, _ = groups(noise=1.0)
    first, second = (kmeans(points, count=9, seed=4, restarts=2) for _ in range(2))
    assert torch.equal(first.labels, second.labels)
    assert torch.equal(first.centres, second.centres)
    torch.testing.assert_close(kmeans(points, count=9, seed=4, restarts=2, chunk_rows=37).centres, first.centres)
    assert not torch.equal(kmeans(points, count=9, seed=5).centres, first.centres)


def test_half_precision_points_are_computed_on_in_fp32():
    points, _ = groups()
    half = points.half()
    assert torch.equal(kmeans(half, count=8, seed=1).labels, kmeans(half.float(), count=8, seed=1).labels)


def test_no_cluster_is_empty_while_points_differ():
    points = torch.cat([torch.zeros(500, 4), 10 + torch.eye(4)]) + 1
    found = kmeans(points, count=5, spherical=False)
    assert found.labels.bincount(minlength=5).tolist().count(0) == 0
    assert found.inertia == pytest.approx(0, abs=1e-3)
    alike = kmeans(torch.ones(10, 3), count=4)  # nothing to tell apart: no error, and all else is defined
    assert alike.inertia == pytest.approx(0, abs=1e-5)
    assert cluster_facts(torch.ones(10, 3), alike).size.sum() == 10


def test_facts_are_those_of_the_members():
    points, _ = groups(noise=1.0)
    found = kmeans(points, count=7)
    facts = cluster_facts(points, found, medoids=5, chunk_rows=50)
    for cluster in range(7):
        members = (found.labels == cluster).nonzero().flatten()
        cosines = F.cosine_similarity(points[members], found.centres[cluster, None])
        assert facts.size[cluster] == len(members)
        assert facts.cohesion[cluster].item() == pytest.approx(cosines.mean().item(), rel=1e-5)
        assert facts.medoids[cluster] == members[cosines.argsort(descending=True)[:5]].tolist()


def test_robust_scaling():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(2000, 300, generator=generator)
    points[:, 0] = 3.0  # says nothing
    points[:, 1] = 100 + points[:, 1]
    points[:3, 2] = 1e6  # outliers
    scaled = robust_scale(points)
    assert not scaled[:, 0].any()
    torch.testing.assert_close(scaled[:, 1:].mean(dim=0), torch.zeros(299), atol=1e-4, rtol=0)
    torch.testing.assert_close(scaled[:, 1:].std(dim=0), torch.ones(299), atol=1e-2, rtol=0)
    assert scaled.abs().max() < 4
    column = points[:, 7].double()
    low, high = column.quantile(0.005, interpolation="lower"), column.quantile(0.995, interpolation="higher")
    expected = column.clamp(low, high)
    expected = (expected - expected.mean()) / expected.std(correction=0)
    torch.testing.assert_close(scaled[:, 7].double(), expected, atol=1e-5, rtol=1e-5)
    assert robust_scale(points.half()).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"count": 5}, r"5 clusters of 4 points"),
        ({"count": 0}, "0 clusters"),
        ({"count": 3, "weights": torch.tensor([1.0, 1, 0, 0])}, r"3 clusters of 2 points"),
        ({"count": 2, "weights": torch.tensor([1.0, -1, 0, 0])}, "weights are one finite number"),
        ({"count": 2, "restarts": 0}, "restarts is 0"),
    ],
)
def test_what_cannot_be_clustered(call, message):
    with pytest.raises(ValueError, match=message):
        kmeans(torch.eye(4), **call)


def test_points_that_are_not_finite():
    with pytest.raises(ValueError, match="NaN or infinity"):
        kmeans(torch.tensor([[1.0], [torch.nan]]), count=1)
    with pytest.raises(ValueError, match="clip is a share"):
        robust_scale(torch.eye(3), clip=0.5)
