"""Invariants of the one forward pass: context-free rows, causality, unique ids, caches, dtypes."""

import dataclasses

import pytest
import torch

from flexmemory.model.init import INIT_STD, new_model
from flexmemory.model.kv_cache import KVCache
from flexmemory.model.memory import MemoryRows, ScaledRows
from flexmemory.model.transformer import Transformer
from tests.conftest import NANO, VARIED, WITH_MEMORY, random_model


def gathered(model, rows):
    return torch.stack([rows.layer(layer) for layer in range(model.config.num_layers)], dim=2)  # (B, T, L, D)


def per_position_rows(model: Transformer, ids: torch.Tensor) -> MemoryRows:
    """FFN-M on every position, no id shared."""
    return MemoryRows(model.compute_rows(ids.flatten()), torch.arange(ids.numel()).view(ids.shape))


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_rows_do_not_depend_on_context(name, tokens):
    model = random_model(WITH_MEMORY[name])
    ids, other = tokens(2, 12), tokens(2, 12, seed=1)
    other[:, 5] = ids[:, 5]
    with torch.no_grad():
        here = gathered(model, model.rows(ids))[:, 5]
        there = gathered(model, model.rows(other))[:, 5]
        alone = model.compute_rows(ids[:, 5])
    torch.testing.assert_close(here, there, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(here, alone, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", VARIED)
def test_changing_a_token_changes_no_earlier_logit(name, tokens):
    model = random_model(VARIED[name])
    ids = tokens(2, 20)
    changed = ids.clone()
    changed[:, 13] = (changed[:, 13] + 7) % model.config.vocab_size
    with torch.no_grad():
        before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :13], after[:, :13], rtol=1e-12, atol=1e-12)
    assert (before[:, 13:] - after[:, 13:]).abs().amax(dim=(0, 2)).min() > 1e-6


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_unique_ids_give_the_loss_and_gradients_of_every_position(name, tokens):
    model = random_model(WITH_MEMORY[name])
    ids, targets = tokens(3, 24, vocab_size=40), tokens(3, 24, seed=2)  # many repeats

    def loss_and_gradients(rows):
        model.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(ids, rows).flatten(0, 1), targets.flatten())
        loss.backward()
        return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}

    unique_loss, unique = loss_and_gradients(model.rows(ids))
    loss, everywhere = loss_and_gradients(per_position_rows(model, ids))
    torch.testing.assert_close(unique_loss, loss, rtol=1e-12, atol=0)
    assert unique.keys() == everywhere.keys()
    for name, gradient in everywhere.items():
        torch.testing.assert_close(unique[name], gradient, rtol=1e-9, atol=1e-13, msg=name)


def test_rows_are_computed_on_unique_ids_only(tokens, monkeypatch):
    model = random_model(NANO["nano-flex2"])
    ids = tokens(4, 30, vocab_size=17)
    seen = []
    compute = model.compute_rows
    monkeypatch.setattr(model, "compute_rows", lambda token_ids: seen.append(token_ids) or compute(token_ids))
    model(ids)
    assert [token_ids.tolist() for token_ids in seen] == [sorted(set(ids.flatten().tolist()))]


@pytest.mark.parametrize("name", VARIED)
@pytest.mark.parametrize("pieces", [(1,) * 20, (7, 13), (12, 1, 1, 6)])
def test_cached_pieces_equal_one_forward(name, pieces, tokens):
    model = random_model(VARIED[name])
    ids = tokens(2, 20)
    cache = KVCache(model.config, batch_size=2, capacity=20, dtype=torch.float64)
    with torch.no_grad():
        logits = torch.cat([model(piece, kv_cache=cache) for piece in ids.split(pieces, dim=1)], dim=1)
        torch.testing.assert_close(logits, model(ids), rtol=1e-10, atol=1e-10)


