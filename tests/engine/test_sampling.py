"""Sampling draws from the distribution that its settings define."""

import pytest
import torch

from flexmemory.engine.sampling import Sampling, filter_logits, sample

LOGITS = torch.tensor([[2.0, 0.0, 1.0, -1.0], [0.0, 3.0, 3.5, 1.0]])


def test_greedy_takes_the_largest():
    assert sample(LOGITS, Sampling()).tolist() == [0, 2]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (Sampling(temperature=1.0), [[0, 1, 2, 3], [0, 1, 2, 3]]),
        (Sampling(temperature=1.0, top_k=2), [[0, 2], [1, 2]]),
        (Sampling(temperature=1.0, top_k=9), [[0, 1, 2, 3], [0, 1, 2, 3]]),
        (Sampling(temperature=1.0, top_p=0.6), [[0], [1, 2]]),  # largest probabilities: 0.64, and 0.58 + 0.35
        (Sampling(temperature=1.0, top_p=0.8), [[0, 2], [1, 2]]),
        (Sampling(temperature=1.0, top_p=1e-9), [[0], [2]]),
        (Sampling(temperature=1.0, top_k=1, top_p=0.99), [[0], [2]]),
    ],
)
def test_filters_keep_what_they_should(settings, kept):
    filtered = filter_logits(LOGITS, settings)
    assert [row.isfinite().nonzero().flatten().tolist() for row in filtered] == kept
    assert torch.equal(filtered[filtered.isfinite()], LOGITS[filtered.isfinite()])


def test_top_p_is_taken_at_the_temperature():
    """Hot: the nucleus of a flatter distribution is larger."""
    sizes = [
        int(filter_logits(LOGITS[:1], Sampling(temperature=t, top_p=0.8)).isfinite().sum()) for t in (0.5, 1.0, 8.0)
    ]
    assert sizes == [1, 2, 4]


def test_draws_follow_the_distribution():
    generator = torch.Generator().manual_seed(0)
    many = LOGITS[:1].expand(20_000, -1)
    drawn = sample(many, Sampling(temperature=2.0), generator)
    shares = drawn.bincount(minlength=4) / 20_000
    torch.testing.assert_close(shares, (LOGITS[0] / 2).softmax(dim=0), rtol=0, atol=0.02)


def test_seed_decides():
    def draw(seed):
        return sample(LOGITS.repeat(20, 1), Sampling(temperature=1.0), torch.Generator().manual_seed(seed)).tolist()

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_impossible_settings(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Sampling(**settings)
