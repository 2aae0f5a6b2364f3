"""The memory, read as keys and values, is the FFN."""

import pytest
import torch

from flexmemory.interpret.tkv import coefficients, nearest_tokens
from tests.conftest import VARIED, random_model


@pytest.mark.parametrize("name", ["nano-memory", "nano-flex2"])
def test_a_row_is_the_sum_of_values_times_coefficients(name):
    """Eq. 2.7 and 2.8."""
    model = random_model(VARIED[name])
    ids = torch.tensor([0, 7, 511])
    rows = model.compute_rows(ids)
    for layer, memory in enumerate(model.memories):
        assert memory.ffn is not None
        values = memory.ffn.down.weight.T  # (K, D)
        contributions = coefficients(model, ids, layer=layer)[:, :, None] * values  # (U, K, D)
        torch.testing.assert_close(contributions.sum(dim=1), rows[:, layer], rtol=1e-10, atol=1e-12)


def test_nearest_tokens_are_those_of_the_whole_coefficient_matrix():
    model = random_model(VARIED["nano-flex1"])
    with torch.no_grad():
        weight = model.get_parameter("embedding.weight")
        weight[33] = weight[12] * 1.7  # the norm makes these two alike
        everything = coefficients(model, torch.arange(512), layer=1)
    unit = everything / everything.norm(dim=1, keepdim=True)
    cosines = unit @ unit[12]
    cosines[12] = -2
    found = nearest_tokens(model, 12, layer=1, count=5)
    assert [token for token, _ in found] == cosines.argsort(descending=True)[:5].tolist()
    assert found[0][0] == 33
    assert found[0][1] == pytest.approx(1.0, abs=1e-4)  # not exactly: the norm has an epsilon
    assert 12 not in [token for token, _ in found]


@pytest.mark.parametrize(
    ("name", "layer", "message"),
    [
        ("nano-base", 0, "it is dense"),
        ("table", 0, "a free table has no keys and values"),
        ("nano-memory", 3, "layer 3 is out of range: the model has layers 0 to 2"),
    ],
)
def test_what_cannot_be_read(name, layer, message):
    with pytest.raises(ValueError, match=message):
        nearest_tokens(random_model(VARIED[name]), 5, layer=layer)


def test_token_out_of_range():
    with pytest.raises(ValueError, match="token id 512 is out of range"):
        nearest_tokens(random_model(VARIED["nano-memory"]), 512)
