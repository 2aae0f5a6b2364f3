"""Perplexity and probes against their definitions."""

import math

import numpy as np
import pytest
import torch

from flexmemory.evaluate.perplexity import Perplexity, perplexity
from flexmemory.evaluate.probes import layer_alphas, scaled_ffn
from flexmemory.model.memory import ScaledRows
from flexmemory.model.transformer import Transformer
from tests.conftest import VARIED, random_model


def naive_nats(model: Transformer, stream: list[int], seq_len: int) -> list[list[float]]:
    """Token by token, each from its window's tokens before it."""
    windows: list[list[float]] = []
    with torch.no_grad():
        for position in range(1, len(stream)):
            start = (position - 1) // seq_len * seq_len
            logits = model(torch.tensor([stream[start:position]]))[0, -1]
            if start // seq_len == len(windows):
                windows.append([])
            windows[-1].append(-float(logits.log_softmax(dim=0)[stream[position]]))
    return windows


@pytest.mark.parametrize("length", [2, 9, 33, 41])
def test_equals_the_naive_sum(length):
    model = random_model(VARIED["nano-flex1"])
    stream = np.random.default_rng(0).integers(0, 512, length).astype(np.uint16)
    result = perplexity(model, stream, seq_len=8, batch_size=3, num_bytes=100, num_words=7)
    windows = naive_nats(model, stream.tolist(), 8)
    nats = sum(map(sum, windows))
    assert result.num_tokens == length - 1
    assert result.nats == pytest.approx(nats, rel=1e-9)
    assert result.perplexity == pytest.approx(math.exp(nats / (length - 1)), rel=1e-9)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / 100, rel=1e-9)
    assert result.word_perplexity == pytest.approx(math.exp(nats / 7), rel=1e-9)


def test_standard_error_of_equal_windows_is_that_of_their_means():
    model = random_model(VARIED["nano-base"])
    stream = np.random.default_rng(1).integers(0, 512, 81)
    result = perplexity(model, stream, seq_len=8)
    means = [np.mean(window) for window in naive_nats(model, stream.tolist(), 8)]
    assert result.stderr == pytest.approx(np.std(means, ddof=1) / math.sqrt(10), rel=1e-6)
    assert result.perplexity_stderr == pytest.approx(result.perplexity * result.stderr)
    assert math.isnan(perplexity(model, stream[:5], seq_len=8).stderr)


def test_unknown_sizes_give_no_figures():
    result = Perplexity(nats=3.0, num_tokens=2, stderr=0.1)
    assert result.bits_per_byte is None
    assert result.word_perplexity is None


@pytest.mark.parametrize(("length", "seq_len", "message"), [(1, 8, "at least 2 tokens"), (20, 65, "expected 1 to 64")])
def test_bad_streams(length, seq_len, message):
    with pytest.raises(ValueError, match=message):
        perplexity(random_model(VARIED["nano-base"]), np.zeros(length, dtype=np.int64), seq_len=seq_len)


def test_layer_alphas():
    assert layer_alphas(4, alpha=0.5, drop_layers=(1, 3)) == (0.5, 0.0, 0.5, 0.0)
    for bad in (-1, 4):
        with pytest.raises(ValueError, match=f"layer {bad} cannot be dropped: the model has layers 0 to 3"):
            layer_alphas(4, drop_layers=(bad,))


@pytest.mark.parametrize("name", ["nano-memory", "nano-flex2"])
def test_alphas_scale_rows(name, tokens):
    model = random_model(VARIED[name])
    ids = tokens(2, 10)
    alphas = layer_alphas(3, alpha=0.7, drop_layers=(1,))
    with torch.no_grad(), scaled_ffn(model, alphas) as source:
        assert source is not None
        assert torch.equal(model(ids, source(ids)), model(ids, ScaledRows(model.rows(ids), alphas)))


def test_alphas_scale_the_dense_ffn_and_leave_no_trace(tokens):
    model = random_model(VARIED["nano-base"])
    scaled = random_model(VARIED["nano-base"])
    ids = tokens(2, 10)
    alphas = (0.7, 0.0, 1.0)
    with torch.no_grad():
        for block, alpha in zip(scaled.blocks, alphas, strict=True):
            block.get_submodule("ffn").get_parameter("down.weight").mul_(alpha)
        before = model(ids)
        with scaled_ffn(model, alphas) as source:
            assert source is None
            torch.testing.assert_close(model(ids), scaled(ids), rtol=1e-12, atol=1e-12)
        assert torch.equal(model(ids), before)


@pytest.mark.parametrize("name", ["nano-base", "nano-memory", "nano-flex3"])
def test_a_scaled_model_scores_as_one_with_scaled_weights(name):
    """Those of the FFN or FFN-M; FFN-C keeps its own."""
    model, scaled = random_model(VARIED[name]), random_model(VARIED[name])
    stream = np.random.default_rng(0).integers(0, 512, 100)
    alphas = layer_alphas(3, alpha=0.6, drop_layers=(2,))
    down = "ffn.down.weight" if name == "nano-base" else "memory.ffn.down.weight"
    with torch.no_grad():
        for block, alpha in zip(scaled.blocks, alphas, strict=True):
            block.get_parameter(down).mul_(alpha)
    with scaled_ffn(model, alphas) as source:
        found = perplexity(model, stream, row_source=source).nats
    assert found == pytest.approx(perplexity(scaled, stream).nats, rel=1e-12)
    assert found != pytest.approx(perplexity(model, stream).nats, rel=1e-6)
    for count in (2, 4):
        with (
            pytest.raises(ValueError, match=f"a factor for each of 3 layers, got {count}"),
            scaled_ffn(model, [1.0] * count),
        ):
            pass
