"""A step by operations equals the model's own forward, whatever carries the operations out."""

# pyright: reportArgumentType=false, reportCallIssue=false

import pytest
import torch

from flexmemory.engine import plain
from flexmemory.engine.decode import residual_stream
from flexmemory.engine.slots import Slots
from tests.conftest import VARIED, random_model

FEW = ["nano-base", "nano-flex3", "grouped-query", "untied", "square-2"]
CASES = [(name, "plain") for name in VARIED]
CASES += [pytest.param(name, kind, marks=pytest.mark.interpreted) for kind in ("narrow", "wide") for name in FEW]
PROMPT = [7, 3, 500, 3, 12, 9, 44, 2, 9, 100, 101, 102]


def operations_of(kind):
    if kind == "plain":
        return plain
    from flexmemory.engine.narrow import NarrowKernels
    from flexmemory.engine.wide import WideKernels

    device = torch.device("cpu")
    return WideKernels(device) if kind == "wide" else NarrowKernels(device, pdl=False)


def filled(model, lengths):
    """Slots that hold the first `lengths` tokens of the prompt, after garbage."""
    slots = Slots(model.config, num_slots=len(lengths), capacity=40, dtype=model.dtype)
    slots.states.fill_(torch.nan)
    for slot, length in enumerate(lengths):
        if length:
            model(torch.tensor([PROMPT[:length]]), kv_cache=slots.prompt_cache(slot, length=0))
        slots.filled(slot, length)
    return slots


@pytest.mark.parametrize(("name", "kind"), CASES)
@torch.no_grad()
def test_a_step_equals_the_forward(name, kind):
    dtype = torch.float64 if kind == "plain" else torch.float32
    model = random_model(VARIED[name], dtype=dtype)
    lengths = [12, 5, 0]
    slots = filled(model, lengths)
    token_ids = torch.tensor([3, 77, 500])
    table = model.compute_rows(torch.arange(512)) if model.config.has_memory else None
    operations = operations_of(kind)
    x = residual_stream(
        model,
        operations,
        model.embed(token_ids),
        row=lambda layer: None if table is None else plain.RowOf(table[:, layer], token_ids),
        rotary=slots.rotary.to(torch.float64 if kind == "plain" else torch.float32),
        lengths=slots.lengths,
        states=slots.states,
    )
    logits = operations.logits(x, model.norm, model.head)
    expected = torch.cat(
        [model(torch.tensor([[*PROMPT[:n], int(token)]]))[:, -1] for n, token in zip(lengths, token_ids, strict=True)]
    )
    tolerance = 1e-10 if kind == "plain" else 1e-4
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.interpreted
@pytest.mark.parametrize("name", FEW)
@torch.no_grad()
def test_chunks_of_a_prompt_equal_the_forward(name):
    from flexmemory.engine.prompt import Prompts

    model = random_model(VARIED[name], dtype=torch.float32)
    slots = Slots(model.config, num_slots=3, capacity=40)
    slots.states.fill_(torch.nan)
    prompts = Prompts(model, slots, longest=16)
    logits = torch.empty(0)
    for start, stop in ((0, 7), (7, 8), (8, 12)):
        ids = torch.tensor([PROMPT[start:stop]])
        rows = model.rows(ids) if model.config.has_memory else None
        logits = prompts.logits(ids, rows, 1, start=start)
    torch.testing.assert_close(logits, model(torch.tensor([PROMPT]))[:, -1], rtol=1e-4, atol=1e-5)
    assert slots.states[:, :, 1, :, :12].isfinite().all()
    assert slots.states[:, :, [0, 2]].isnan().all()


class Replayed:
    """A graph that is computed again, for a machine without graphs."""

    def __init__(self, compute):
        self._compute, self.result = compute, compute()

    def replay(self):
        self.result.copy_(self._compute())


