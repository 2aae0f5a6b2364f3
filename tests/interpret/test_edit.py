"""Every edit against the same arithmetic done by hand in fp64; what is not edited keeps its bits."""

import copy

import pytest
import torch
from torch.nn import functional as F

from flexmemory.interpret.hooks import run_with_hooks
from flexmemory.interpret.rank_one import second_moment, smoothed
from flexmemory.interpret.tkv import TokenMemory
from flexmemory.model.transformer import Transformer
from tests.conftest import VARIED, random_model

EDITABLE = ["nano-memory", "nano-flex2", "ffn+table", "untied"]
IDS = torch.arange(512)


def memory_of(name: str, dtype: torch.dtype = torch.float64) -> TokenMemory:
    return TokenMemory(random_model(VARIED[name], dtype=dtype))


def rows_of(model: Transformer) -> torch.Tensor:
    return model.compute_rows(IDS).detach()


@pytest.mark.parametrize("name", EDITABLE)
def test_rows_are_set_added_to_scaled_and_swapped(name):
    memory = memory_of(name)
    before = rows_of(memory.model)
    vector = torch.randn(memory.hidden_size, dtype=torch.float64)
    expected = before.clone()
    expected[7, 1] = vector
    expected[8, 0] += vector
    expected[9, 1] *= -0.5
    expected[[7, 10], 1] = expected[[10, 7], 1]
    with memory.edit() as edit:
        edit.set_row(7, layer=1, row=vector)
        edit.add_row(8, layer=0, delta=vector)
        edit.scale_row(9, layer=1, factor=-0.5)
        edit.swap_rows(7, 10, layers=[1])
    assert torch.equal(rows_of(memory.model), before)  # copy on write
    after = rows_of(edit.patch.apply(memory.model))
    torch.testing.assert_close(after, expected, rtol=1e-12, atol=1e-12)
    others = [token for token in range(512) if token not in (7, 8, 9, 10)]
    assert torch.equal(after[others], before[others])
    assert edit.patch.tokens == (7, 8, 9, 10)
    assert edit.patch.rows_only


@pytest.mark.parametrize("name", ["nano-memory", "nano-flex1"])
def test_without_the_token_logits_keep_their_bits(name, tokens):
    memory = memory_of(name, torch.float32)
    with memory.edit() as edit:
        for layer in memory.layers:
            edit.scale_row(3, layer=layer, factor=0.0)
    edited = edit.patch.apply(memory.model)
    ids = tokens(4, 12)
    ids[ids == 3] = 4
    assert torch.equal(edited(ids), memory.model(ids))
    ids[1, 5] = 3
    changed = edited(ids) != memory.model(ids)
    assert changed[1, 5:].any(dim=1).all()
    changed[1, 5:] = False
    assert not changed.any()


def test_looked_up_rows_can_be_edited_as_well(tokens):
    memory = memory_of("nano-flex2")
    with memory.edit() as edit:
        edit.scale_row(3, layer=0, factor=2.0)
        edit.scale_row(5, layer=1, factor=0.0)
    ids = tokens(2, 9)
    ids[0, 2], ids[1, 8] = 3, 5
    rows = memory.model.rows(ids)
    over = edit.patch.over(rows, ids)
    edited = edit.patch.apply(memory.model)
    for layer in memory.layers:
        looked_up, computed = over.layer(layer), edited.rows(ids).layer(layer)
        assert looked_up is not None
        assert computed is not None
        assert torch.equal(looked_up, computed)
    assert torch.equal(memory.model(ids, over), edited(ids))
    with memory.edit() as edit:
        edit.scale_value(layer=0, key=0, factor=2.0)
    with pytest.raises(ValueError, match="changes weights"):
        edit.patch.over(rows, ids)


