"""Outliers: counts that are known, and those of a whole model against the matrix held at once."""

import math

import pytest
import torch

from flexmemory.interpret.outliers import Magnitudes, MagnitudeSums, OutlierCounts, count_outliers
from flexmemory.interpret.tkv import TokenMemory
from tests.conftest import VARIED, random_model


def test_known_counts():
    counts = OutlierCounts([2.0, 5.0])
    counts.update(torch.tensor([4, 9]), torch.tensor([[1.0, 1, 1, -1], [10, -3, 0, 0]]))
    counts.update(torch.tensor([2]), torch.zeros(1, 4))
    found = counts.result()
    assert found.token_ids.tolist() == [4, 9, 2]
    assert found.beyond.tolist() == [[0, 2, 0], [0, 1, 0]]
    assert found.half_energy.tolist() == [2, 1, 0]
    assert found.participation.tolist() == pytest.approx([4, 109**2 / (1e4 + 81), 0])


def test_every_layer_against_the_whole_matrix():
    memory = TokenMemory(random_model(VARIED["nano-memory"]))
    kept = torch.arange(0, 512, 3)
    magnitudes, counted = count_outliers(memory, token_ids=kept, progress=False)
    whole = torch.stack([memory.coefficients(kept, layer=layer) for layer in memory.layers])  # (L, N, K)
    overall = whole.abs().mean() + 6 * whole.abs().std(correction=0)
    assert Magnitudes.of_all(magnitudes).threshold == pytest.approx(overall.item())
    for coefficients, sizes, counts in zip(whole, magnitudes, counted, strict=True):
        size = coefficients.abs()
        own = size.mean() + 6 * size.std(correction=0)
        assert sizes.threshold == pytest.approx(own.item())
        assert counts.beyond[0].tolist() == (size > own).sum(dim=1).tolist()
        assert counts.beyond[1].tolist() == (size > overall).sum(dim=1).tolist()
        for row, half in zip(coefficients.square().tolist()[:20], counts.half_energy.tolist()[:20], strict=True):
            largest = sorted(row, reverse=True)
            assert sum(largest[:half]) >= sum(row) / 2 * (1 - 1e-12)
            assert sum(largest[: half - 1]) < sum(row) / 2
    assert sum(int(counts.beyond.sum()) for counts in counted) > 0


def test_light_tails_have_no_outliers_and_scale_does_not_matter():
    values = torch.rand(100, 50, generator=torch.Generator().manual_seed(0)) - 0.5
    shares = []
    for scale in (1.0, 1000.0):
        sums = MagnitudeSums()
        sums.update(torch.arange(100), values * scale)
        counts = OutlierCounts([sums.result().threshold])
        counts.update(torch.arange(100), values * scale)
        assert not counts.result().beyond.any()
        shares.append(counts.result().half_energy.double().mean().item())
    assert shares[0] == shares[1]
    assert math.isclose(sums.result().mean, (values.abs() * 1000).mean().item(), rel_tol=1e-5)


@pytest.mark.parametrize("reducer", [MagnitudeSums(), OutlierCounts([1.0])])
def test_a_pass_over_nothing(reducer):
    with pytest.raises(ValueError, match="no tokens"):
        reducer.result()
