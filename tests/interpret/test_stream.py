"""One pass in chunks gives what the whole matrix gives."""

import pytest
import torch

from flexmemory.interpret.stream import Gram, Histogram, Moments, TopKeys, TopTokens, enumerate_layer
from flexmemory.interpret.tkv import TokenMemory
from tests.conftest import VARIED, random_model


@pytest.fixture(scope="module")
def memory() -> TokenMemory:
    return TokenMemory(random_model(VARIED["nano-flex1"]))


@pytest.fixture(scope="module")
def matrix(memory) -> torch.Tensor:
    return memory.coefficients(torch.arange(512), layer=1)


@pytest.mark.parametrize("chunk", [512, 100, 3])
def test_lists(memory, matrix, chunk):
    mask = torch.rand(512, generator=torch.Generator().manual_seed(0)) > 0.3
    tokens, keys = TopTokens(7, mask=mask), TopKeys(5, value_norms=memory.value_norms(1))
    enumerate_layer(memory, layer=1, reducers=[tokens, keys], chunk_tokens=chunk)
    lists, kept = tokens.result(), mask.nonzero()[:, 0]
    for key in range(memory.num_keys):
        order = kept[matrix[kept, key].argsort(descending=True)]
        assert lists.positive_ids[key].tolist() == order[:7].tolist()
        assert lists.negative_ids[key].tolist() == order.flip(0)[:7].tolist()
        torch.testing.assert_close(lists.positive[key], matrix[order[:7], key])
        torch.testing.assert_close(lists.negative[key], matrix[order.flip(0)[:7], key])
    weights = matrix.abs() * memory.values(1).norm(dim=1)
    found = keys.result()
    assert found.token_ids.tolist() == list(range(512))
    assert torch.equal(found.keys, weights.argsort(dim=1, descending=True)[:, :5])
    torch.testing.assert_close(found.coefficients, matrix.gather(1, found.keys))


@pytest.mark.parametrize("chunk", [512, 100, 1])
def test_moments_histogram_and_gram(memory, matrix, chunk):
    low, high = matrix.amin(0), matrix.amax(0)
    weights = torch.rand(512, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moments, histogram, gram = Moments(), Histogram(low=low, high=high, bins=16), Gram(weights)
    enumerate_layer(memory, layer=1, reducers=[moments, histogram, gram], chunk_tokens=chunk, progress=False)
    found = moments.result()
    assert found.count == 512
    centred = matrix - matrix.mean(0)
    torch.testing.assert_close(found.mean, matrix.mean(0))
    torch.testing.assert_close(found.variance, matrix.var(0, correction=0))
    torch.testing.assert_close(found.kurtosis, (centred**4).mean(0) / (centred**2).mean(0) ** 2, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.minimum, low)
    torch.testing.assert_close(found.maximum, high)
    torch.testing.assert_close(gram.result(), sum(w * torch.outer(c, c) for w, c in zip(weights, matrix, strict=True)))
    counts = histogram.result()
    assert counts.sum(1).eq(512).all()
    for key in (0, 17):
        edges = torch.linspace(float(low[key]), float(high[key]), 17, dtype=torch.float64)
        inside = torch.bucketize(matrix[:, key].contiguous(), edges[1:-1], right=True)
        assert (counts[key] - torch.bincount(inside, minlength=16)).abs().sum() <= 2  # a value on an edge


def test_a_part_of_the_vocabulary(memory, matrix):
    chosen, tokens = torch.tensor([500, 3, 77]), TopTokens(10)
    enumerate_layer(memory, layer=1, reducers=[tokens], token_ids=chosen, chunk_tokens=2)
    assert sorted(tokens.result().positive_ids[4].tolist()) == [3, 77, 500]  # shorter than asked for
    assert tokens.result().positive[4, 0] == pytest.approx(float(matrix[chosen, 4].max()))


def test_constant_cells_have_no_kurtosis():
    moments, histogram = Moments(), Histogram(low=torch.zeros(1), high=torch.zeros(1), bins=4)
    for reducer in (moments, histogram):
        reducer.update(torch.arange(3), torch.zeros(3, 1))
    assert moments.result().kurtosis.tolist() == [0]
    assert histogram.result().tolist() == [[3, 0, 0, 0]]


@pytest.mark.parametrize("reducer", [TopTokens(3), TopKeys(3, value_norms=torch.ones(4)), Moments(), Gram()])
def test_nothing_was_given(reducer):
    with pytest.raises(ValueError, match="no tokens were given"):
        reducer.result()