@pytest.mark.parametrize("name", EDITABLE)
def test_values_keys_and_gates(name):
    memory = memory_of(name)
    value, key, gate = torch.randn(3, memory.hidden_size, dtype=torch.float64)
    by_hand = copy.deepcopy(memory.model)
    ffn = by_hand.memories[1].ffn
    assert ffn is not None
    with torch.no_grad():
        ffn.down.weight[:, 4] = value
        ffn.down.weight[:, 5] *= 3
        ffn.up.weight[6], ffn.gate.weight[6] = key, gate
        ffn.up.weight[7] *= 0.25
    with memory.edit() as edit:
        edit.set_value(layer=1, key=4, value=value)
        edit.scale_value(layer=1, key=5, factor=3.0)
        edit.set_key(layer=1, key=6, vector=key, gate=gate)
        edit.scale_key(layer=1, key=7, factor=0.25)
    edited = edit.patch.apply(memory.model)
    assert torch.equal(rows_of(edited), rows_of(by_hand))
    assert TokenMemory(edited).cells(0).up.weight is memory.cells(0).up.weight  # what is not edited is shared
    assert not torch.equal(rows_of(edited), rows_of(memory.model))


@pytest.mark.parametrize("name", ["nano-memory", "ffn+table"])
def test_a_key_is_scaled_for_some_tokens(name):
    memory = memory_of(name)
    ids = torch.tensor([11, 400])
    before = rows_of(memory.model)
    change = 1.5 * memory.coefficients(ids, layer=1)[:, 9, None] * memory.values(1)[9]
    with memory.edit() as edit:
        edit.scale_key(layer=1, key=9, factor=2.5, token_ids=ids)
    after = rows_of(edit.patch.apply(memory.model))
    torch.testing.assert_close(after[ids, 1], before[ids, 1] + change, rtol=1e-12, atol=1e-12)
    after[ids, 1] = before[ids, 1]
    assert torch.equal(after, before)


@pytest.mark.parametrize("counted", [False, True])
def test_rank_one_gives_the_row_and_moves_the_others_least(counted):
    memory = memory_of("ffn+table")
    counts = torch.randint(1000, (512,), generator=torch.Generator().manual_seed(1)) if counted else None
    target = torch.randn(memory.hidden_size, dtype=torch.float64)
    with memory.edit() as edit:
        edit.rank_one(17, layer=1, row=target, counts=counts)
    before, after = rows_of(memory.model), rows_of(edit.patch.apply(memory.model))
    torch.testing.assert_close(after[17, 1], target, rtol=1e-8, atol=1e-8)
    assert torch.equal(after[:, 0], before[:, 0])
    share = (torch.ones(512) if counts is None else counts + 1).double()
    share /= share.sum()
    assert torch.equal(smoothed(counts, vocab_size=512), share)
    # Brute force: of all changes of W_down that give the token its row, the least mean square movement.
    c = memory.coefficients(IDS, layer=1)
    moment = torch.zeros(memory.num_keys, memory.num_keys, dtype=torch.float64)
    for token in range(512):
        moment += share[token] * torch.outer(c[token], c[token])
    torch.testing.assert_close(second_moment(memory, layer=1, counts=counts), moment)
    cost = (share * (after - before)[:, 1].square().sum(1)).sum()
    delta = (after - before)[17, 1]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        nudge = torch.randn(memory.num_keys, generator=generator, dtype=torch.float64)
        nudge -= (nudge @ c[17]) / (c[17] @ c[17]) * c[17]  # the token itself does not see it
        right = c[17] / (c[17] @ c[17]) + 0.1 * nudge
        other = (share * (torch.outer(c @ right, delta)).square().sum(1)).sum()
        assert cost < other
    solution = torch.linalg.solve(moment, c[17])
    expected = torch.outer(c @ solution / (c[17] @ solution), delta)
    torch.testing.assert_close((after - before)[:, 1], expected, rtol=1e-3, atol=1e-4)  # but for the ridge