@pytest.mark.interpreted
@pytest.mark.parametrize("name", ["nano-base", "nano-flex3"])
@torch.no_grad()
def test_captured_chunks_serve_any_slot_and_shorter_prompts(name, monkeypatch):
    from flexmemory.engine import prompt

    captured = []

    def capture(compute, pool):
        captured.append(Replayed(compute))
        return captured[-1], captured[-1].result

    monkeypatch.setattr(prompt, "_captured", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(prompt, "SMALLEST", 4)
    model = random_model(VARIED[name], dtype=torch.float32)
    slots = Slots(model.config, num_slots=3, capacity=16)
    slots.states.fill_(torch.nan)
    prompts = prompt.Prompts(model, slots, longest=8)
    for number, (length, slot) in enumerate([(7, 0), (8, 1), (3, 2), (5, 2), (4, 0), (1, 1)]):
        ids = torch.tensor([PROMPT[number : number + length]])
        rows = model.rows(ids) if model.config.has_memory else None
        logits = prompts.logits(ids, rows, slot, start=0)
        torch.testing.assert_close(logits, model(ids)[:, -1], rtol=1e-4, atol=1e-5)
        keys = slots.states[:, :, slot, :, :length].clone()
        model(ids, kv_cache=slots.prompt_cache(slot, length=0))
        torch.testing.assert_close(keys, slots.states[:, :, slot, :, :length], rtol=1e-4, atol=1e-5)
    assert len(captured) == 2  # of 8 tokens and of 4, each the second time
    assert prompts.give_back()
    assert not prompts.give_back()
    for _ in range(3):
        ids = torch.tensor([PROMPT[:6]])
        rows = model.rows(ids) if model.config.has_memory else None
        torch.testing.assert_close(prompts.logits(ids, rows, 0, start=0), model(ids)[:, -1], rtol=1e-4, atol=1e-5)
    assert len(captured) == 2


@pytest.mark.interpreted
@pytest.mark.parametrize("hot", [True, False])
@pytest.mark.parametrize("mailbox", [True, False])
def test_rows_are_staged_bit_by_bit(hot, mailbox):
    from flexmemory.engine.feed import _stage

    words, num_slots = 300, 4
    generator = torch.Generator().manual_seed(0)
    table = torch.randint(-(2**31), 2**31 - 1, (50, words), dtype=torch.int32, generator=generator)
    token_ids = torch.tensor([7, 30, 7, 41])
    steps = torch.tensor([4, 5, 9, 2])
    places = torch.full((50,), -1, dtype=torch.int32)
    places[torch.tensor([41, 7])] = torch.tensor([0, 1], dtype=torch.int32)
    below = table
    if mailbox:
        below = torch.zeros((2, num_slots, words), dtype=torch.int32)
        for slot, (token, step) in enumerate(zip(token_ids.tolist(), steps.tolist(), strict=True)):
            below[step % 2, slot] = table[token]
    out = torch.full((num_slots, words), -1, dtype=torch.int32)
    _stage[num_slots, 3](
        token_ids, torch.ones(num_slots, dtype=torch.bool), places, table[[41, 7]], below, steps, steps, out,
        num_slots, words, HAS_HOT=hot, MAILBOX=mailbox, WORDS=128, PATIENCE=10,
    )  # fmt: skip
    assert torch.equal(out, table[token_ids])


@pytest.mark.interpreted
@pytest.mark.parametrize("forced", [True, False])
def test_a_step_ends_where_the_next_begins(forced):
    from flexmemory.engine.graph import _finish

    tokens, inputs = torch.tensor([11, 12, 13]), torch.tensor([1, 2, 3])
    given = torch.arange(3 * 6).reshape(3, 6)
    lengths, active = torch.tensor([4, 0, 5], dtype=torch.int32), torch.tensor([True, False, True])
    steps, ring = torch.tensor([2, 9, 0]), torch.zeros(3, 8, dtype=torch.int64)
    _finish[(3,)](tokens, given, 6, inputs, lengths, active, steps, ring, FORCED=forced, RING=8)
    chosen = [given[0, 5], given[1, 1], given[2, 5]] if forced else tokens  # at the capacity, the last
    assert inputs.tolist() == [chosen[0], 2, chosen[2]]
    assert lengths.tolist() == [5, 0, 6]
    assert steps.tolist() == [3, 10, 1]
    assert [int(ring[slot, step]) for slot, step in ((0, 2), (1, 1), (2, 0))] == [
        (step + 1) << 32 | int(token) for step, token in zip((2, 9, 0), chosen, strict=True)
    ]


@pytest.mark.interpreted
def test_rows_are_gathered_from_pinned_memory(monkeypatch):
    from flexmemory.tol.pinned import gather_pinned

    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
    table = torch.randint(0, 256, (20, 9000), dtype=torch.uint8)
    token_ids = torch.tensor([3, 19, 3, 0])
    out = torch.zeros(4, 9000, dtype=torch.uint8)
    gather_pinned(table, token_ids, out)
    assert torch.equal(out, table[token_ids])
