"""A dense model becomes a Flex-MemoryLLM with the same cells."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from flexmemory.convert.flex import convert, converted_config, fit_layers, start
from flexmemory.model.transformer import DenseBlock, FlexBlock, MemoryBlock
from tests.conftest import NANO, random_model


def windows(*, count: int = 40, length: int = 16) -> torch.Tensor:
    return torch.randint(512, (count, length), generator=torch.Generator().manual_seed(0))


def dense_block(model, layer: int) -> DenseBlock:
    block = model.blocks[layer]
    assert isinstance(block, DenseBlock)
    return block


def readings(model, layer: int, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q and n of all positions."""
    kept = []
    hook = dense_block(model, layer).ffn_norm.register_forward_hook(lambda _m, _x, output: kept.append(output))
    model(ids)
    hook.remove()
    embeddings = model.embed(ids).flatten(0, 1)
    return F.rms_norm(embeddings, (48,), eps=1e-5).detach(), kept[0].flatten(0, 1).detach()


def test_fits_are_those_of_least_squares():
    model, text = random_model(NANO["nano-base"]), windows()
    fits = fit_layers(model, text, batch_size=7)
    for layer, fit in enumerate(fits):
        q, n = readings(model, layer, text)
        solved = torch.linalg.lstsq(q, n).solution.T
        torch.testing.assert_close(fit.linear.double(), solved, rtol=0.05, atol=0.02)  # but for the ridge
        predicted = q @ fit.linear.double().T
        assert fit.explained == pytest.approx(float(1 - (n - predicted).square().sum() / n.square().sum()), abs=1e-4)
        ffn = dense_block(model, layer).ffn
        wrong = (ffn.coefficients(n) - ffn.coefficients(predicted)).detach()
        lengths = wrong.square().mean(0) * ffn.down.weight.detach().square().sum(0)
        torch.testing.assert_close(fit.errors.double(), lengths, rtol=1e-3, atol=1e-6)
    assert 0 < fits[2].explained < fits[0].explained < 1  # the context adds up


def test_cells_that_depend_on_the_context_go_to_ffn_c():
    model, text = random_model(NANO["nano-base"], dtype=torch.float32), windows()
    converted, fits = convert(model, text, flex_ratio=2)
    assert converted.config == converted_config(model.config, flex_ratio=2)
    assert converted.config.intermediate_size + converted.config.ffn_c_size == 128
    for layer, (block, fit) in enumerate(zip(converted.blocks, fits, strict=True)):
        assert isinstance(block, FlexBlock)
        assert block.memory is not None
        assert block.memory.ffn is not None
        worst = fit.errors.argsort(descending=True, stable=True)[: converted.config.ffn_c_size]
        old = dense_block(model, layer).ffn
        context = {tuple(value) for value in old.down.weight[:, worst].T.tolist()}
        assert {tuple(value) for value in block.ffn_c.down.weight.T.tolist()} == context
        everything = {tuple(value) for value in old.down.weight.T.tolist()}
        assert {tuple(value) for value in block.memory.ffn.down.weight.T.tolist()} == everything - context
        for name in ("attention.qkv.weight", "attention_norm.weight", "ffn_norm.weight"):
            assert torch.equal(block.get_parameter(name), model.blocks[layer].get_parameter(name))


def test_with_nothing_but_the_token_in_the_stream_the_converted_model_is_the_dense_one():
    """Attention off, one layer: what the FFN reads is a function of the token, and linear in q."""
    model = random_model(dataclasses.replace(NANO["nano-base"], num_layers=1))
    with torch.no_grad():
        dense_block(model, 0).attention.output.weight.zero_()
    text = windows()
    converted, fits = convert(model, text, flex_ratio=0)
    assert fits[0].explained == pytest.approx(1, abs=2e-3)
    assert isinstance(converted.blocks[0], MemoryBlock)
    expected, found = model(text).detach(), converted.double()(text).detach()
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def test_what_cannot_be_converted():
    with pytest.raises(ValueError, match="expected a dense model, got memory"):
        converted_config(NANO["nano-memory"], flex_ratio=1)
    with pytest.raises(ValueError, match="an FFN-C of 48 cells leaves none of 40"):
        converted_config(dataclasses.replace(NANO["nano-base"], intermediate_size=40), flex_ratio=3)
    with pytest.raises(ValueError, match="32 positions of text cannot fit 48 numbers"):
        fit_layers(random_model(NANO["nano-base"]), windows(count=2))


def test_starting_weights_are_whole():
    model = random_model(NANO["nano-base"], dtype=torch.bfloat16)
    converted = start(model, converted_config(model.config, flex_ratio=1), fit_layers(model, windows()))
    assert converted.dtype == torch.float32
    assert torch.equal(converted.get_parameter("embedding.weight"), model.get_parameter("embedding.weight").float())
    assert converted.head.weight is converted.get_parameter("embedding.weight")
    assert torch.isfinite(converted(windows())).all()
