"""One step: rows per unique id equal rows per position; precision and compilation change rounding only."""

import dataclasses

import pytest
import torch

from flexmemory.config import ModelConfig
from flexmemory.model.accounting import row_training_bytes
from flexmemory.model.init import new_model
from flexmemory.model.memory import MemoryRows
from flexmemory.train.data import Batch, SequentialBatches, ShuffledBatches
from flexmemory.train.loss import next_token_loss
from flexmemory.train.optimizer import Optimizer
from flexmemory.train.parallel import whole
from flexmemory.train.step import TrainingModel, accumulate, evaluate, rows_fit, take_step, training_model
from tests.conftest import WITH_MEMORY, random_model
from tests.train.conftest import nano, recipe


@pytest.fixture
def batch(dataset):
    batch = dataset.train.batch([3, 40, 7], seq_len=32)
    assert len(batch.unique_ids) > batch.num_unique  # padded
    return batch


def one_batch(batch: Batch, **changes: object):
    """A recipe whose step is `batch`."""
    sequences, length = batch.token_ids.shape
    values = {"batch_tokens": sequences * length, "micro_batch_size": sequences, "seq_len": length}
    return recipe(steps=1, **{**values, **changes})


def per_position(batch: Batch) -> Batch:
    """The same batch, with a row computed for every position."""
    index = torch.arange(batch.token_ids.numel()).view_as(batch.token_ids)
    return dataclasses.replace(batch, unique_ids=batch.token_ids.flatten(), index=index)


def gradients(module: TrainingModel, *, batch):
    """Loss and gradients of one batch of a plain step."""
    module.zero_grad()
    totals, _ = accumulate(module, batch)
    return totals[0], {name: gradient_of(parameter).clone() for name, parameter in module.model.named_parameters()}


def gradient_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return whole(parameter.grad)


def autograd_gradients(model, batch, *, z_loss):
    """The same by whole logits and autograd alone, a row computed for every position."""
    rows = MemoryRows(model.compute_rows(batch.token_ids.flatten()), per_position(batch).index)
    model.zero_grad()
    loss, _ = next_token_loss(model(batch.token_ids, rows), batch.targets, z_loss=z_loss)
    loss.backward()
    return loss.detach(), {name: gradient_of(parameter) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_unique_ids_equal_positions_in_loss_and_every_gradient(name, batch):
    model, config = random_model(WITH_MEMORY[name]), one_batch(batch, z_loss=1e-3)
    loss, unique = gradients(training_model(model, config=config), batch=batch)
    expected_loss, positions = autograd_gradients(model, batch, z_loss=1e-3)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-6, atol=0)
    for parameter, gradient in positions.items():
        assert gradient.abs().max() > 0, parameter
        torch.testing.assert_close(unique[parameter], gradient, rtol=1e-9, atol=1e-12, msg=parameter)


def run_step(model_config: ModelConfig, dataset, *, micro_batch_size: int, **changes: object):
    """A model after one step on the first 4 windows, and what the step measured."""
    config = recipe(steps=1, micro_batch_size=micro_batch_size, **changes)
    model = new_model(model_config, seed=0).double()
    batches = SequentialBatches(dataset.train, config=config, max_tokens=128)
    values = take_step(
        training_model(model, config=config),
        batches=(batches[number] for number in range(len(batches))),
        num_batches=len(batches),
        optimizer=Optimizer(model, config=config),
        lr=1e-3,
    )
    return model, values


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_rows_once_per_step_give_the_gradients_of_rows_per_micro_batch(name, dataset):
    """The step-wide form is exact: the loss reaches FFN-M only through the table."""
    model, config = random_model(WITH_MEMORY[name]), recipe(steps=1, micro_batch_size=1)
    module = training_model(model, config=config)

    def accumulated(batches):
        model.zero_grad()
        totals = sum(accumulate(module, batch)[0] for batch in batches)
        return totals, {name: parameter.grad for name, parameter in model.named_parameters()}

    expected_totals, expected = accumulated([dataset.train.batch([window], seq_len=32) for window in (3, 40, 7, 8)])
    totals, found = accumulated([dataset.train.batch((3, 40, 7, 8), seq_len=32)])
    torch.testing.assert_close(totals, expected_totals, rtol=1e-6, atol=0)
    for key, gradient in expected.items():
        assert gradient is not None
        assert gradient.abs().max() > 0, key
        torch.testing.assert_close(found[key], gradient, rtol=1e-9, atol=1e-12, msg=key)


def test_a_step_computes_each_row_once(dataset, monkeypatch):
    config = recipe(steps=1, micro_batch_size=1)
    model = new_model(nano(), seed=0)
    module, seen = training_model(model, config=config), []
    compute = module.compute_rows
    monkeypatch.setattr(module, "compute_rows", lambda token_ids: seen.append(token_ids) or compute(token_ids))
    steps = ShuffledBatches(dataset.train, config=config, batch_size=4)
    values = take_step(
        module,
        batches=[steps[0]],
        num_batches=1,
        optimizer=Optimizer(model, config=config),
        lr=1e-3,
    )
    (token_ids,) = seen
    assert token_ids[: values.num_unique].tolist() == sorted(set(steps[0].token_ids.flatten().tolist()))
    assert (steps.per_step, ShuffledBatches(dataset.train, config=config).per_step) == (1, 4)


