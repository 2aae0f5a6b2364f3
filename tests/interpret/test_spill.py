"""The spill report is how far rows move: all of them, measured one by one."""

import copy

import pytest
import torch

from flexmemory.interpret.kept import Kept
from flexmemory.interpret.rank_one import rank_one_moves, smoothed
from flexmemory.interpret.spill import SumLengths, spill
from flexmemory.interpret.tkv import TokenMemory
from tests.conftest import VARIED, random_model

IDS = torch.arange(512)


def measured(memory: TokenMemory, patch) -> torch.Tensor:
    edited = patch.apply(memory.model)
    return (edited.compute_rows(IDS) - memory.model.compute_rows(IDS)).norm(dim=2).detach()


EDITS = {
    "value": lambda edit: edit.scale_value(layer=1, key=3, factor=1.01),
    "values": lambda edit: [edit.scale_value(layer=1, key=key, factor=0.5) for key in range(20)],
    "key": lambda edit: edit.scale_key(layer=1, key=4, factor=0.99),
    "rank one": lambda edit: edit.rank_one(9, layer=1, row=1.5 * edit.row(9, layer=1)),
    "rank one, little": lambda edit: edit.rank_one(9, layer=1, row=1.0001 * edit.row(9, layer=1)),
    "rank one twice": lambda edit: [edit.rank_one(t, layer=1, row=2 * edit.row(t, layer=1)) for t in (9, 10)],
    "rank one and values": lambda edit: [
        edit.rank_one(9, layer=1, row=edit.row(8, layer=1)),
        edit.scale_value(layer=1, key=3, factor=0.5),
    ],
}


@pytest.mark.parametrize("change", EDITS)
def test_in_fp32_it_errs_no_more_than_the_plain_computation(change):
    memory = TokenMemory(random_model(VARIED["nano-memory"], dtype=torch.float32))
    kept = Kept(budget_bytes=1 << 30)
    for number in range(2):  # of the model, and of its edited copy, of which something is known already
        with memory.edit(kept=kept) as edit:
            EDITS[change](edit)
        edited = TokenMemory(edit.patch.apply(memory.model))
        exact = [TokenMemory(copy.deepcopy(each.model).double()).rows(IDS, layer=1) for each in (edited, memory)]
        expected = (exact[0] - exact[1]).norm(dim=1)
        changed = edited.values(1) - memory.values(1)
        old, new = (each.coefficients(IDS, layer=1) for each in (memory, edited))
        plain = ((new - old) @ edited.values(1) + old @ changed).norm(dim=1).double()
        moved = spill(memory, edit.patch, kept=kept).moved[:, 0]
        allowed = 2 * (plain - expected).abs().max() + 1e-7 * expected.max()
        assert (moved - expected).abs().max() <= allowed, number
        some = expected > 1e-2 * expected.max()  # small movements too, as far as they are more than rounding
        torch.testing.assert_close(moved[some], expected[some], rtol=2e-4, atol=0)
        assert torch.equal(moved, spill(memory, edit.patch, kept=kept).moved[:, 0]), "the second time"
        memory = edited


