"""One step: rows per unique id equal rows per position; precision and compilation change rounding only."""

import dataclasses

import pytest
import torch

from flexmemory.config import ModelConfig
from flexmemory.model.init import new_model
from flexmemory.train.data import Batch, SequentialBatches
from flexmemory.train.optimizer import make_optimizer
from flexmemory.train.step import BatchLoss, evaluate, loss_function, take_step
from tests.conftest import WITH_MEMORY, random_model
from tests.train.conftest import nano, recipe

CPU = torch.device("cpu")


@pytest.fixture
def batch(dataset):
    batch = dataset.train.batch([3, 40, 7], seq_len=32)
    assert len(batch.unique_ids) > batch.num_unique  # padded
    return batch


def per_position(batch: Batch) -> Batch:
    """The same batch, with a row computed for every position."""
    index = torch.arange(batch.token_ids.numel()).view_as(batch.token_ids)
    return dataclasses.replace(batch, unique_ids=batch.token_ids.flatten(), index=index)


def gradients(loss_of, *, batch, model):
    model.zero_grad()
    loss, _ = loss_of(batch)
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert found.keys() == dict(model.named_parameters()).keys()
    return loss.detach(), found


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_unique_ids_equal_positions_in_loss_and_every_gradient(name, batch):
    model = random_model(WITH_MEMORY[name])
    module = BatchLoss(model, z_loss=1e-3)
    loss, unique = gradients(module, batch=batch, model=model)
    expected_loss, positions = gradients(module, batch=per_position(batch), model=model)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    for parameter, gradient in positions.items():
        assert gradient.abs().max() > 0, parameter
        torch.testing.assert_close(unique[parameter], gradient, rtol=1e-9, atol=1e-12, msg=parameter)


def run_step(model_config: ModelConfig, dataset, *, micro_batch_size: int, **changes: object):
    """A model after one step on the first 4 windows, and what the step measured."""
    config = recipe(steps=1, micro_batch_size=micro_batch_size, **changes)
    model = new_model(model_config, seed=0).double()
    batches = SequentialBatches(dataset.train, config=config, max_tokens=128)
    values = take_step(
        loss_function(model, config=config),
        batches=(batches[number] for number in range(len(batches))),
        optimizer=make_optimizer(model, config=config),
        lr=1e-3,
        config=config,
    )
    return model, values


@pytest.mark.parametrize("name", ["base", "memory", "flex3"])
def test_micro_batches_add_up_to_the_step(name, dataset):
    whole, expected = run_step(nano(name), dataset, micro_batch_size=4)
    parts, values = run_step(nano(name), dataset, micro_batch_size=1)
    torch.testing.assert_close(values.scalars, expected.scalars)
    assert values.num_unique > expected.num_unique
    for key, parameter in whole.named_parameters():
        torch.testing.assert_close(parts.get_parameter(key), parameter, rtol=1e-7, atol=1e-9, msg=key)


def test_gradients_are_clipped_and_the_norm_before_is_reported(dataset):
    model, values = run_step(nano("base"), dataset, micro_batch_size=2, clip_norm=1e-12, weight_decay=0.0)
    free, expected = run_step(nano("base"), dataset, micro_batch_size=2, clip_norm=1e9, weight_decay=0.0)
    assert values.scalars[2] == expected.scalars[2] > 0.1
    start = new_model(nano("base"), seed=0).double()
    moved = [
        max((other.get_parameter(name) - parameter).abs().max().item() for name, parameter in start.named_parameters())
        for other in (model, free)
    ]
    assert moved[0] < 1e-6  # Adam's epsilon, 1e-8, is far above such gradients
    assert moved[1] == pytest.approx(1e-3, rel=0.01)


def test_evaluation_weighs_positions_equally(dataset):
    model, config = new_model(nano(), seed=0), recipe(steps=1)
    batches = SequentialBatches(dataset.validation, config=config, max_tokens=5 * 32)
    numbered = [batches[number] for number in range(len(batches))]
    assert [len(batch.token_ids) for batch in numbered] == [2, 2, 1]
    loss_of = loss_function(model, config=config)
    value = evaluate(loss_of, batches=numbered, device=CPU)
    whole = dataset.validation.batch(range(5), seq_len=32)
    assert value == pytest.approx(loss_of(whole)[1].item(), rel=1e-6)


@pytest.mark.parametrize("name", ["base", "memory", "flex3"])
def test_bf16_is_fp32_but_for_rounding_and_gradients_stay_fp32(name, batch):
    model = new_model(nano(name), seed=0)
    exact, expected = gradients(loss_function(model, config=recipe(steps=1)), batch=batch, model=model)
    rounded = loss_function(model, config=recipe(steps=1, precision="bf16"))
    loss, found = gradients(rounded, batch=batch, model=model)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-3)
    assert loss.item() != exact.item()
    for key, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert torch.cosine_similarity(gradient.flatten(), expected[key].flatten(), dim=0) > 0.99, key


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method.:DeprecationWarning")  # torch's own, on first import
@pytest.mark.parametrize(("name", "precision"), [("memory", "fp32"), ("flex1", "bf16")])
def test_compiled_equals_eager(name, precision, dataset):
    model = new_model(nano(name, num_layers=1), seed=0)
    config = recipe(steps=1, precision=precision)
    eager = loss_function(model, config=config)
    compiled = loss_function(model, config=dataclasses.replace(config, compile="on"))
    for windows in (range(2), range(12)):  # another number of unique ids
        batch = dataset.train.batch(windows, seq_len=32)
        expected_loss, expected = gradients(eager, batch=batch, model=model)
        loss, found = gradients(compiled, batch=batch, model=model)
        tolerance = 1e-5 if precision == "fp32" else 2e-2
        assert loss.item() == pytest.approx(expected_loss.item(), rel=tolerance / 10)
        for key, gradient in found.items():
            error = (gradient - expected[key]).norm() / expected[key].norm()
            assert error < tolerance, (key, error)
    with torch.no_grad():
        assert compiled(batch)[1].item() == pytest.approx(eager(batch)[1].item(), rel=tolerance / 10)
