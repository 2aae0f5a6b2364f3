"""Maps keep who is near whom, and are the same for the same seed."""

import sys

import pytest
import torch
from sklearn.decomposition import PCA

from flexmemory.interpret.projection import principal_components, tsne
from tests.interpret.test_clusters import groups


def test_components_are_those_of_scikit_learn():
    points, _ = groups(noise=1.0)
    points = points.double() + 50
    found = principal_components(points, count=6)
    expected = torch.from_numpy(PCA(6, svd_solver="full").fit_transform(points.numpy()))
    signs = (found * expected).sum(dim=0).sign()
    torch.testing.assert_close(found, expected * signs)
    assert torch.equal(found, principal_components(points, count=6))
    half = principal_components(points.half(), count=2)
    assert half.dtype == torch.float32


def test_a_map_keeps_groups_together_and_repeats():
    points, labels = groups(points=300)
    found = tsne(points, perplexity=20)
    assert found.shape == (300, 2)
    distances = torch.cdist(found, found).fill_diagonal_(torch.inf)
    assert (labels[distances.argmin(dim=1)] == labels).float().mean() > 0.97
    assert torch.equal(found, tsne(points, perplexity=20))


def test_what_cannot_be_mapped(monkeypatch):
    with pytest.raises(ValueError, match="perplexity 30 needs 91 points"):
        tsne(torch.randn(90, 5))
    with pytest.raises(ValueError, match="6 components of 90 points with 5 coordinates"):
        principal_components(torch.randn(90, 5), count=6)
    monkeypatch.setitem(sys.modules, "openTSNE", None)
    with pytest.raises(ImportError, match=r"flexmemory\[interpret\]"):
        tsne(torch.randn(100, 5))
