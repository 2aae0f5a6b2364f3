"""Out of memory the decoder gives some up and the work goes on as if nothing had been; when hot rows are learnt."""

import threading

import pytest
import torch

from flexmemory.engine import engine as engine_module
from flexmemory.engine.decoder import EagerDecoder
from flexmemory.engine.engine import Engine
from flexmemory.engine.prefill import Prefill
from flexmemory.engine.reference import generate

PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11]]


class Tight(EagerDecoder):
    """Out of memory `failures` times, and able to shrink `gives` times."""

    def __init__(self, model, slots, row_source, *, gives, failures=0):
        super().__init__(model, slots, row_source)
        self.gives, self.failures = gives, failures
        self.shrunk, self.relearnt = 0, 0

    def launch(self, num_slots):
        ticket = super().launch(num_slots) if self.failures == 0 else None
        if ticket is None:
            self.failures -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ticket

    def shrink(self):
        if self.shrunk == self.gives:
            return False
        self.shrunk += 1
        return True

    def relearn(self):
        self.relearnt += 1


def tight_engine(model, *, source=None, gives=2, failures=0, **sizes):
    decoders = []

    def decoder(slots):
        decoders.append(Tight(model.model, slots, model.row_source, gives=gives, failures=failures))
        return decoders[0]

    sizes = {"max_sequences": 2, "prefill_chunk": 3} | sizes
    engine = Engine(model.model, row_source=source or model.row_source, decoder=decoder, **sizes)
    return engine, decoders[0]


def expected_of(model, count):
    return [list(generate(model.model, p, row_source=model.row_source, max_new_tokens=count)) for p in PROMPTS]


@pytest.fixture
def failing_prompts(monkeypatch):
    """`failing_prompts(n)`: the next n chunks run out of memory, with keys and values half written."""
    left = [0]
    logits = Prefill._logits

    def failing(self, token_ids, rows, slot, *, start):
        result = logits(self, token_ids, rows, slot, start=start)
        if left[0]:
            left[0] -= 1
            self._slots.states[:, :, slot, :, start:] = torch.nan
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(Prefill, "_logits", failing)
    return lambda count: left.__setitem__(0, count)


def test_a_step_is_launched_again(loaded):
    model = loaded("nano-flex3", "host")
    engine, decoder = tight_engine(model, failures=2)
    assert engine.generate(PROMPTS, max_new_tokens=9) == expected_of(model, 9)
    assert (decoder.shrunk, decoder.failures) == (2, 0)


def test_a_chunk_is_computed_again(loaded, failing_prompts):
    model = loaded("nano-flex3", "host")
    expected = expected_of(model, 9)
    engine, decoder = tight_engine(model)
    failing_prompts(2)
    assert engine.generate(PROMPTS, max_new_tokens=9) == expected
    assert decoder.shrunk == 2


def test_rows_are_fetched_again(loaded):
    model = loaded("nano-flex3", "host")
    failures = iter([True, False, True])

    def source(token_ids):
        if next(failures, False):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return model.row_source(token_ids)

    engine, decoder = tight_engine(model, source=source)
    assert engine.generate(PROMPTS, max_new_tokens=9) == expected_of(model, 9)
    assert decoder.shrunk == 2


def test_with_nothing_left_to_give_up_it_is_raised_and_can_be_tried_again(loaded, failing_prompts):
    model = loaded("nano-flex3", "host")
    expected = expected_of(model, 9)
    engine, decoder = tight_engine(model, gives=1, failures=2)
    requests = [engine.submit(prompt, max_new_tokens=9) for prompt in PROMPTS]
    failing_prompts(2)
    raised = 0
    while engine.busy:
        try:
            engine.step()
        except torch.OutOfMemoryError:
            raised += 1
    assert (raised, decoder.shrunk) == (3, 1)
    assert [request.tokens for request in requests] == expected


def test_no_rows_are_being_fetched_while_the_decoder_shrinks(loaded, failing_prompts):
    model = loaded("nano-flex3", "host")
    begun, fetching = threading.Event(), threading.Event()
    seen = []

    def source(token_ids):
        if token_ids[0, 0] == 4:  # of the second chunk, fetched while the first is computed
            fetching.set()
            begun.set()
            threading.Event().wait(0.1)
            fetching.clear()
        return model.row_source(token_ids)

    engine, decoder = tight_engine(model, source=source)

    def shrink():
        assert begun.wait(20)
        seen.append(fetching.is_set())
        return True

    decoder.shrink = shrink
    failing_prompts(1)
    assert engine.generate(PROMPTS, max_new_tokens=2) == expected_of(model, 2)
    assert seen == [False]


def test_hot_rows_are_learnt_again_whenever_tokens_doubled(loaded, monkeypatch):
    monkeypatch.setattr(engine_module, "LEARN_TOKENS", 10)
    model = loaded("nano-memory", "host")
    engine, decoder = tight_engine(model, max_sequences=1)
    request = engine.submit([1, 2, 3], max_new_tokens=50)
    learnt_at = []
    while engine.busy:
        before = decoder.relearnt
        engine.step()
        if decoder.relearnt > before:
            learnt_at.append(3 + len(request.tokens))
    assert learnt_at == [10, 20, 40]
