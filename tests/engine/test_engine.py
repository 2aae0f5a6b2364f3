"""Whatever else the engine does meanwhile, each request gets the tokens that the reference loop gives it alone."""

import dataclasses
import random
import threading

import pytest
import torch

from flexmemory.engine.decoder import EagerDecoder
from flexmemory.engine.engine import Engine
from flexmemory.engine.reference import generate
from flexmemory.engine.sampling import Sampling
from tests.conftest import VARIED, random_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PLACES = ["compute", "device", "host", "disk"]
MODELS = ["nano-memory", "nano-flex3", "grouped-query", "untied", "ffn+table"]
CASES = [("nano-base", "compute"), *[(name, PLACES[i % 4]) for i, name in enumerate(MODELS)]]
CASES += [("nano-flex3", place) for place in ("compute", "host", "disk")]


def decoder_of(model, row_source, *, ahead=0, launches=None):
    """An eager decoder whose tokens the engine collects late, and that notes how many slots each step runs."""

    class Spy(EagerDecoder):
        def launch(self, num_slots):
            ticket = super().launch(num_slots)
            if launches is not None:
                launches.append(num_slots)
            return ticket

    Spy.ahead = ahead
    return lambda slots: Spy(model, slots, row_source)


@pytest.fixture
def poisoned(monkeypatch):
    """New memory is full of NaN, not of zeros that happen to be there."""
    empty = torch.empty

    def nan(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", nan)


def expected_of(loaded, request):
    return list(
        generate(
            loaded.model,
            request.prompt_ids,
            row_source=loaded.row_source,
            sampling=request.sampling,
            max_new_tokens=request.max_new_tokens,
            stop_ids=request.stop_ids,
        )
    )


def random_request(rng):
    sampling = Sampling(
        temperature=rng.choice([0.0, 0.0, 0.7, 1.5]),
        top_k=rng.choice([0, 0, 20]),
        top_p=rng.choice([1.0, 1.0, 0.8]),
        seed=rng.randrange(2**40),
    )
    return {
        "prompt_ids": [rng.randrange(512) for _ in range(rng.choice([1, 2, 5, 17, 38]))],
        "sampling": sampling,
        "max_new_tokens": rng.choice([1, 2, 7, 20, 100]),
        "stop_ids": rng.sample(range(512), rng.choice([0, 0, 30])),
        "scored": rng.random() < 0.4,
    }


def check_likelihoods(model, row_source, request, *, error):
    """Those of a scored request are what one forward pass over its tokens says."""
    assert len(request.likelihoods) == (len(request.tokens) if request.scored else 0)
    if not request.likelihoods:
        return
    ids = torch.tensor([[*request.prompt_ids, *request.tokens[:-1]]], device=model.device)
    with torch.inference_mode():
        rows = model.rows(ids) if row_source is None and model.config.has_memory else row_source and row_source(ids)
        logits = model.head(model.hidden_states(ids, rows)[0, len(request.prompt_ids) - 1 :])
    logs = logits.log_softmax(dim=-1).cpu()
    for token, likelihood, expected in zip(request.tokens, request.likelihoods, logs, strict=True):
        assert likelihood.logprob == pytest.approx(float(expected[token]), abs=error)
        top_ids, top = zip(*likelihood.alternatives, strict=True)
        assert top == pytest.approx(expected.sort(descending=True).values[:20].tolist(), abs=error)
        assert top == pytest.approx(expected[list(top_ids)].tolist(), abs=error)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "place"), CASES)
def test_any_schedule_gives_the_tokens_of_the_reference(loaded, poisoned, name, place, seed, device):
    model = loaded(name, place, device=device)
    rng = random.Random(f"{name} {place} {seed}")
    engine = Engine(
        model.model,
        row_source=model.row_source,
        max_sequences=rng.choice([1, 2, 3, 5]),
        max_length=rng.choice([None, 40]),
        prefill_chunk=rng.choice([1, 3, 16, 100]),
        decoder=decoder_of(model.model, model.row_source, ahead=rng.choice([0, 0, 1, 3])),
    )
    requests = []
    while len(requests) < 9 or engine.busy:
        if len(requests) < 9 and rng.random() < 0.4:
            requests.append(engine.submit(**random_request(rng)))
        if requests and rng.random() < 0.03:
            engine.cancel(rng.choice(requests))
        engine.step()
        assert engine.slots.running == set(engine.slots.active.nonzero().flatten().tolist())
    for request in requests:
        expected = expected_of(model, request)
        if request.finish_reason == "cancelled":
            expected = expected[: len(request.tokens)]
        elif request.finish_reason == "stop":
            assert len(expected) < request.max_new_tokens
        else:
            assert (request.finish_reason, len(expected)) == ("length", request.max_new_tokens)
        assert request.tokens == expected
        assert request.slot is None
        check_likelihoods(model.model, model.row_source, request, error=1e-9 if device == "cpu" else 1e-6)  # fp32 there
    slots = engine.slots
    assert slots.how == "greedy"
    assert not slots.scored
    assert not slots.active.any()
    assert not slots.lengths.any()


def test_streams_and_batches(loaded):
    model = loaded("nano-memory", "host")
    engine = Engine(model.model, row_source=model.row_source, max_sequences=2)
    first, second = engine.submit([5, 6, 7], max_new_tokens=9), engine.submit([8], max_new_tokens=30)
    stream = engine.stream(first)
    assert next(stream) == first.tokens[0]
    assert first.finish_reason is None
    assert [first.tokens[0], *stream] == first.tokens == expected_of(model, first)
    assert second.finish_reason is None
    assert list(engine.stream(second)) == expected_of(model, second)
    prompts = [[1], [2, 3], [4, 5, 6]]
    expected = [list(generate(model.model, p, row_source=model.row_source, max_new_tokens=8)) for p in prompts]
    assert engine.generate(prompts, max_new_tokens=8) == expected
    assert not engine.busy