def test_a_token_is_injected():
    memory = memory_of("nano-memory")
    vectors = torch.randn(3, memory.hidden_size, dtype=torch.float64)
    with memory.edit() as edit:
        edit.inject(500, rows=vectors, embedding=vectors[0])
    edited = edit.patch.apply(memory.model)
    assert torch.equal(rows_of(edited)[500], vectors)
    assert torch.equal(edited.embed(torch.tensor([500]))[0], vectors[0])
    assert edited.embedding is not None
    assert edited.head.weight is edited.embedding.weight  # still tied
    others = IDS != 500
    assert torch.equal(rows_of(edited)[others], rows_of(memory.model)[others])
    ids = torch.tensor([[1, 2, 3]])
    changed = (edited(ids) != memory.model(ids)).any(dim=1)[0]
    assert changed.nonzero().tolist() == [[500]]  # only how it is predicted
    assert not edit.patch.rows_only
    with memory.edit() as edit:
        edit.inject(500)
    assert not rows_of(edit.patch.apply(memory.model))[500].any()


def test_suppressed_values_promote_the_tokens_less():
    memory = memory_of("untied")
    chosen = torch.tensor([5, 6, 7])
    with memory.edit() as edit:
        found = edit.suppress(chosen, count=8, top=20)
    assert len(found) == 8
    edited = TokenMemory(edit.patch.apply(memory.model))
    shares = {}
    for layer in memory.layers:
        for key, value in enumerate(memory.values(layer)):
            logits = memory.project(value)
            logits = logits - logits.mean()
            sides = []
            for sign in (1, -1):
                best = (sign * logits).topk(20)
                sides.append(float(sum(v for i, v in zip(*best[::-1], strict=True) if i in chosen) / best.values.sum()))
            shares[layer, key] = max(sides)
    expected = sorted(shares, key=lambda cell: -shares[cell])[:8]
    assert [(layer, key) for layer, key, _ in found] == expected
    for layer, key, share in found:
        assert share == pytest.approx(shares[layer, key])
        assert not edited.values(layer)[key].any()
    with memory.edit() as edit:
        edit.suppress(chosen, count=8, top=20, strength=0.25)
    layer, key, _ = found[0]
    assert torch.equal(TokenMemory(edit.patch.apply(memory.model)).values(layer)[key], memory.values(layer)[key] * 0.75)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_suppressed_rows_promote_the_tokens_less(strength):
    memory = memory_of("nano-memory")
    chosen = torch.tensor([5, 6, 7])

    def mass(model: Transformer) -> torch.Tensor:
        return F.softmax(memory.project(rows_of(model)), dim=-1)[..., chosen].sum(-1)

    with memory.edit() as edit:
        found = edit.suppress(chosen, level="rows", count=10, strength=strength)
    edited = edit.patch.apply(memory.model)
    before, after = mass(memory.model), mass(edited)
    named = {(token, layer) for layer, token, _ in found}
    assert len(named) == 10
    direction = memory.project(torch.eye(memory.hidden_size, dtype=torch.float64))
    direction = direction[:, chosen].mean(1) - direction.mean(1)
    rows, lowered = rows_of(memory.model), rows_of(edited)
    untouched = torch.ones(512, memory.num_layers, dtype=torch.bool)
    for token, layer in named:
        untouched[token, layer] = False
        assert after[token, layer] < before[token, layer]
        raised, left = float(rows[token, layer] @ direction), float(lowered[token, layer] @ direction)
        assert left == pytest.approx((1 - strength) * raised, abs=1e-9)
    assert torch.equal(lowered[untouched], rows[untouched])
    assert edit.patch.rows_only


def test_edits_see_earlier_ones_and_given_rows_stay():
    memory = memory_of("nano-memory")
    with memory.edit() as edit:
        edit.scale_row(7, layer=0, factor=2.0)
        edit.scale_row(7, layer=0, factor=2.0)
        edit.scale_value(layer=0, key=3, factor=0.0)
        edit.scale_row(8, layer=0, factor=2.0)
        with pytest.raises(ValueError, match="was set before"):
            edit.rank_one(7, layer=0, row=edit.row(8, layer=0))
        with pytest.raises(ValueError, match="was set before"):
            edit.scale_key(layer=0, key=1, factor=2.0, token_ids=torch.tensor([1, 8]))
    edited = edit.patch.apply(memory.model)
    torch.testing.assert_close(rows_of(edited)[7, 0], rows_of(memory.model)[7, 0] * 4)
    c, value = memory.coefficients(torch.tensor([8]), layer=0)[0, 3], memory.values(0)[3]
    torch.testing.assert_close(rows_of(edited)[8, 0], 2 * (rows_of(memory.model)[8, 0] - c * value))


