"""What is kept is what would be computed again, for as long as the weights are the same."""

import torch

from flexmemory.interpret.kept import Kept, all_coefficients, row_lengths, tell_row_lengths
from flexmemory.interpret.tkv import TokenMemory
from tests.conftest import VARIED, random_model

IDS = torch.arange(512)


def counting(size: int = 1):
    """What makes a tensor of some bytes, and how often it was asked to."""
    made = []

    def make() -> tuple[torch.Tensor]:
        made.append(torch.zeros(size, dtype=torch.uint8))
        return (made[-1],)

    return make, made


def test_it_is_made_once_for_the_same_weights():
    kept, weights, (make, made) = Kept(budget_bytes=100), [torch.ones(2), torch.ones(2)], counting()
    assert kept.get("a", weights, make)[0] is kept.get("a", weights, make)[0]
    assert len(made) == 1
    kept.get("b", weights, make)
    kept.get("a", weights[::-1], make)
    kept.get("a", [weights[0], torch.ones(2)], make)
    assert len(made) == 4


def test_what_was_used_least_goes_first():
    kept, weights, (make, made) = Kept(budget_bytes=100), [torch.ones(2)], counting(40)
    for name in ("a", "b", "a", "c"):  # c takes the place of b
        kept.get(name, weights, make)
    assert (len(made), kept.nbytes) == (3, 80)
    kept.get("a", weights, make)
    assert len(made) == 3
    kept.get("b", weights, make)
    assert len(made) == 4
    assert kept.holds(50)
    assert not kept.holds(51)


def test_nothing_is_kept_without_a_budget_or_weights():
    kept, weights, (make, made) = Kept(), [torch.ones(2)], counting()
    assert kept.get("a", weights, make)[0] is not kept.get("a", weights, make)[0]
    kept = Kept(budget_bytes=100)
    kept.get("a", weights, make)
    assert kept.nbytes == 1
    weights[0] = torch.ones(2)  # the first is gone, and its id may come again
    kept.get("a", weights, make)
    assert (len(made), kept.nbytes) == (4, 1)


def test_what_is_told_is_given_and_never_dropped():
    kept, weights, (make, made) = Kept(), [torch.ones(2)], counting()
    known = torch.tensor([3.0])
    kept.tell("a", weights, (known,))
    kept.get("b", weights, make)
    assert kept.get("a", weights, make)[0] is known
    kept.get("a", [torch.ones(2)], make)
    assert len(made) == 2


def test_row_lengths_follow_every_edit():
    memory, kept = TokenMemory(random_model(VARIED["ffn+table"])), Kept(budget_bytes=1 << 30)
    with memory.edit() as edit:
        edit.scale_row(7, layer=1, factor=3.0)
    given = TokenMemory(edit.patch.apply(memory.model))
    with given.edit() as more:
        more.scale_value(layer=1, key=3, factor=0.0)
        more.scale_row(8, layer=1, factor=2.0)
    for each in (memory, given, TokenMemory(more.patch.apply(given.model)), memory):
        for layer in (0, 1):
            expected = each.model.compute_rows(IDS)[:, layer].norm(dim=1).detach()
            torch.testing.assert_close(row_lengths(each, layer=layer, kept=kept), expected, rtol=1e-12, atol=0)
    assert kept.nbytes == 3 * 512 * 8, "a pass for each layer of the original, and one for the changed W_down"


def test_row_lengths_that_are_told_hold_where_no_weight_changed():
    memory, kept = TokenMemory(random_model(VARIED["nano-memory"])), Kept()
    tell_row_lengths(memory, layer=0, lengths=torch.full((512,), 2.0), kept=kept)
    with memory.edit() as edit:
        edit.set_row(7, layer=0, row=torch.zeros(memory.hidden_size))
        edit.scale_key(layer=1, key=3, factor=0.0)
    lengths = row_lengths(TokenMemory(edit.patch.apply(memory.model)), layer=0, kept=kept)
    assert lengths[[6, 7, 8]].tolist() == [2, 0, 2]
    with memory.edit() as edit:
        edit.scale_key(layer=0, key=3, factor=0.0)
    edited = TokenMemory(edit.patch.apply(memory.model))
    expected = edited.rows(IDS, layer=0).norm(dim=1)
    torch.testing.assert_close(row_lengths(edited, layer=0, kept=kept), expected)


def test_coefficients_are_the_same_kept_or_not():
    memory = TokenMemory(random_model(VARIED["nano-flex1"], dtype=torch.bfloat16))
    exact = TokenMemory(random_model(VARIED["nano-flex1"], dtype=torch.bfloat16).float())
    for kept in (Kept(), Kept(budget_bytes=1 << 30)):
        parts, lengths = zip(*all_coefficients(memory, layer=1, kept=kept), strict=True)
        assert torch.equal(torch.cat(parts), exact.coefficients(IDS, layer=1))
        assert torch.equal(torch.cat(lengths), torch.cat(parts).norm(dim=1))
    assert kept.nbytes == 512 * (memory.num_keys + 1) * 4
