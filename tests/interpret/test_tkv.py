"""The memory, read as keys and values, is the FFN."""

import pytest
import torch

from flexmemory.interpret.tkv import TokenMemory
from tests.conftest import VARIED, random_model

READABLE = ["nano-memory", "nano-flex2", "ffn+table", "nano-base"]


def everything(memory: TokenMemory, layer: int) -> torch.Tensor:
    """c of every token by Eq. 2.7, one cell at a time."""
    model = memory.model
    ids = torch.arange(memory.vocab_size)
    if memory.exact:
        norm = model.memories[layer].norm
        assert norm is not None
        queries = norm(model.embed(ids))
    else:
        cached = []
        hook = model.blocks[0].get_submodule("ffn").register_forward_hook(lambda _m, x, _o: cached.append(x[0]))
        model(ids[:, None])  # each token alone
        hook.remove()
        queries = cached[0][:, 0]
    columns = [
        (queries @ key) * torch.nn.functional.silu(queries @ gate)
        for key, gate in zip(memory.keys(layer), memory.gates(layer), strict=True)
    ]
    return torch.stack(columns, dim=1).detach()


@pytest.mark.parametrize("name", READABLE)
def test_coefficients_are_those_of_the_equation(name):
    memory = TokenMemory(random_model(VARIED[name]))
    for layer in memory.layers:
        expected = everything(memory, layer)
        torch.testing.assert_close(memory.coefficients(torch.arange(512), layer=layer), expected, rtol=1e-9, atol=1e-12)
        activations = memory.activations(torch.tensor([3, 9]), layer=layer)
        product = activations.pre_linear * torch.nn.functional.silu(activations.pre)
        torch.testing.assert_close(activations.post, product)
        torch.testing.assert_close(activations.post, expected[[3, 9]], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(memory.column(layer=layer, key=5), expected[:, 5], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", READABLE)
def test_a_row_is_the_sum_of_values_times_coefficients(name):
    """Eq. 2.7 and 2.8."""
    memory = TokenMemory(random_model(VARIED[name]))
    ids = torch.tensor([0, 7, 511])
    for layer in memory.layers:
        sums = (memory.coefficients(ids, layer=layer)[:, :, None] * memory.values(layer)).sum(1)
        if name == "ffn+table":
            table = memory.model.memories[layer].table
            assert table is not None
            sums = sums + table(ids).detach()
        torch.testing.assert_close(memory.rows(ids, layer=layer), sums, rtol=1e-9, atol=1e-12)
        if memory.exact:
            torch.testing.assert_close(memory.rows(ids, layer=layer), memory.model.compute_rows(ids)[:, layer].detach())


def test_contributions_sum_to_the_row_along_a_direction():
    memory = TokenMemory(random_model(VARIED["nano-flex1"]))
    direction = torch.randn(memory.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    parts = memory.contributions(17, layer=2, direction=direction)
    torch.testing.assert_close(parts.sum(), memory.rows(torch.tensor([17]), layer=2)[0] @ direction)


@pytest.mark.parametrize("sign", [None, 1, -1])
def test_top_keys_are_by_the_length_of_what_they_add(sign):
    memory = TokenMemory(random_model(VARIED["nano-memory"]))
    coefficients = everything(memory, 1)[40]
    weights = coefficients.abs() * memory.values(1).norm(dim=1)
    order = [k for k in weights.argsort(descending=True).tolist() if sign is None or sign * coefficients[k] > 0]
    found = memory.top_keys(40, layer=1, count=6, sign=sign)
    assert [cell.key for cell in found] == order[:6]
    assert found[0].name == f"L1K{order[0]}"
    assert found[0].coefficient == pytest.approx(float(coefficients[order[0]]))
    assert found[0].weight == pytest.approx(float(weights[order[0]]))
    if sign is not None:  # no list is padded with cells of the other sign
        assert len(memory.top_keys(40, layer=1, count=10**6, sign=sign)) == len(order)


@pytest.mark.parametrize("sign", [1, -1])
def test_top_tokens_are_over_the_whole_vocabulary(sign):
    memory = TokenMemory(random_model(VARIED["nano-flex2"]))
    column = everything(memory, 0)[:, 11]
    order = column.argsort(descending=sign > 0).tolist()
    assert [token for token, _ in memory.top_tokens(layer=0, key=11, count=9, sign=sign)] == order[:9]
    mask = torch.ones(512, dtype=torch.bool)
    mask[order[:3]] = False
    found = memory.top_tokens(layer=0, key=11, count=510, sign=sign, mask=mask)
    assert [token for token, _ in found] == order[3:]
    assert found[0][1] == pytest.approx(float(column[order[3]]))


def test_promoted_tokens_are_those_of_the_head_behind_the_norms_gain():
    memory = TokenMemory(random_model(VARIED["untied"]))
    vector = memory.values(1)[3]
    logits = memory.model.head.weight.detach() @ (memory.model.norm.weight.detach() * vector)
    torch.testing.assert_close(memory.project(vector), logits)
    assert [t for t, _ in memory.promoted(vector, count=4)] == logits.argsort(descending=True)[:4].tolist()
    assert [t for t, _ in memory.promoted(vector, count=4, sign=-1)] == logits.argsort()[:4].tolist()


def test_nearest_tokens_are_those_of_the_whole_coefficient_matrix():
    model = random_model(VARIED["nano-flex1"])
    with torch.no_grad():
        weight = model.get_parameter("embedding.weight")
        weight[33] = weight[12] * 1.7  # the norm makes these two alike
    memory = TokenMemory(model)
    coefficients = everything(memory, 1)
    unit = coefficients / coefficients.norm(dim=1, keepdim=True)
    cosines = unit @ unit[12]
    cosines[12] = -2
    found = memory.nearest_tokens(12, layer=1, count=5)
    assert [token for token, _ in found] == cosines.argsort(descending=True)[:5].tolist()
    assert found[0][0] == 33
    assert found[0][1] == pytest.approx(1.0, abs=1e-4)  # not exactly: the norm has an epsilon
    mask = torch.ones(512, dtype=torch.bool)
    mask[33] = False
    assert 33 not in [token for token, _ in memory.nearest_tokens(12, layer=1, count=5, mask=mask)]


def test_what_statements_hold_for():
    assert TokenMemory(random_model(VARIED["nano-memory"])).scope == "every context"
    assert "FFN-C" in TokenMemory(random_model(VARIED["nano-flex3"])).scope
    dense = TokenMemory(random_model(VARIED["nano-base"]))
    assert not dense.exact
    assert dense.layers == (0,)
    assert "first of its sequence" in dense.scope


def test_what_cannot_be_read():
    with pytest.raises(ValueError, match="a free table has no keys and values"):
        TokenMemory(random_model(VARIED["table"]))
    unloaded = random_model(VARIED["nano-memory"])
    unloaded.drop_memory()
    with pytest.raises(ValueError, match="its memory weights are not loaded"):
        TokenMemory(unloaded)
    memory = TokenMemory(random_model(VARIED["nano-memory"]))
    with pytest.raises(ValueError, match="layer 3 is out of range: the model has layers 0 to 2"):
        memory.coefficients(torch.tensor([5]), layer=3)
    with pytest.raises(ValueError, match="layer 1 of a dense model reads the context"):
        TokenMemory(random_model(VARIED["nano-base"])).coefficients(torch.tensor([5]), layer=1)
    with pytest.raises(ValueError, match="token id 512 is out of range"):
        memory.nearest_tokens(512)
    with pytest.raises(ValueError, match=r"key 9999 is out of range: layer 0 has keys 0 to"):
        memory.top_tokens(layer=0, key=9999)
