"""A failing read of rows ends the requests that need them, says why, and leaves the engine serving."""

import os
import random

import pytest

from flexmemory.engine.engine import Engine
from flexmemory.engine.reference import generate
from flexmemory.tol.tiers import DiskRows
from tests.engine.test_engine import decoder_of

LOST = 384
"""Rows from this id on cannot be read."""


@pytest.fixture
def broken(loaded, tmp_path, monkeypatch):
    """A model with rows on a disk of which the end is lost while it runs, and the same model with whole rows."""
    whole, model = loaded("nano-flex3", "disk"), loaded("nano-flex3", "disk")
    (tier,) = model.row_source.args
    assert isinstance(tier, DiskRows)
    (descriptor,) = tier._descriptors
    copy = tmp_path / "shard"
    (shard,) = tier.store.manifest.shards
    copy.write_bytes((tier.store.path / shard.file).read_bytes())
    tier._descriptors[0] = os.open(copy, os.O_RDONLY)
    os.close(descriptor)
    os.truncate(copy, shard.data_offset + LOST * tier.store.manifest.stride_bytes)
    return model, whole


def until_lost(model, prompt, count):
    """What the reference gives until it meets a token whose row is lost; and whether it does."""
    if any(token >= LOST for token in prompt):
        return [], True
    tokens = list(generate(model.model, prompt, row_source=model.row_source, max_new_tokens=count))
    lost = [i for i, token in enumerate(tokens[:-1]) if token >= LOST]
    return (tokens[: lost[0] + 1], True) if lost else (tokens, False)


@pytest.mark.parametrize("seed", range(4))
def test_only_those_end_whose_rows_are_lost(broken, seed):
    model, whole = broken
    rng = random.Random(seed)
    engine = Engine(
        model.model,
        row_source=model.row_source,
        max_sequences=4,
        prefill_chunk=rng.choice([2, 5, 100]),
        decoder=decoder_of(model.model, model.row_source, ahead=rng.choice([0, 2])),
    )
    prompts = [[rng.randrange(400) for _ in range(rng.randrange(1, 12))] for _ in range(16)]
    requests = [engine.submit(prompt, max_new_tokens=rng.choice([1, 3, 8])) for prompt in prompts]
    while engine.busy:
        engine.step()
    reasons = set()
    for request in requests:
        tokens, lost = until_lost(whole, request.prompt_ids, request.max_new_tokens)
        reasons.add((lost, bool(tokens)))
        assert (request.tokens, request.finish_reason) == (tokens, "error" if lost else "length")
        assert (request.error is not None) == lost
    assert reasons == {(True, False), (True, True), (False, True)}  # in the prompt, while decoding, and not at all


def test_the_error_is_raised_where_the_tokens_are_asked_for(broken):
    model, whole = broken
    engine = Engine(model.model, row_source=model.row_source, max_sequences=2)
    good = next([i] for i in range(LOST) if not until_lost(whole, [i], 5)[1])
    bad, fine = engine.submit([LOST], max_new_tokens=5), engine.submit(good, max_new_tokens=5)
    with pytest.raises(OSError, match="bytes early"):
        list(engine.stream(bad))
    assert list(engine.stream(fine)) == until_lost(whole, good, 5)[0]
    with pytest.raises(OSError, match="bytes early"):
        engine.generate([[LOST], good], max_new_tokens=5)
    assert engine.generate([good, good], max_new_tokens=5) == [fine.tokens] * 2


def test_a_fault_of_the_whole_batch_ends_all_of_it(loaded):
    model = loaded("nano-memory", "host")

    def source(token_ids):
        if len(token_ids) > 1:
            raise OSError("only one at a time")
        return model.row_source(token_ids)

    engine = Engine(model.model, row_source=source, max_sequences=2)
    requests = [engine.submit([i], max_new_tokens=9) for i in range(2)]
    while engine.busy:
        engine.step()
    assert [request.finish_reason for request in requests] == ["error", "error"]
    assert [str(request.error) for request in requests] == ["only one at a time"] * 2
    assert len(engine.generate([[1]], max_new_tokens=9)[0]) == 9


def test_no_row_is_read_for_a_slot_that_does_not_run(loaded):
    model = loaded("nano-memory", "host")
    steps = []

    def source(token_ids):
        if len(token_ids) > 1:
            steps.append(set(token_ids.flatten().tolist()))
        return model.row_source(token_ids)

    engine = Engine(model.model, row_source=source, max_sequences=3, prefill_chunk=1)
    short, *running = (engine.submit([i], max_new_tokens=n) for i, n in ((1, 4), (2, 25), (3, 25)))
    while short.finish_reason is None:
        engine.step()
    filling = engine.submit([7] * 20, max_new_tokens=1)  # in slot 0, below those that run
    while filling.finish_reason is None:
        before = {request.tokens[-1] for request in running}
        steps.clear()
        engine.step()
        assert filling.slot == 0 or filling.finish_reason
        assert steps == [before]
