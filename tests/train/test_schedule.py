"""Warm-up to the peak, cosine to the end."""

import pytest

from flexmemory.train.schedule import learning_rate
from tests.train.conftest import recipe


def test_rises_to_the_peak_and_falls_to_the_end():
    config = recipe(steps=20, warmup_steps=4, lr=1.0, lr_final=0.1)
    rates = [learning_rate(step, config=config) for step in range(1, 21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[11] == pytest.approx(0.55)
    assert rates[19] == pytest.approx(0.1)
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_no_warmup_and_nothing_but_warmup():
    config = recipe(steps=10, warmup_steps=0, lr=1.0, lr_final=0.0)
    assert learning_rate(5, config=config) == pytest.approx(0.5)
    assert 0.9 < learning_rate(1, config=config) < 1
    config = recipe(steps=10, warmup_steps=10, lr=1.0, lr_final=0.0)
    assert learning_rate(10, config=config) == 1.0