def test_gradients_of_a_bf16_table_are_summed_in_fp32(dataset):
    """Of many equal micro-batches, none is lost to rounding: bf16 alone stops adding at 256 times a term."""
    batch = dataset.train.batch([5], seq_len=32)
    many = dataclasses.replace(
        batch,
        token_ids=batch.token_ids.expand(1024, -1),
        targets=batch.targets.expand(1024, -1),
        index=batch.index.expand(1024, -1),
    )
    found = []
    for sequences, part in ((1, batch), (1024, many)):
        config = recipe(
            steps=1, batch_tokens=32 * sequences, total_tokens=32 * 1024, micro_batch_size=1, precision="bf16"
        )
        model = new_model(nano("memory", num_layers=1), seed=0)
        accumulate(training_model(model, config=config), part)
        found.append(gradient_of(model.get_parameter("blocks.0.memory.ffn.down.weight")))
    torch.testing.assert_close(found[1], found[0], rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("name", ["memory", "flex1"])
def test_the_estimate_of_memory_covers_what_is_kept(name, caplog):
    caplog.set_level("INFO")
    model = new_model(nano(name), seed=0)
    kept: dict[int, int] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        table = model.compute_rows(torch.arange(300))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    activations = sum(size for pointer, size in kept.items() if pointer not in weights)
    needed = row_training_bytes(model.config, num_unique=300, bytes_per_number=4)
    gradients = 2 * table.nbytes  # the table's gradient and their sum
    assert 0.75 * needed < activations + table.nbytes + gradients <= needed
    module = training_model(model, config=recipe(steps=1))
    module.layers_to_keep = lambda num_unique: module.model.config.num_layers
    assert rows_fit(module, num_unique=300, free_bytes=2 * needed + 2)
    assert "computed once per step" in caplog.text
    assert not rows_fit(module, num_unique=300, free_bytes=2 * needed)
    module.layers_to_keep = lambda num_unique: 0
    assert rows_fit(module, num_unique=300, free_bytes=2 * needed)
    assert "computed once per micro-batch" in caplog.text


@pytest.mark.parametrize("name", ["base", "memory", "flex3"])
def test_micro_batches_add_up_to_the_step(name, dataset):
    whole, expected = run_step(nano(name), dataset, micro_batch_size=4)
    parts, values = run_step(nano(name), dataset, micro_batch_size=1)
    torch.testing.assert_close(values.scalars, expected.scalars)
    assert (values.num_unique > expected.num_unique) == (name != "base")
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
    value = evaluate(training_model(model, config=config), [*numbered, numbered[0]], num_counted=3)
    batch = dataset.validation.batch(range(5), seq_len=32)
    _, expected = next_token_loss(model(batch.token_ids), batch.targets, z_loss=0.0)
    assert value == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_computed_again_change_nothing(precision, batch):
    def step(kept):
        module = training_model(new_model(nano("flex1"), seed=0), config=one_batch(batch, precision=precision))
        module.layers_to_keep = lambda num_unique: kept
        return gradients(module, batch=batch)

    (loss, found), (expected_loss, expected) = step(1), step(3)
    assert loss == expected_loss
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_activations_of_few_ids_are_kept():
    module = training_model(new_model(nano(), seed=0), config=recipe(steps=1))  # micro-batches of 64 positions
    assert [module.layers_to_keep(number) for number in (40, 80, 81, 160, 1000)] == [3, 3, 2, 1, 0]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["base", "memory", "flex3"])
def test_bf16_is_fp32_but_for_rounding_and_gradients_stay_fp32(name, tied, batch):
    def step(precision):
        config = one_batch(batch, precision=precision, micro_batch_size=1)
        return gradients(training_model(new_model(nano(name, tie_embeddings=tied), seed=0), config=config), batch=batch)

    (loss, found), (exact, expected) = step("bf16"), step("fp32")
    assert loss.item() == pytest.approx(exact.item(), rel=1e-3)
    assert loss.item() != exact.item()
    for key, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert torch.cosine_similarity(gradient.flatten(), expected[key].flatten(), dim=0) > 0.99, key


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method.:DeprecationWarning")  # torch's own, on first import
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # seen by the compiler only
@pytest.mark.parametrize(("name", "precision"), [("memory", "fp32"), ("flex1", "bf16")])
def test_compiled_equals_eager(name, precision, dataset):
    config = recipe(steps=1, precision=precision, micro_batch_size=4)
    eager = training_model(new_model(nano(name), seed=0), config=config)
    compiled = training_model(new_model(nano(name), seed=0), config=dataclasses.replace(config, compile="on"))
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    for windows in (range(4), range(12)):  # another number of unique ids
        batch = dataset.train.batch(windows, seq_len=32)
        expected_loss, expected = gradients(eager, batch=batch)
        loss, found = gradients(compiled, batch=batch)
        assert loss.item() == pytest.approx(expected_loss.item(), rel=tolerance / 10)
        for key, gradient in found.items():
            error = (gradient - expected[key]).norm() / expected[key].norm()
            assert error < tolerance, (key, error)
    values = [evaluate(module, [batch], num_counted=1) for module in (eager, compiled)]
    assert values[1] == pytest.approx(values[0], rel=tolerance / 10)