def test_impossible_edits_are_refused():
    memory = memory_of("nano-memory")
    vector = torch.zeros(memory.hidden_size)
    edit = memory.edit()
    for attempt, message in [
        (lambda: edit.patch, "nothing was edited"),
        (lambda: edit.set_row(512, layer=0, row=vector), "token id 512 is out of range"),
        (lambda: edit.set_row(0, layer=3, row=vector), "layer 3 is out of range"),
        (lambda: edit.set_row(0, layer=0, row=vector[:5]), "vectors of"),
        (lambda: edit.set_row(0, layer=0, row=vector + torch.nan), "not all finite"),
        (lambda: edit.set_rows(torch.tensor([1, 1]), layer=0, rows=torch.zeros(2, 48)), "distinct ids"),
        (lambda: edit.scale_row(-1, layer=0, factor=0.0), "token id -1"),
        (lambda: edit.swap_rows(3, 3), "two tokens"),
        (lambda: edit.set_value(layer=0, key=10_000, value=vector), "key 10000 is out of range"),
        (lambda: edit.scale_key(layer=9, key=0, factor=1.0), "layer 9 is out of range"),
        (lambda: edit.inject(3, rows=torch.zeros(1, 48)), "rows must be of"),
        (lambda: edit.rank_one(3, layer=0, row=vector, counts=torch.ones(3, dtype=torch.int64)), "counts must be of"),
        (lambda: edit.rank_one(3, layer=0, row=vector[:5]), "expected a row"),
        (lambda: edit.suppress(torch.tensor([], dtype=torch.int64)), "at least one"),
        (lambda: edit.suppress(torch.tensor([600])), "token id 600"),
        (lambda: edit.suppress(torch.tensor([6]), strength=2.0), "between 0 and 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            attempt()
    with pytest.raises(ValueError, match="nothing was edited"):
        _ = edit.patch
    with pytest.raises(ValueError, match="dense model has no rows"):
        memory_of("nano-base").edit()


def test_a_row_is_set_in_more_digits_than_the_weights_have():
    memory = memory_of("nano-memory", torch.bfloat16)
    with memory.edit() as edit:
        edit.scale_row(7, layer=0, factor=1.0)
    assert edit.patch.steps[0].numbers.dtype == torch.float32
    exact = copy.deepcopy(memory.model).float().compute_rows(torch.tensor([7]))[0, 0]
    assert torch.equal(edit.patch.steps[0].numbers[0], exact.detach())
    assert memory.model.dtype == torch.bfloat16
    row = edit.patch.apply(memory.model).compute_rows(torch.tensor([7]))[0, 0]
    assert torch.equal(row, exact.to(torch.bfloat16))


def test_a_given_row_is_not_of_cells(tokens):
    """Cells that are switched off take nothing off a row that was set."""
    memory = memory_of("nano-memory")
    with memory.edit() as edit:
        edit.scale_row(3, layer=0, factor=2.0)
    edited = edit.patch.apply(memory.model)
    ids = tokens(1, 6)
    ids[0, 2] = 3
    seen = {}
    run_with_hooks(
        edited,
        ids,
        [
            ("blocks.0.mlp.hook_post", lambda activation, _: torch.zeros_like(activation)),
            ("blocks.0.hook_mlp_out", lambda row, name: seen.update({name: row})),
        ],
    )
    row = seen["blocks.0.hook_mlp_out"][0]
    assert row.any(dim=1).nonzero().tolist() == [[2]]
    assert torch.equal(row[2], edit.patch.steps[0].numbers[0])
