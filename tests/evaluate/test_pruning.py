"""Pruning against masks worked out by hand, slow references and the paper's counts."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from flexmemory.evaluate.pruning import magnitude_mask, prune, sparsegpt, sparsity_for, wanda_mask
from flexmemory.model.accounting import count_parameters
from flexmemory.model.transformer import Transformer
from flexmemory.presets import get_preset
from tests.conftest import NANO, random_model

BASE = NANO["nano-base"]
GROUPED = dataclasses.replace(BASE, num_kv_heads=2)
WEIGHT = torch.tensor([[0.5, -4.0, 3.0, 1.0], [-2.0, 0.1, 0.2, -5.0]])
MATRICES = (("attention.qkv", "attention.qkv"), ("attention.output", "attention.output"), ("ffn.gate", "ffn.gate"),
            ("ffn.gate", "ffn.up"), ("ffn.down", "ffn.down"))  # fmt: skip
"""A map that reads the inputs, and one whose weights they meet."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(count: int, size: int, *, seed: int = 0) -> Tensor:
    """Inputs of which some nearly repeat others, of very different sizes."""
    mixed = normal(count, size // 2, seed=seed) @ normal(size // 2, size, seed=seed + 1)
    sizes = torch.linspace(0.1, 3, size, dtype=torch.float64)[normal(size, seed=seed + 3).argsort()]
    return (mixed + 0.1 * normal(count, size, seed=seed + 2)) * sizes


def mask(*rows: str) -> Tensor:
    """`x` is a weight that goes."""
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


def test_magnitude_masks_by_hand():
    assert torch.equal(magnitude_mask(WEIGHT, 0.5), mask("x--x", "-xx-"))
    assert torch.equal(magnitude_mask(WEIGHT, 0.25), mask("----", "-xx-"))  # of the whole matrix
    assert torch.equal(magnitude_mask(WEIGHT, (1, 2)), mask("x--x", "-xx-"))
    assert torch.equal(magnitude_mask(WEIGHT, (1, 4)), mask("x-xx", "xxx-"))
    assert torch.equal(magnitude_mask(torch.ones(1, 4), 0.5), mask("xx--"))  # of equal ones the first


def test_wanda_masks_by_hand():
    squares = torch.tensor([16.0, 0.01, 1.0, 4.0])  # norms 4, 0.1, 1, 2; scores 2, 0.4, 3, 2 and 8, 0.01, 0.2, 10
    assert torch.equal(wanda_mask(WEIGHT, squares, 0.25), mask("-x--", "-x--"))  # of each row
    assert torch.equal(wanda_mask(WEIGHT, squares, 0.5), mask("xx--", "-xx-"))
    assert torch.equal(wanda_mask(WEIGHT, squares, (1, 2)), mask("-x-x", "-xx-"))


def test_wanda_with_equal_norms_is_magnitude():
    weight, squares = normal(6, 16), torch.full((16,), 7.0)
    assert torch.equal(wanda_mask(weight, squares, (2, 4)), magnitude_mask(weight, (2, 4)))
    rows = torch.cat([magnitude_mask(row[None], 0.4) for row in weight])
    assert torch.equal(wanda_mask(weight, squares, 0.4), rows)


def test_sparsegpt_of_independent_inputs_changes_no_weight_that_is_left():
    weight, squares = normal(3, 8), torch.linspace(1, 50, 8, dtype=torch.float64)
    importance = weight.square() * (squares + 0.01 * squares.mean())
    for sparsity in (0.5, (2, 4)):
        expected = weight.masked_fill(magnitude_mask(importance, sparsity), 0)
        torch.testing.assert_close(sparsegpt(weight, squares.diag(), sparsity), expected, rtol=1e-12, atol=0)
    blocks = [magnitude_mask(part, 0.5) for part in importance.split(2, dim=1)]  # chosen within blocks of columns
    found = sparsegpt(weight, squares.diag(), 0.5, block_columns=2)
    assert torch.equal(found == 0, torch.cat(blocks, dim=1))


def brain_surgeon(weight: Tensor, moment: Tensor, sparsity: float | tuple[int, int], *, size: int) -> Tensor:
    """Column by column, each time with the inverse of what is left of the Hessian of the squared error."""
    hessian = 2 * moment
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    w, columns = weight.clone(), weight.shape[1]
    gone = torch.zeros_like(w, dtype=torch.bool)
    if isinstance(sparsity, tuple):
        size = sparsity[1]
    for j in range(columns):
        if j % size == 0:
            block = range(j, min(j + size, columns))
            cost = torch.stack([w[:, c] ** 2 / torch.linalg.inv(hessian[c:, c:])[0, 0] for c in block], dim=1)
            if isinstance(sparsity, tuple):
                for row in range(len(w)):
                    gone[row, j + cost[row].argsort()[: size - sparsity[0]]] = True
            else:
                count = round(sparsity * len(w) * (block[-1] + 1)) - round(sparsity * len(w) * j)
                for place in cost.flatten().argsort()[:count].tolist():
                    gone[place // len(block), j + place % len(block)] = True
        inverse = torch.linalg.inv(hessian[j:, j:])
        w[:, j:] -= torch.where(gone[:, j], w[:, j], 0)[:, None] / inverse[0, 0] * inverse[0]
    return w.masked_fill(gone, 0)


@pytest.mark.parametrize("sparsity", [0.5, 0.83, (2, 4), (1, 8), (4, 6)])
@pytest.mark.parametrize("size", [8, 20, 128])
def test_sparsegpt_is_the_optimal_brain_surgeon(sparsity, size):
    x, weight = correlated(200, 48), normal(7, 48, seed=5)
    found = sparsegpt(weight, x.T @ x, sparsity, block_columns=size)
    expected = brain_surgeon(weight, x.T @ x, sparsity, size=size)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_the_update_is_the_best_that_later_columns_can_do():
    """With the damping as ridge, least squares of what the first weight's loss takes away."""
    x, weight = correlated(100, 6), normal(1, 6)
    weight[0, 0] = 1e-3  # the one that goes
    moment = x.T @ x
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    found = sparsegpt(weight, moment, 1 / 6)
    best = torch.linalg.solve(damped[1:, 1:], damped[1:] @ weight[0])
    torch.testing.assert_close(found[0], torch.cat((torch.zeros(1, dtype=torch.float64), best)), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("sparsity", [0.5, (2, 4)])
def test_methods_that_look_at_inputs_lose_less_of_the_outputs(sparsity):
    x, weight = correlated(400, 64), normal(32, 64, seed=9)
    moment = x.T @ x
    surgeon = sparsegpt(weight, moment, sparsity, block_columns=16)
    wanda = weight.masked_fill(wanda_mask(weight, moment.diagonal(), sparsity), 0)
    magnitude = weight.masked_fill(magnitude_mask(weight, sparsity), 0)
    losses = [float((x @ (weight - left).T).norm()) for left in (surgeon, wanda, magnitude)]
    assert losses[0] < 0.7 * losses[1] < 0.7 * losses[2]


def test_inputs_that_are_all_zero_leave_the_magnitudes():
    weight, nothing = normal(4, 8), torch.zeros(8, 8)
    assert torch.equal(sparsegpt(weight, nothing, 0.5), weight.masked_fill(magnitude_mask(weight, 0.5), 0))


def separate(model: Transformer, layer: int) -> dict[str, Tensor]:
    """The seven matrices of a layer, as views."""
    block, config = model.blocks[layer], model.config
    width = config.num_kv_heads * config.head_size
    fused = block.get_parameter("attention.qkv.weight").detach()
    q, k, v = fused.split([config.hidden_size, width, width])
    others = {f"{name}.weight": block.get_parameter(f"{name}.weight").detach() for _, name in MATRICES[1:]}
    return {"q": q, "k": k, "v": v, **others}


def inputs(model: Transformer, layer: int, name: str, text: Tensor) -> Tensor:
    """What a map reads in the model as it is, by a whole forward pass."""
    kept = []
    module = model.blocks[layer].get_submodule(name)
    assert isinstance(module, nn.Linear)
    hook = module.register_forward_pre_hook(lambda _m, args: kept.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(text)
    hook.remove()
    return kept[0]


def pruned_slowly(model: Transformer, text: Tensor, method: str, sparsity: float | tuple[int, int]) -> Transformer:
    """Layer by layer, with whole forward passes of the model whose earlier layers are pruned."""
    model = copy.deepcopy(model)
    for layer in range(model.config.num_layers):
        readers = {"q": "attention.qkv", "k": "attention.qkv", "v": "attention.qkv"}
        readers |= {f"{name}.weight": reader for reader, name in MATRICES[1:]}
        read = {name: inputs(model, layer, reader, text) for name, reader in readers.items()}
        for name, weight in separate(model, layer).items():
            x = read[name]
            if method == "magnitude":
                weight[magnitude_mask(weight, sparsity)] = 0
            elif method == "wanda":
                weight[wanda_mask(weight, x.square().sum(0), sparsity)] = 0
            else:
                weight.copy_(sparsegpt(weight, x.T @ x, sparsity))
    return model


@pytest.mark.parametrize("config", [BASE, GROUPED], ids=["base", "grouped"])
@pytest.mark.parametrize("sparsity", [0.6, (2, 4)])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_blocks_read_what_pruned_blocks_give(method, sparsity, config, tokens):
    model, text = random_model(config), tokens(10, 20)
    expected = pruned_slowly(model, text, method, sparsity)
    untouched = copy.deepcopy(model)
    calibration = None if method == "magnitude" else text
    report = prune(model, method=method, sparsity=sparsity, calibration=calibration, batch_size=3)
    for (name, weight), reference in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(weight, reference, rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
        kept = not any(part in name for part in ("qkv", "output", "gate", "up", "down"))
        assert torch.equal(weight, untouched.get_parameter(name)) == kept, name
    matrices = [matrix for layer in range(3) for matrix in separate(model, layer).values()]
    zeros = [int((matrix == 0).sum()) for matrix in matrices]
    assert report.weights == sum(matrix.numel() for matrix in matrices)
    assert report.zeros == sum(zeros)
    assert report.active == count_parameters(config).backbone - sum(zeros)
    for matrix, count in zip(matrices, zeros, strict=True):
        if isinstance(sparsity, tuple):
            assert bool(((matrix.reshape(-1, 4) != 0).sum(1) == 2).all())
        else:
            rows, columns = matrix.shape
            exact = rows * round(sparsity * columns) if method == "wanda" else round(sparsity * matrix.numel())
            assert count == exact


def test_the_ffn_alone(tokens):
    model = random_model(BASE)
    before = copy.deepcopy(model)
    report = prune(model, method="wanda", sparsity=0.5, calibration=tokens(4, 16), modules="ffn")
    assert report.weights == count_parameters(BASE).ffn == 2 * report.zeros
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before.get_parameter(name)) == (".ffn." not in name), name


def test_weights_that_are_gone_stay_zero_in_bf16(tokens):
    model = random_model(BASE, dtype=torch.bfloat16)
    report = prune(model, method="sparsegpt", sparsity=0.667, calibration=tokens(8, 32))
    assert report.zeros == pytest.approx(0.667 * report.weights, abs=21)
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(("size", "variant", "expected"), [
    ("1b", "memory", 0.667), ("1b", "flex3", 0.417), ("750m", "memory", 0.667), ("250m", "flex1", 0.583),
    ("1b", "base", 0.0),
])  # fmt: skip
def test_sparsity_at_the_papers_active_counts(size, variant, expected):
    base, other = (get_preset(f"{size}-{name}").model for name in ("base", variant))
    active = count_parameters(other).active
    sparsity = sparsity_for(base, active)
    assert sparsity == pytest.approx(expected, abs=1e-3)
    counts = count_parameters(base)
    assert counts.backbone - sparsity * (counts.attention + counts.ffn) == pytest.approx(active, abs=1)


def test_a_model_pruned_to_match_has_the_other_models_parameters(tokens):
    model, active = random_model(BASE), count_parameters(NANO["nano-flex3"]).active
    sparsity = sparsity_for(BASE, active, modules="ffn")
    report = prune(model, method="sparsegpt", sparsity=sparsity, calibration=tokens(4, 16), modules="ffn")
    assert report.active == pytest.approx(active, abs=9)  # half a weight of each matrix


@pytest.mark.parametrize("active", [0, 10**9])
def test_targets_that_cannot_be_met(active):
    with pytest.raises(ValueError, match=f"not {active:,}; match another model"):
        sparsity_for(BASE, active)


def test_mistakes(tokens):
    model, text = random_model(BASE), tokens(2, 16)
    for sparsity in (1.0, -0.1):
        with pytest.raises(ValueError, match=f"below 1, got {sparsity}"):
            prune(model, method="magnitude", sparsity=sparsity)
    for pattern in ((4, 4), (0, 4), (5, 4)):
        with pytest.raises(ValueError, match="0 < n < m"):
            prune(model, method="magnitude", sparsity=pattern)
    with pytest.raises(ValueError, match=r"pattern 2:5 needs inputs in groups of 5, got D = 48"):
        prune(model, method="magnitude", sparsity=(2, 5))
    with pytest.raises(ValueError, match="magnitude pruning reads no text"):
        prune(model, method="magnitude", sparsity=0.5, calibration=text)
    for method in ("wanda", "sparsegpt"):
        for missing in (None, text[:0]):
            with pytest.raises(ValueError, match=f"{method} looks at the inputs of each matrix"):
                prune(model, method=method, sparsity=0.5, calibration=missing)
    with pytest.raises(ValueError, match="windows of 65 tokens do not fit the model; expected 1 to 64"):
        prune(model, method="wanda", sparsity=0.5, calibration=tokens(2, 65))
    with pytest.raises(ValueError, match="token id 512 is out of range"):
        prune(model, method="wanda", sparsity=0.5, calibration=torch.where(text == text[0, 0], 512, text))
    for name in ("nano-memory", "nano-flex1"):
        with pytest.raises(ValueError, match=f"only dense models are pruned, got {NANO[name].architecture}"):
            prune(random_model(NANO[name]), method="magnitude", sparsity=0.5)
        with pytest.raises(ValueError, match="only dense models are pruned"):
            sparsity_for(NANO[name], 1000)
    assert all(bool((weight != 0).all()) for weight in model.parameters())
    with torch.no_grad():
        model.get_parameter("blocks.1.ffn.up.weight")[0, 0] = torch.inf
    with pytest.raises(ValueError, match="inputs of block 1 are not finite"):
        prune(model, method="wanda", sparsity=0.5, calibration=text)
