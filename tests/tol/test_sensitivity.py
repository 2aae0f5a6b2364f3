import dataclasses

import pytest
import torch
from torch.nn import functional as F

from flexmemory.model.memory import MemoryRows
from flexmemory.tol.sensitivity import Sensitivity, cached_sensitivity, measure_sensitivity, reach_of
from tests.conftest import NANO, random_model

CONFIG = dataclasses.replace(NANO["nano-memory"], vocab_size=64)
L, D = CONFIG.num_layers, CONFIG.hidden_size


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG, dtype=torch.float32).requires_grad_(False)


@pytest.fixture(scope="module")
def windows():
    return torch.randint(64, (96, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def measured(model, windows):
    return measure_sensitivity(model, windows, batch_size=16)


def divergence(model, windows, errors):
    """Mean KL divergence of predictions when `errors` are added to all tokens' rows, and its gradient-free truth."""
    rows = model.compute_rows(torch.arange(64))
    before = model.head(model.hidden_states(windows, MemoryRows(rows, windows))).log_softmax(-1)
    after = model.head(model.hidden_states(windows, MemoryRows(rows + errors, windows))).log_softmax(-1)
    return F.kl_div(after, before, log_target=True, reduction="sum").item() / windows.numel()


@pytest.mark.parametrize("layers", [[0], [L - 1], range(L)])
def test_the_predicted_rise_is_the_measured_one(model, windows, measured, layers):
    errors = torch.zeros(64, L, D)
    generator = torch.Generator().manual_seed(2)
    for layer in layers:
        errors[:, layer] = 0.05 * torch.randn(64, D, generator=generator)
    share = torch.bincount(windows.flatten(), minlength=64) / windows.numel()
    predicted = float(measured.rise(errors, share))
    assert predicted == pytest.approx(divergence(model, windows, errors), rel=0.25)


def test_rise_is_the_quadratic_form(measured):
    errors = torch.randn(5, L, D, generator=torch.Generator().manual_seed(1))
    weights = torch.rand(5)
    joint = torch.zeros(L * D, L * D)
    for a in range(L):
        for b in range(a, L):
            joint[a * D : (a + 1) * D, b * D : (b + 1) * D] = measured.blocks[a, b - a]
            joint[b * D : (b + 1) * D, a * D : (a + 1) * D] = measured.blocks[a, b - a].T
    flat = errors.flatten(1)
    assert torch.linalg.eigvalsh(joint).min() > -1e-6
    expected = 0.5 * (weights * ((flat @ joint) * flat).sum(1)).sum()
    assert torch.allclose(measured.rise(errors, weights), expected, rtol=1e-4)


def test_feedback_leaves_the_least_cost(measured):
    back = measured.feedback(damping=1e-6)
    error = torch.randn(D, generator=torch.Generator().manual_seed(1))

    def cost(scale):
        errors = torch.zeros(1, L, D)
        errors[0, 0] = error
        for later, matrix in back.matrices[0].items():
            errors[0, later] = -scale * (matrix @ error)
        return float(measured.rise(errors, torch.ones(1)))

    assert cost(1.0) < min(cost(0.0), cost(0.8), cost(1.2))
    assert cost(1.0) == pytest.approx(0.5 * float(error @ back.cost[0] @ error), rel=0.02)


def test_token_squares_add_up_to_the_blocks(measured, windows):
    traces = measured.blocks[:, 0].diagonal(dim1=1, dim2=2).sum(1)
    assert torch.allclose(measured.token_squares.sum(0) / windows.numel(), traces, rtol=1e-4)
    assert measured.positions == windows.numel()


def test_reach_follows_from_memory():
    assert reach_of(24, 2048, memory_bytes=2 * 2**30) == 5
    assert reach_of(8, 256) == 8
    with pytest.raises(ValueError, match="Fisher blocks"):
        reach_of(24, 2048, memory_bytes=1000)


def test_a_short_reach_has_the_first_blocks(model, windows, measured):
    short = measure_sensitivity(model, windows, reach=1, batch_size=16)
    assert torch.equal(short.blocks[:, 0], measured.blocks[:, 0])
    assert short.feedback().matrices == {}


def test_what_was_measured_is_kept(model, windows, tmp_path, caplog):
    caplog.set_level("INFO")
    first = cached_sensitivity(model, windows[:4], folder=tmp_path / "kept", fingerprint="a")
    again = cached_sensitivity(model, windows[:4], folder=tmp_path / "kept", fingerprint="a")
    assert "sensitivity read from" in caplog.text
    for field in dataclasses.fields(Sensitivity):
        assert torch.equal(getattr(first, field.name), getattr(again, field.name))
    cached_sensitivity(model, windows[:4], folder=tmp_path / "kept", fingerprint="b")
    cached_sensitivity(model, windows[:5], folder=tmp_path / "kept", fingerprint="a")
    cached_sensitivity(model, windows[:4], folder=tmp_path / "kept", fingerprint="a", seed=1)
    assert len(list((tmp_path / "kept").glob("*.json"))) == 4


def test_damaged_figures_are_measured_again(model, windows, tmp_path, caplog):
    first = cached_sensitivity(model, windows[:4], folder=tmp_path, fingerprint="a")
    next(tmp_path.glob("*.safetensors")).write_bytes(b"nothing")
    again = cached_sensitivity(model, windows[:4], folder=tmp_path, fingerprint="a")
    assert "measuring again" in caplog.text
    assert torch.equal(first.blocks, again.blocks)
