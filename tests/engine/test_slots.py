"""Slots hold sequences of different lengths that decode as each would alone."""

import pytest
import torch

from flexmemory.engine.sampling import Sampling
from flexmemory.engine.slots import Slots
from tests.conftest import VARIED, random_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PROMPTS = (3, 9, 1, 6)


def filled(model, ids):
    """Slots with a prompt in each, poisoned before."""
    device = model.embedding.weight.device
    slots = Slots(model.config, num_slots=len(PROMPTS), capacity=24, device=device, dtype=torch.float64)
    slots.states.fill_(torch.nan)
    for slot, length in enumerate(PROMPTS):
        slots.open(slot, Sampling())
        logits = model(ids[slot : slot + 1, :length], kv_cache=slots.prompt_cache(slot, length=0))
        slots.filled(slot, length)
        slots.start(slot, logits[:, -1])
    return slots


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", VARIED)
@torch.no_grad()
def test_teacher_forced_steps_equal_the_full_forward(name, device, tokens):
    model = random_model(VARIED[name]).to(device)
    ids = tokens(4, 24).to(device)
    expected, slots = model(ids), filled(model, ids)
    places = torch.arange(4, device=device)
    for step in range(10):
        lengths = slots.lengths[:, None]
        token_ids = ids[places, slots.lengths.long()][:, None]
        cache = slots.step_cache(4, longest=int(lengths.max()))
        logits = model(token_ids, kv_cache=cache, positions=lengths)[:, 0]  # (B, V)
        torch.testing.assert_close(logits, expected[places, slots.lengths.long()], rtol=1e-9, atol=1e-9)
        assert slots.advance(logits, slots.how).tolist() == logits.argmax(dim=-1).tolist()
        assert slots.lengths.tolist() == [length + step + 1 for length in PROMPTS]


@torch.no_grad()
def test_a_step_changes_what_it_should(tokens):
    """Only the slots of the step, each at its length; of those that are not active, nothing that counts."""
    model = random_model(VARIED["nano-memory"])
    slots = filled(model, tokens(4, 24))
    slots.stop(1)
    before, lengths = slots.states.clone(), slots.lengths.clone()
    cache = slots.step_cache(3, longest=9)
    hidden = model.hidden_states(slots.token_ids[:3, None], None, cache, lengths[:3, None])
    slots.advance(model.head(hidden[:, -1]), slots.how)
    assert slots.lengths.tolist() == [4, 9, 2, 6]
    changed = (slots.states != before).any(dim=(0, 1, 3, 5)).nonzero().tolist()
    assert changed == [[0, 3], [1, 9], [2, 1]]


@torch.no_grad()
def test_moving_and_closing(tokens):
    model = random_model(VARIED["nano-memory"])
    slots = filled(model, tokens(4, 24))
    sampling = Sampling(temperature=1.0, top_k=3, top_p=0.5, seed=8)
    slots.open(0, Sampling())
    slots.close(3)
    slots.open(3, sampling)
    slots.filled(3, 5)
    slots.start(3, torch.arange(512.0)[None])
    states, token = slots.states[:, :, 3, :, :5].clone(), int(slots.token_ids[3])
    assert slots.how == "filtered"
    slots.move(3, 0, length=5)
    assert torch.equal(slots.states[:, :, 0, :, :5], states)
    assert not slots.states[:, :, 0, :, 5:].any()
    assert (int(slots.token_ids[0]), int(slots.lengths[0]), bool(slots.active[0])) == (token, 5, True)
    assert (int(slots.lengths[3]), bool(slots.active[3])) == (0, False)
    settings = slots.sampling
    assert [float(t[0]) for t in (settings.temperature, settings.top_k, settings.top_p, settings.seeds)] == [
        1,
        3,
        0.5,
        8,
    ]
    assert float(settings.temperature[3]) == 0
    slots.close(0)
    assert slots.how == "greedy"
