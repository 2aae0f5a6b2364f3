"""Reading and editing on a GPU: the same statements as on a CPU, and edits that leave the rest bit for bit."""

import copy

import pytest
import torch

from flexmemory.interpret.tkv import TokenMemory
from tests.conftest import VARIED, random_model

pytestmark = pytest.mark.gpu
IDS = torch.arange(512)


@pytest.mark.parametrize("name", ["nano-memory", "nano-flex2", "ffn+table"])
def test_what_is_read_is_what_the_cpu_reads(name):
    memory = TokenMemory(random_model(VARIED[name], dtype=torch.float64))
    there = TokenMemory(copy.deepcopy(memory.model).cuda())
    for layer in memory.layers:
        ids = IDS[:40]
        torch.testing.assert_close(
            there.coefficients(ids.cuda(), layer=layer).cpu(), memory.coefficients(ids, layer=layer)
        )
        found, expected = (which.top_keys(7, layer=layer, count=5) for which in (there, memory))
        assert [cell.key for cell in found] == [cell.key for cell in expected]
        torch.testing.assert_close(there.column(layer=layer, key=3).cpu(), memory.column(layer=layer, key=3))


@pytest.mark.parametrize("name", ["nano-memory", "nano-flex2", "ffn+table"])
def test_edits_move_what_they_say_and_nothing_else(name):
    model = random_model(VARIED[name], dtype=torch.float32).cuda()
    memory = TokenMemory(model)
    ids = IDS.cuda()
    with memory.edit() as edit:
        edit.set_row(7, layer=1, row=torch.ones(memory.hidden_size))
        edit.scale_row(9, layer=0, factor=-0.5)
        edit.swap_rows(11, 12, layers=[1])
    edited = edit.patch.apply(model)
    before, after = model.compute_rows(ids), edited.compute_rows(ids)
    others = [token for token in range(512) if token not in (7, 9, 11, 12)]
    assert torch.equal(after[others], before[others])
    assert torch.equal(after[7, 1], torch.ones_like(after[7, 1]))
    torch.testing.assert_close(after[11, 1], before[12, 1])  # computed in another batch: other rounding
    text = torch.tensor([[1, 2, 3, 4, 5, 6]]).cuda()
    assert torch.equal(edited(text), model(text))
    with_it = torch.tensor([[1, 2, 7, 4, 5, 6]]).cuda()
    changed = (edited(with_it) != model(with_it)).any(dim=-1)[0]
    assert changed.tolist() == [False, False, True, True, True, True]


def test_values_are_edited():
    model = random_model(VARIED["nano-flex2"], dtype=torch.float64).cuda()
    memory = TokenMemory(model)
    with memory.edit() as edit:
        edit.scale_value(layer=1, key=3, factor=0.0)
    found = edit.patch.apply(model).compute_rows(IDS.cuda())
    here = TokenMemory(copy.deepcopy(model).cpu())
    with here.edit() as edit:
        edit.scale_value(layer=1, key=3, factor=0.0)
    torch.testing.assert_close(found.cpu(), edit.patch.apply(here.model).compute_rows(IDS))
