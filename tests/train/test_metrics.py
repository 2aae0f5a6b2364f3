"""Metrics: divergence is seen at its step, lines survive interruption."""

import json
import math

import pytest
import torch

from flexmemory.train.metrics import Meter, append_line, drop_after, read_lines
from flexmemory.train.step import StepValues


def fed(meter, losses, *, first=1, norm=1.0):
    for step, loss in enumerate(losses, start=first):
        meter.add(step, StepValues(torch.tensor([loss, loss / 2, norm]), 16))
    return meter


def test_means_since_the_last_time():
    meter = fed(Meter(margin=2.0), [4.0, 2.0])
    meter.collect()
    assert meter.take() == {"loss": 3.0, "ce": 1.5, "grad_norm": 1.0, "num_unique": 16.0}
    fed(meter, [1.0]).collect()
    assert meter.take()["loss"] == 1.0
    assert meter.smoothed == pytest.approx(0.9 * (0.9 * 4 + 0.1 * 2) + 0.1 * 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_first_step_that_is_not_finite_is_named(bad):
    with pytest.raises(FloatingPointError, match=f"step 3 is not finite: loss {bad}"):
        fed(Meter(margin=2.0), [4.0, 3.9, bad, bad]).collect()
    with pytest.raises(FloatingPointError, match=f"step 1 is not finite: loss 4.0, gradient norm {bad}"):
        fed(Meter(margin=2.0), [4.0], norm=bad).collect()


def test_divergence_is_smoothed_loss_above_its_best():
    fed(Meter(margin=1.0), [4.0, 13.0]).collect()
    with pytest.raises(
        FloatingPointError, match=r"diverged at step 3: loss 13.0000, its running mean 5.7100 .* 4.0000"
    ):
        fed(Meter(margin=1.0), [4.0, 13.0, 13.0]).collect()


def test_state_goes_on_exactly():
    meter = fed(Meter(margin=1.0), [4.0, 3.7, 3.1])
    meter.collect()
    copy = Meter(margin=1.0)
    copy.restore(json.loads(json.dumps(meter.state())))
    for each in (meter, copy):
        fed(each, [2.9, 2.3], first=4).collect()
    assert copy.state() == meter.state()
    assert copy.take() == meter.take()


def test_lines_after_a_step_and_half_lines_are_dropped(tmp_path):
    path = tmp_path / "lines.jsonl"
    drop_after(path, step=5)
    assert not path.exists()
    for step in range(1, 9):
        append_line(path, {"step": step, "text": "line\u2028separator é"})
    with path.open("a") as file:
        file.write('{"step": 9, "te')
    assert [line["step"] for line in read_lines(path)] == list(range(1, 9))
    drop_after(path, step=5)
    assert read_lines(path) == [{"step": step, "text": "line\u2028separator é"} for step in range(1, 6)]