def test_full_cache_is_an_error(tokens):
    model = random_model(NANO["nano-memory"])
    cache = KVCache(model.config, batch_size=1, capacity=8, dtype=torch.float64)
    with torch.no_grad(), pytest.raises(ValueError, match="holds 8 tokens, got 9"):
        model(tokens(1, 9), kv_cache=cache)


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_without_memory_weights_given_rows_suffice(name, tokens):
    config = WITH_MEMORY[name]
    model = random_model(config)
    ids = tokens(2, 10)
    with torch.no_grad():
        expected, rows = model(ids), model.rows(ids)
        model.drop_memory()
        assert not any(".memory." in key for key, _ in model.named_parameters())
        assert torch.equal(model(ids, rows), expected)
        with pytest.raises(ValueError, match="memory weights are not loaded"):
            model(ids)


def test_a_dense_model_has_no_rows(tokens):
    with pytest.raises(ValueError, match="it is dense"):
        random_model(NANO["nano-base"]).rows(tokens(1, 3))


def test_scaled_rows_scale_and_drop(tokens):
    model = random_model(NANO["nano-memory"])
    rows = model.rows(tokens(2, 6))
    scaled = ScaledRows(rows, (1.0, 0.5, 0.0))
    expected = rows.table[rows.index]  # (B, T, L, D)
    torch.testing.assert_close(scaled.layer(0), expected[:, :, 0], rtol=0, atol=0)
    torch.testing.assert_close(scaled.layer(1), expected[:, :, 1] * 0.5, rtol=0, atol=0)
    assert scaled.layer(2) is None


def test_a_table_of_some_layers_equals_dropping_the_others(tokens):
    model = random_model(NANO["nano-flex1"])
    ids = tokens(2, 11)
    with torch.no_grad():
        rows = model.rows(ids)
        some = MemoryRows(rows.table[:, [2, 0]], rows.index, layers=(2, 0))
        assert torch.equal(model(ids, some), model(ids, ScaledRows(rows, (1.0, 0.0, 1.0))))


@pytest.mark.parametrize("name", ["nano-base", "nano-memory", "nano-flex3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_near_fp64(name, dtype, tokens):
    exact = random_model(VARIED[name])
    rough = random_model(VARIED[name], dtype=dtype)
    ids = tokens(2, 32)
    with torch.no_grad():
        expected, logits = exact(ids), rough(ids)
    assert logits.dtype == dtype
    error = (logits.double() - expected).norm() / expected.norm()
    assert error < {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]


@pytest.mark.parametrize("bad", [-1, 512])
def test_token_id_out_of_range(bad, tokens):
    ids = tokens(1, 4)
    ids[0, 2] = bad
    with pytest.raises(ValueError, match=rf"token id {bad} is out of range: the vocabulary has 512 ids"):
        random_model(NANO["nano-memory"])(ids)


def test_sequence_longer_than_the_model(tokens):
    config = dataclasses.replace(NANO["nano-base"], max_seq_len=16)
    model = random_model(config)
    cache = KVCache(config, batch_size=1, capacity=32, dtype=torch.float64)
    with torch.no_grad():
        model(tokens(1, 16), kv_cache=cache)
        with pytest.raises(ValueError, match="sequence of 17 tokens is longer than the model's 16"):
            model(tokens(1, 1), kv_cache=cache)
    with pytest.raises(ValueError, match="sequence of 17 tokens is longer"):
        model(tokens(1, 17))


@pytest.mark.parametrize("memory_kind", ["ffn", "table", "ffn+table"])
def test_initial_weights(memory_kind):
    base = VARIED["table"] if memory_kind == "table" else NANO["nano-memory"]
    model = new_model(dataclasses.replace(base, memory_kind=memory_kind, tie_embeddings=False), seed=3)
    again = new_model(model.config, seed=3)
    for (name, parameter), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter, other), name
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif name.endswith("memory.table.weight"):
            assert not parameter.any(), name
        else:
            residual = name.endswith(("output.weight", "down.weight"))
            expected = INIT_STD / (6**0.5 if residual else 1)
            assert parameter.std().item() == pytest.approx(expected, rel=0.1), name
    assert not torch.equal(model.head.weight, new_model(model.config, seed=4).head.weight)
