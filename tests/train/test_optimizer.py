"""What decays, and state that goes by name."""

import dataclasses

import pytest
import torch

from flexmemory.model.init import new_model
from flexmemory.train.optimizer import load_optimizer_tensors, make_optimizer, optimizer_tensors
from tests.train.conftest import nano, recipe


def decays(model):
    groups = make_optimizer(model, config=recipe(steps=1, weight_decay=0.3)).param_groups
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.3]
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    names = [name for name, _ in model.named_parameters()]
    assert sum(len(group["params"]) for group in groups) == len(names)
    return {name for name, parameter in model.named_parameters() if id(parameter) in decayed}


@pytest.mark.parametrize("kind", ["ffn", "ffn+table"])
@pytest.mark.parametrize("tied", [True, False])
def test_only_matrices_decay(kind, tied):
    names = decays(new_model(nano("flex3", memory_kind=kind, tie_embeddings=tied), seed=0))
    matrices = ("attention.qkv", "attention.output", "memory.ffn.gate", "memory.ffn.up", "memory.ffn.down",
                "ffn_c.gate", "ffn_c.up", "ffn_c.down")  # fmt: skip
    expected = {f"blocks.{layer}.{matrix}.weight" for layer in range(3) for matrix in matrices}
    assert names == (expected if tied else expected | {"head.weight"})


def step(model, optimizer, *, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def test_state_by_name_continues_exactly():
    config = recipe(steps=1)
    model = new_model(nano("flex1"), seed=0)
    optimizer = make_optimizer(model, config=config)
    step(model, optimizer, seed=1)
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer).items()}
    assert tensors.keys() == {
        f"{name}.{key}" for name, _ in model.named_parameters() for key in ("step", "exp_avg", "exp_avg_sq")
    }
    copy = new_model(nano("flex1"), seed=5)
    copy.load_state_dict(model.state_dict())
    changed = make_optimizer(copy, config=dataclasses.replace(config, weight_decay=0.0))
    load_optimizer_tensors(changed, tensors)
    assert {group["weight_decay"] for group in changed.param_groups} == {0.0}
    resumed = make_optimizer(copy, config=config)
    load_optimizer_tensors(resumed, tensors)
    step(model, optimizer, seed=2)
    step(copy, resumed, seed=2)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, copy.get_parameter(name)), name


def test_state_of_another_model_is_refused():
    model = new_model(nano("flex1"), seed=0)
    optimizer = make_optimizer(model, config=recipe(steps=1))
    step(model, optimizer, seed=1)
    other = make_optimizer(new_model(nano("memory"), seed=0), config=recipe(steps=1))
    with pytest.raises(ValueError, match=r"does not fit the model: see tensors blocks\.0\.ffn_c"):
        load_optimizer_tensors(other, optimizer_tensors(optimizer))
