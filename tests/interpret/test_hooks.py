"""Captures come from the real model, change no bit of it, and add up."""

import pytest
import torch

from flexmemory.interpret.hooks import hook_names, run_with_cache, run_with_hooks
from flexmemory.interpret.tkv import TokenMemory
from flexmemory.model.memory import ScaledRows
from tests.conftest import VARIED, random_model

NAMES = ["nano-base", "nano-memory", "nano-flex2", "square-1", "ffn+table", "table", "grouped-query"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_capturing_changes_no_bit_and_leaves_nothing_behind(name, dtype, tokens):
    model, ids = random_model(VARIED[name], dtype=dtype), tokens(2, 9)
    expected = model(ids)
    logits, cache = run_with_cache(model, ids)
    assert torch.equal(logits, expected)
    assert list(cache) == hook_names(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_captured_adds_up(name, tokens):
    model, ids = random_model(VARIED[name]), tokens(2, 9)
    logits, cache = run_with_cache(model, ids)
    parts, labels = cache.decompose_resid()
    stream, points = cache.accumulated_resid()
    last = model.config.num_layers - 1
    assert labels[0] == "embed"
    assert len(set(labels)) == len(labels)
    assert points[-1] == "final_post"
    torch.testing.assert_close(parts.sum(0), cache[f"blocks.{last}.hook_resid_post"])
    torch.testing.assert_close(stream[0], model.embed(ids))
    torch.testing.assert_close(stream[-1], parts.sum(0))
    torch.testing.assert_close(model.norm(stream[-1]), cache["ln_final.hook_normalized"])
    torch.testing.assert_close(model.head(cache["ln_final.hook_normalized"]), logits)


@pytest.mark.parametrize("name", ["nano-memory", "nano-flex1", "ffn+table"])
def test_cells_are_those_of_the_memory(name, tokens):
    model, ids = random_model(VARIED[name]), tokens(2, 9)
    memory = TokenMemory(model)
    _, cache = run_with_cache(model, ids)
    for layer in memory.layers:
        found = memory.activations(ids.flatten(), layer=layer)
        for cell, expected in (("pre", found.pre), ("pre_linear", found.pre_linear), ("post", found.post)):
            torch.testing.assert_close(cache[f"blocks.{layer}.mlp.hook_{cell}"].flatten(0, 1), expected)
        torch.testing.assert_close(
            cache[f"blocks.{layer}.hook_mlp_out"].flatten(0, 1), memory.rows(ids.flatten(), layer=layer)
        )


def test_only_what_is_asked_for_is_kept(tokens):
    model = random_model(VARIED["nano-memory"])
    _, cache = run_with_cache(model, tokens(1, 5), names=["blocks.1.hook_mlp_out"])
    assert list(cache) == ["blocks.1.hook_mlp_out"]
    _, cache = run_with_cache(model, tokens(1, 5), names=lambda name: name.endswith("hook_post"))
    assert list(cache) == [f"blocks.{layer}.mlp.hook_post" for layer in range(3)]
    with pytest.raises(KeyError, match="hook_embed was not kept"):
        cache["hook_embed"]


@pytest.mark.parametrize("name", ["nano-base", "nano-memory", "nano-flex1", "ffn+table"])
def test_a_hook_replaces_at_one_position(name, tokens):
    """A cell switched off at position 4 takes its value off the stream there."""
    model, ids = random_model(VARIED[name]), tokens(2, 9)
    model_values = TokenMemory(model).values(0)
    seen: dict[str, torch.Tensor] = {}

    def off(activation, name):
        seen["c"] = activation[0, 4, 6].clone()
        changed = activation.clone()
        changed[0, 4, 6] = 0
        return changed

    def keep(activation, name):
        seen[name] = activation

    out = "blocks.0.hook_mlp_out"
    before = run_with_cache(model, ids, names=[out])[1][out]
    logits = run_with_hooks(model, ids, [("blocks.0.mlp.hook_post", off), (out, keep)])
    difference = seen[out] - before
    torch.testing.assert_close(difference[0, 4], -seen["c"] * model_values[6])
    difference[0, 4] = 0
    assert difference.abs().max() < 1e-12
    expected = model(ids)
    torch.testing.assert_close(logits[1], expected[1])  # the other sequence
    torch.testing.assert_close(logits[0, :4], expected[0, :4])  # and what was before
    assert (logits[0, 4:] - expected[0, 4:]).abs().amax(dim=1).min() > 1e-4


@pytest.mark.parametrize("cell", ["pre", "pre_linear"])
def test_factors_of_the_coefficient_can_be_replaced(cell, tokens):
    model, ids = random_model(VARIED["nano-flex1"]), tokens(1, 6)
    kept: dict[str, torch.Tensor] = {}
    run_with_hooks(
        model,
        ids,
        [
            (f"blocks.1.mlp.hook_{cell}", lambda activation, _: activation * 2),
            ("blocks.1.mlp.hook_post", lambda activation, _: kept.update(post=activation)),
            ("blocks.1.hook_mlp_out", lambda activation, _: kept.update(row=activation)),
        ],
    )
    found = TokenMemory(model).activations(ids[0], layer=1)
    pre, linear = found.pre * (1 + (cell == "pre")), found.pre_linear * (1 + (cell == "pre_linear"))
    product = linear * torch.nn.functional.silu(pre)
    torch.testing.assert_close(kept["post"][0], product)
    torch.testing.assert_close(kept["row"][0], product @ TokenMemory(model).values(1))


def test_rows_that_are_given(tokens):
    model, ids = random_model(VARIED["nano-flex1"]), tokens(1, 6)
    scaled = ScaledRows(model.rows(ids), [0.5, 0.0, 1.0])
    logits, cache = run_with_cache(model, ids, rows=scaled)
    assert torch.equal(logits, model(ids, scaled))
    assert not [name for name in cache if ".mlp." in name]
    assert "blocks.1.hook_mlp_out" not in cache  # a dropped layer adds nothing
    with pytest.raises(ValueError, match="rows that are given have no cells"):
        run_with_hooks(model, ids, [("blocks.0.mlp.hook_post", lambda *_: None)], rows=scaled)


def test_bad_hooks(tokens):
    model, ids = random_model(VARIED["nano-memory"]), tokens(1, 6)
    with pytest.raises(ValueError, match=r"'blocks.0.mlp.hook_out'; there are blocks.L"):
        run_with_cache(model, ids, names=["blocks.0.mlp.hook_out"])
    with pytest.raises(ValueError, match="see hook_names"):
        run_with_hooks(model, ids, [("hook_out", lambda *_: None)])
    with pytest.raises(ValueError, match=r"a hook gave \[1, 6\], expected \[1, 6, "):
        run_with_hooks(model, ids, [("hook_embed", lambda activation, _: activation[..., 0])])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