def test_a_reused_slot_sees_nothing_of_the_sequence_before():
    model = random_model(VARIED["nano-flex3"])
    engine, fresh = Engine(model), Engine(model)
    engine.generate([[9] * 40], max_new_tokens=20)
    engine.slots.states[:, :, 0] = torch.nan  # whatever it left
    assert engine.generate([[3, 4]], max_new_tokens=10) == fresh.generate([[3, 4]], max_new_tokens=10)


def test_running_requests_do_not_wait_for_prompts():
    """Beside each chunk of a prompt, every running request gets its token."""
    engine = Engine(random_model(VARIED["nano-memory"]), max_sequences=2, prefill_chunk=4)
    running = engine.submit([1], max_new_tokens=50)
    engine.step()
    waiting = engine.submit(list(range(30)), max_new_tokens=5)
    for chunk in range(8):
        before = len(running.tokens)
        assert not waiting.tokens
        engine.step()
        assert len(running.tokens) == before + 1, chunk
    assert len(waiting.tokens) == 2  # the prompt's, and of the step that followed


def test_rows_of_the_next_chunk_are_fetched_while_one_computes(loaded, monkeypatch):
    model = loaded("nano-memory", "host")
    assert model.row_source is not None
    asked, seen = [], threading.Condition()

    def source(token_ids):
        with seen:
            asked.append(token_ids.flatten().tolist())
            seen.notify()
        return model.row_source(token_ids)

    compute = model.model.hidden_states

    def waiting(token_ids, *args):
        """Computes once the rows of the chunk after this one were asked for."""
        after = {3: [4, 5, 6, 7], 7: [8, 9, 10, 11], 11: [20, 21]}.get(int(token_ids[0, -1]))
        if after:
            with seen:
                assert seen.wait_for(lambda: after in asked, timeout=20)
        return compute(token_ids, *args)

    monkeypatch.setattr(model.model, "hidden_states", waiting)
    engine = Engine(model.model, row_source=source, max_sequences=2, prefill_chunk=4)
    requests = [engine.submit(ids, max_new_tokens=1) for ids in (range(12), [20, 21])]
    while engine.busy:
        engine.step()
    assert asked == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [20, 21]]  # each chunk once, together
    assert all(len(request.tokens) == 1 for request in requests)


def test_slots_stay_few():
    """Admitted at the lowest free place, and moved down once half of a step would be idle."""
    launches = []
    model = random_model(VARIED["nano-memory"])
    engine = Engine(model, max_sequences=8, decoder=decoder_of(model, None, launches=launches))
    requests = [engine.submit([i], max_new_tokens=12) for i in range(7)]
    survivor = engine.submit([7], max_new_tokens=40)
    while engine.busy:
        engine.step()
    assert max(launches) == 8
    assert launches[-20:] == [1] * 20
    plain = Engine(model)
    assert [r.tokens for r in requests] == [plain.generate([[i]], max_new_tokens=12)[0] for i in range(7)]
    assert survivor.tokens == plain.generate([[7]], max_new_tokens=40)[0]


def test_cancelling_makes_room():
    model = random_model(VARIED["nano-memory"])
    engine = Engine(model, prefill_chunk=2)
    running, filling, queued, last = (engine.submit([i] * 7, max_new_tokens=10) for i in range(4))
    for _ in range(5):
        engine.step()
    engine.cancel(running)
    engine.cancel(queued)
    engine.step()
    assert (filling.slot, filling.tokens) == (0, [])
    engine.cancel(filling)
    engine.cancel(filling)
    assert list(engine.stream(last)) == Engine(model).generate([[3] * 7], max_new_tokens=10)[0]
    assert [r.finish_reason for r in (running, filling, queued)] == ["cancelled"] * 3
    assert len(running.tokens) == 3
    assert not engine.busy


def test_limits(loaded):
    model = random_model(VARIED["nano-base"])
    engine = Engine(model, max_length=20)
    assert [len(tokens) for tokens in engine.generate([[1] * 19, [1] * 5], max_new_tokens=100)] == [1, 15]
    for prompt, message in (([], "0 tokens; expected 1 to 19"), ([1] * 20, "20 tokens; exp"), ([512], "id 512 is out")):
        with pytest.raises(ValueError, match=message):
            engine.submit(prompt, max_new_tokens=4)
    with pytest.raises(ValueError, match="max_new_tokens must be positive, got 0"):
        engine.submit([1], max_new_tokens=0)
    with pytest.raises(ValueError, match="token id -1"):
        engine.generate([[1], [-1]], max_new_tokens=4)
    assert not engine.busy
    for longest in (65, 1):
        with pytest.raises(ValueError, match=f"max_length must be 2 to 64 .* got {longest}"):
            Engine(model, max_length=longest)
    with pytest.raises(ValueError, match="max_sequences must be positive"):
        Engine(model, max_sequences=0)
    with pytest.raises(ValueError, match="prefill_chunk must be positive"):
        Engine(model, prefill_chunk=0)
    with pytest.raises(ValueError, match="memory weights are not loaded"):
        Engine(loaded("nano-memory", "disk").model)


def test_one_model_two_sources_of_settings():
    """Requests of one batch may differ in all that a request sets."""
    model = random_model(dataclasses.replace(VARIED["nano-memory"], max_seq_len=128))
    engine = Engine(model, max_sequences=3)
    settings = [Sampling(temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    same, again, other = (engine.submit([4], sampling=one, max_new_tokens=20) for one in settings)
    while engine.busy:
        engine.step()
    assert same.tokens == again.tokens != other.tokens