@pytest.mark.parametrize("vectors", ["few", "one", "many", "nearly a line", "zero"])
def test_lengths_of_sums(vectors):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(200, {"few": 5, "one": 1}.get(vectors, 40), generator=generator, dtype=torch.float64)
    made = torch.randn(weights.shape[1], 16, generator=generator, dtype=torch.float64)
    if vectors == "nearly a line":
        line = torch.outer(made[:, 0], made[0])
        made = line + 1e-6 * made
        weights[:100] -= torch.outer(weights[:100] @ made[:, 0], made[:, 0]) / made[:, 0].square().sum()
    if vectors == "zero":
        made.zero_()
    expected = (weights @ made).norm(dim=1)
    lengths = SumLengths(made)
    torch.testing.assert_close(lengths.of(weights), expected, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(lengths.of(weights, at_most=2 * weights.norm(dim=1)), expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("budget_bytes", [0, 1 << 30])
@pytest.mark.parametrize("name", ["nano-memory", "nano-flex2", "ffn+table"])
def test_spill_is_how_far_rows_move(name, budget_bytes):
    memory, kept = TokenMemory(random_model(VARIED[name])), Kept(budget_bytes=budget_bytes)
    with memory.edit(kept=kept) as edit:
        edit.scale_row(7, layer=0, factor=0.0)
        edit.scale_value(layer=0, key=3, factor=0.5)
        edit.scale_key(layer=0, key=4, factor=0.5)
        edit.set_key(layer=0, key=5, vector=torch.ones(memory.hidden_size), gate=torch.ones(memory.hidden_size))
        edit.rank_one(9, layer=1, row=torch.ones(memory.hidden_size))
        edit.scale_value(layer=1, key=3, factor=0.5)
    report = spill(memory, edit.patch, kept=kept)
    assert report.layers == (0, 1)
    torch.testing.assert_close(report.moved, measured(memory, edit.patch)[:, :2], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(report.lengths, memory.model.compute_rows(IDS)[:, :2].norm(dim=2).detach())
    assert report.tokens == (7, 9)
    others = report.moved.clone()
    others[[7, 9]] = -1
    assert report.worst(1)[0][0] == int(others.amax(1).argmax())
    assert [size for *_, size in report.worst(5)] == sorted((size for *_, size in report.worst(5)), reverse=True)


def test_row_edits_move_nobody_else():
    memory = TokenMemory(random_model(VARIED["nano-memory"]))
    with memory.edit() as edit:
        edit.swap_rows(3, 4, layers=[1])
    report = spill(memory, edit.patch)
    assert report.layers == (1,)
    assert report.moved.nonzero()[:, 0].tolist() == [3, 4]
    assert report.worst(5) == []
    (entry,) = report.summary()
    assert (entry["moved"], entry["any"], entry["max"], entry["mean"], entry["weighted_mean"]) == (0, 0, 0, 0, 0)


def test_rank_one_moves_by_its_formula():
    memory = TokenMemory(random_model(VARIED["nano-flex1"]))
    counts = torch.randint(50, (512,), generator=torch.Generator().manual_seed(0))
    target = torch.ones(memory.hidden_size, dtype=torch.float64)
    with memory.edit() as edit:
        edit.rank_one(9, layer=1, row=target, counts=counts)
    (step,) = edit.patch.steps
    assert step.factors is not None
    formula = rank_one_moves(memory, layer=1, left=step.numbers[0], right=step.factors[0])
    torch.testing.assert_close(formula, measured(memory, edit.patch)[:, 1], rtol=1e-8, atol=1e-10)
    # By its definition: |c_t^T C^-1 c_t'| / (c_t^T C^-1 c_t) * ||v* - W c_t||.
    c = memory.coefficients(IDS, layer=1)
    moment = (smoothed(counts, vocab_size=512)[:, None] * c).T @ c
    moment += 1e-6 * moment.diagonal().mean() * torch.eye(memory.num_keys)
    solved = torch.linalg.solve(moment, c[9])
    distance = (target - memory.rows(torch.tensor([9]), layer=1)[0]).norm()
    torch.testing.assert_close(formula, (c @ solved).abs() / (c[9] @ solved) * distance, rtol=1e-6, atol=1e-8)


def test_summaries_weigh_tokens_by_their_counts():
    memory = TokenMemory(random_model(VARIED["nano-memory"]))
    with memory.edit() as edit:
        edit.rank_one(9, layer=0, row=torch.ones(memory.hidden_size, dtype=torch.float64))
    report = spill(memory, edit.patch)
    counts = torch.zeros(512, dtype=torch.int64)
    counts[[9, 20]] = 10**12
    (entry,) = report.summary(counts=counts, epsilon=0.05)
    assert entry["weighted_mean"] == pytest.approx(float(report.moved[20, 0]), rel=1e-6)
    moved = report.moved[IDS != 9, 0]
    assert entry["max"] == float(moved.max())
    assert entry["mean"] == pytest.approx(float(moved.mean()))
    assert entry["moved"] == int((moved > 0.05 * report.lengths[:, 0].mean()).sum())
    assert 0 < entry["moved"] < entry["any"] == 511


def test_a_changed_embedding_moves_its_token_alone():
    memory = TokenMemory(random_model(VARIED["nano-flex1"]))
    with memory.edit() as edit:
        edit.inject(40, embedding=torch.ones(memory.hidden_size))
    report = spill(memory, edit.patch)
    assert report.layers == memory.layers
    assert report.moved.nonzero()[:, 0].unique().tolist() == [40]
    torch.testing.assert_close(report.moved, measured(memory, edit.patch))


def test_small_weights_lose_no_digits():
    memory = TokenMemory(random_model(VARIED["nano-memory"], dtype=torch.bfloat16))
    with memory.edit() as edit:
        edit.scale_value(layer=0, key=3, factor=1.0625)
    report = spill(memory, edit.patch)
    exact = TokenMemory(random_model(VARIED["nano-memory"], dtype=torch.bfloat16).double())
    change = edit.patch.steps[0].numbers[0].double() - exact.values(0)[3]
    expected = exact.coefficients(IDS, layer=0)[:, 3].abs() * change.norm()
    torch.testing.assert_close(report.moved[:, 0], expected, rtol=1e-3, atol=1e-6)
    assert memory.model.dtype == torch.bfloat16
