"""What decays, and state that goes by name."""

import dataclasses

import pytest
import torch

from flexmemory.model.init import new_model
from flexmemory.train.optimizer import Optimizer
from tests.train.conftest import nano, recipe


def decays(model):
    optimizer = Optimizer(model, config=recipe(steps=1, weight_decay=0.3))
    groups = [group for part in optimizer.parts for group in part.param_groups]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.3}
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
    return optimizer.step(lr=1e-2, clip_norm=1e9)


@pytest.mark.parametrize(
    ("kind", "keys"), [("adamw", {"step", "exp_avg", "exp_avg_sq"}), ("muon", {"momentum_buffer"})]
)
def test_state_by_name_continues_exactly(kind, keys):
    config = recipe(steps=1, optimizer=kind)
    model = new_model(nano("flex1"), seed=0)
    optimizer = Optimizer(model, config=config)
    step(model, optimizer, seed=1)
    tensors = {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
    hidden = {name for name, parameter in model.named_parameters() if parameter.ndim == 2 and name.startswith("blocks")}
    for name, _ in model.named_parameters():
        found = {key.rpartition(".")[2] for key in tensors if key.startswith(f"{name}.")}
        assert found == (keys if name in hidden else {"step", "exp_avg", "exp_avg_sq"}), name
    copy = new_model(nano("flex1"), seed=5)
    copy.load_state_dict(model.state_dict())
    changed = Optimizer(copy, config=dataclasses.replace(config, weight_decay=0.0, memory_lr=3.0))
    changed.load(tensors)
    groups = {group["role"]: group for part in changed.parts for group in part.param_groups}
    assert {group["weight_decay"] for group in groups.values()} == {0.0}
    assert groups["memory"]["lr_scale"] == 3.0
    resumed = Optimizer(copy, config=config)
    resumed.load(tensors)
    step(model, optimizer, seed=2)
    step(copy, resumed, seed=2)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, copy.get_parameter(name)), name


def test_state_of_another_model_or_optimizer_is_refused():
    model = new_model(nano("flex1"), seed=0)
    optimizer = Optimizer(model, config=recipe(steps=1))
    step(model, optimizer, seed=1)
    other = Optimizer(new_model(nano("memory"), seed=0), config=recipe(steps=1))
    with pytest.raises(ValueError, match=r"does not fit the model: see tensors blocks\.0\.ffn_c"):
        other.load(optimizer.tensors())
    with pytest.raises(ValueError, match=r"does not fit the model: see tensors blocks\.0\.attention\.output"):
        Optimizer(model, config=recipe(steps=1, optimizer="muon")).load(optimizer.tensors())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_multipliers_scale_the_rate_of_their_group_alone(kind):
    def moved(**changes: object):
        model, start = (new_model(nano("flex1"), seed=0) for _ in range(2))
        step(model, Optimizer(model, config=recipe(steps=1, optimizer=kind, weight_decay=0.0, **changes)), seed=1)
        return {name: parameter - start.get_parameter(name) for name, parameter in model.named_parameters()}

    plain, changed = moved(), moved(embedding_lr=2.0, memory_lr=0.5)
    for name, change in plain.items():
        factor = 2.0 if name == "embedding.weight" else 0.5 if ".memory.ffn." in name else 1.0
        torch.testing.assert_close(changed[name], factor * change, rtol=1e-3, atol=1e-6, msg=name)


def test_norms_are_given_whole_and_by_group():
    model = new_model(nano("flex1", tie_embeddings=False, memory_kind="ffn+table"), seed=0)
    optimizer = Optimizer(model, config=recipe(steps=1))
    norms = dict(zip(["all", *optimizer.roles], step(model, optimizer, seed=1).tolist(), strict=True))
    assert norms.keys() == {"all", "embedding", "norm", "attention", "memory", "table", "ffn", "head"}
    generator = torch.Generator().manual_seed(1)
    gradients = {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
    assert norms["all"] == pytest.approx(sum(float(g.square().sum()) for g in gradients.values()) ** 0.5, rel=1e-5)
    assert norms["head"] == pytest.approx(gradients["head.weight"].norm().item(), rel=1e-5)
    tables = [gradient for name, gradient in gradients.items() if name.endswith("memory.table.weight")]
    assert norms["table"] == pytest.approx(torch.stack(tables).norm().item(), rel=1e-5)


def test_muon_moves_matrices_by_orthogonal_steps():
    model, start = (new_model(nano("memory"), seed=0) for _ in range(2))
    optimizer = Optimizer(model, config=recipe(steps=1, optimizer="muon", weight_decay=0.0))
    step(model, optimizer, seed=1)
    name = "blocks.1.memory.ffn.up.weight"
    values = torch.linalg.svdvals(model.get_parameter(name) - start.get_parameter(name))
    assert values.max() / values.min() < 3  # of a random matrix of that shape it is about 4 and more, of Adam's too
