"""Captured decoding gives the tokens of the reference loop, from every tier, in any schedule, with any failing disk."""

import random

import pytest
import torch

from flexmemory.engine import engine as engine_module
from flexmemory.engine.engine import Engine
from flexmemory.engine.reference import generate
from flexmemory.engine.sampling import Sampling
from flexmemory.engine.subject import random_store
from flexmemory.tol.build import build_store
from flexmemory.tol.disk import DiskRows
from flexmemory.tol.hot import HotRows, HotSet
from flexmemory.tol.tiers import lookup, open_rows
from tests.engine.test_engine import check_likelihoods, random_request

pytestmark = pytest.mark.gpu

TIERS = ["device", "host", "disk", "hot host", "hot disk"]
CASES = [("nano-base", "none"), *[("nano-memory", tier) for tier in TIERS], *[("nano-flex3", tier) for tier in TIERS]]
CASES += [(name, "hot disk") for name in ("grouped-query", "untied", "square-1", "square-2", "ffn+table")]


def tier_of(checkpoint, folder, kind, *, embedding=False):
    if kind == "none":
        return None
    store = build_store(checkpoint, folder / "tol", codec="fp32", embedding=embedding)
    *hot, place = kind.split()
    tier = open_rows(store, place, device="cuda")
    return HotRows(tier, HotSet.load(tier, torch.arange(0, 512, 3), device="cuda")) if hot else tier


def engine_of(model, tier, *, forced=None, learn=0, **sizes):
    from flexmemory.engine.graph import GraphDecoder

    def decoder(slots):
        slots.states.fill_(torch.nan)
        return GraphDecoder(model, slots, tier=tier, forced=forced, learn=learn)

    return Engine(model, row_source=source_of(tier), decoder=decoder, **sizes)


def source_of(tier):
    return None if tier is None else lambda ids: lookup(tier, ids, dtype=torch.float32, device=torch.device("cuda"))


def expected_of(model, tier, request):
    return list(
        generate(
            model,
            request.prompt_ids,
            row_source=source_of(tier),
            sampling=request.sampling,
            max_new_tokens=request.max_new_tokens,
            stop_ids=request.stop_ids,
        )
    )


@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_any_schedule_gives_the_tokens_of_the_reference(saved, tmp_path, name, kind, embedding):
    if embedding and kind == "none":
        pytest.skip("a dense model has no rows")
    checkpoint = saved(name)
    model = checkpoint.load(device="cuda", memory=not checkpoint.config.has_memory)
    tier = tier_of(checkpoint, tmp_path, kind, embedding=embedding)
    rng = random.Random(f"{name} {kind}")
    sizes = {
        "max_sequences": rng.choice([1, 2, 4]),
        "max_length": rng.choice([None, 40]),
        "prefill_chunk": rng.choice([16, 100]),
    }
    engine = engine_of(model, tier, **sizes)
    requests = []
    while len(requests) < 8 or engine.busy:
        if len(requests) < 8 and rng.random() < 0.5:
            requests.append(engine.submit(**random_request(rng)))
        if requests and rng.random() < 0.03:
            engine.cancel(rng.choice(requests))
        engine.step()
    for request in requests:
        expected = expected_of(model, tier, request)
        if request.finish_reason == "cancelled":
            expected = expected[: len(request.tokens)]
        assert request.tokens == expected
        assert request.error is None
        check_likelihoods(model, source_of(tier), request, error=1e-3)


@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("kind", TIERS)
@pytest.mark.parametrize("codec", ["planned", "int4", "svd24+normal4"])
def test_rows_in_few_bits_give_the_tokens_of_the_reference(saved, tmp_path, codec, kind, embedding):
    """Which looks up the same rows, all tokens of the prompt at once."""
    checkpoint = saved("nano-flex3")
    model = checkpoint.load(device="cuda", memory=False)
    store = random_store(tmp_path / "tol", checkpoint.config, num_ids=512, embedding=embedding, codec=codec)
    *hot, place = kind.split()
    tier = open_rows(store, place, device="cuda")
    if hot:
        tier = HotRows(tier, HotSet.load(tier, torch.arange(0, 512, 3), device="cuda"))
    engine = engine_of(model, tier, max_sequences=4)
    prompts = [[7 * i % 512 for i in range(length)] for length in (5, 1, 20, 9, 3)]
    requests = [engine.submit(prompt, max_new_tokens=30) for prompt in prompts]
    while engine.busy:
        engine.step()
    same = [request.tokens == expected_of(model, tier, request) for request in requests]
    # A product with a basis rounds differently for one row and for many, and a near tie may fall to another token.
    assert all(same) if "svd" not in codec else sum(same) >= 3


@pytest.mark.parametrize("batch", [1, 3])
def test_forced_tokens_are_taken(saved, tmp_path, batch):
    """And the model goes on from there as from a prompt that ends in them."""
    checkpoint = saved("nano-flex3")
    model = checkpoint.load(device="cuda", memory=False)
    tier = tier_of(checkpoint, tmp_path, "hot host")
    forced = torch.randint(512, (batch, model.config.max_seq_len), device="cuda")
    engine = engine_of(model, tier, forced=forced, max_sequences=batch)
    # They begin one after the other, and end together: none is moved to another slot.
    requests = [engine.submit([1, 2, 3], max_new_tokens=20 - slot) for slot in range(batch)]
    while engine.busy:
        engine.step()
    for slot, request in enumerate(requests):
        assert request.tokens[1:] == forced[slot, 4 : 23 - slot].tolist()
    assert tier is not None
    ids = [1, 2, 3, *requests[0].tokens]
    keys = engine.slots.states[:, 0, 0, :, : len(ids) - 1]
    from flexmemory.model.kv_cache import KVCache

    cache = KVCache(model.config, batch_size=1, capacity=64, device="cuda")
    token_ids = torch.tensor([ids[:-1]], device="cuda")
    with torch.no_grad():
        model(token_ids, lookup(tier, token_ids, dtype=torch.float32), cache)
    torch.testing.assert_close(keys, cache._states[:, 0, 0, :, : len(ids) - 1], rtol=1e-4, atol=1e-4)


def test_a_failing_disk_ends_only_the_requests_whose_rows_it_loses(saved, tmp_path, monkeypatch):
    checkpoint = saved("nano-memory")
    model = checkpoint.load(device="cuda", memory=False)
    tier = tier_of(checkpoint, tmp_path, "disk")
    prompts = [[7, 8], [9, 10, 11], [12]]
    engine = engine_of(model, tier, max_sequences=4)
    expected = engine.generate(prompts, max_new_tokens=30)
    bad = expected[1][9]
    assert bad not in expected[0] + expected[2]
    read_row = DiskRows.read_row

    def failing(self, token_id, out):
        if token_id == bad:
            raise OSError(5, "Input/output error", "rows-00000.safetensors")
        read_row(self, token_id, out)

    monkeypatch.setattr(DiskRows, "read_row", failing)
    requests = [engine.submit(prompt, max_new_tokens=30) for prompt in prompts]
    while engine.busy:
        engine.step()
    assert [request.finish_reason for request in requests] == ["length", "error", "length"]
    assert isinstance(requests[1].error, OSError)
    assert requests[1].tokens == expected[1][: expected[1].index(bad) + 1]
    assert [requests[0].tokens, requests[2].tokens] == [expected[0], expected[2]]
    monkeypatch.undo()
    assert engine.generate(prompts, max_new_tokens=30) == expected


def test_long_prompts_in_chunks(saved, tmp_path):
    checkpoint = saved("grouped-query")
    model = checkpoint.load(device="cuda", memory=False)
    tier = tier_of(checkpoint, tmp_path, "host")
    prompt = [i * 7 % 512 for i in range(50)]
    texts = [
        engine_of(model, tier, max_sequences=1, prefill_chunk=chunk).generate([prompt], max_new_tokens=10)
        for chunk in (1, 7, 50)
    ]
    request = engine_of(model, tier).submit(prompt, max_new_tokens=10)
    assert texts == [[expected_of(model, tier, request)]] * 3


def test_sampling_in_a_batch_is_that_of_each_alone(saved, tmp_path):
    checkpoint = saved("nano-memory")
    model = checkpoint.load(device="cuda", memory=False)
    tier = tier_of(checkpoint, tmp_path, "device")
    engine = engine_of(model, tier, max_sequences=6)
    settings = [Sampling(), Sampling(temperature=1.0, seed=1), Sampling(temperature=0.8, top_k=9, top_p=0.7, seed=2)]
    requests = [engine.submit([3, 1, 4], sampling=one, max_new_tokens=25) for one in settings * 2]
    while engine.busy:
        engine.step()
    assert [r.tokens for r in requests[:3]] == [r.tokens for r in requests[3:]]
    assert [r.tokens for r in requests] == [expected_of(model, tier, r) for r in requests]


def fails_at(monkeypatch, owner, name, *failing_calls):
    """The function runs out of memory at the end of those calls of it, the first being 1."""
    function, calls = getattr(owner, name), iter(range(1, 10**9))

    def failing(*args, **kwargs):
        result = function(*args, **kwargs)
        if next(calls) in failing_calls:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize(
    ("place", "call"), [("_deliver_fresh", 15), ("_choose", 4)]
)  # before a step, and in its capture
@pytest.mark.parametrize("kind", ["hot host", "hot disk"])
def test_out_of_memory_halves_the_hot_set_and_changes_no_token(saved, tmp_path, monkeypatch, caplog, kind, place, call):
    from flexmemory.engine import prompt
    from flexmemory.engine.graph import GraphDecoder

    checkpoint = saved("nano-flex3")
    model = checkpoint.load(device="cuda", memory=False)
    tier = tier_of(checkpoint, tmp_path, kind)
    assert isinstance(tier, HotRows)
    ids = tier.hot.ids
    engine = engine_of(model, tier, max_sequences=3, prefill_chunk=4)
    fails_at(monkeypatch, prompt.Prompts, "logits", 7)  # while others run
    fails_at(monkeypatch, GraphDecoder, place, call)
    prompts = [[7 * i % 512 for i in range(length)] for length in (5, 11, 2, 17)]
    requests = [engine.submit(ids, max_new_tokens=30) for ids in prompts]
    while engine.busy:
        engine.step()
    monkeypatch.undo()
    assert torch.equal(tier.hot.ids, ids[: len(ids) // 4])
    assert f"of {len(ids)} hot rows {len(ids) // 2} are kept" in caplog.text
    assert [request.tokens for request in requests] == [expected_of(model, tier, request) for request in requests]
    assert engine.generate(prompts, max_new_tokens=30) == [request.tokens for request in requests]


def test_without_hot_rows_there_is_nothing_to_give_up(saved, tmp_path, monkeypatch):
    from flexmemory.engine import prompt

    checkpoint = saved("nano-memory")
    model = checkpoint.load(device="cuda", memory=False)
    engine = engine_of(model, tier_of(checkpoint, tmp_path, "disk"))
    expected = engine.generate([[1, 2]], max_new_tokens=9)
    fails_at(monkeypatch, prompt.Prompts, "logits", 1, 2)  # the first time, captured chunks can be given up
    with pytest.raises(torch.OutOfMemoryError):
        engine.generate([[1, 2]], max_new_tokens=9)
    while engine.busy:
        engine.step()
    assert engine.generate([[1, 2]], max_new_tokens=9) == expected


@pytest.mark.parametrize("place", ["host", "disk"])
def test_hot_rows_are_learnt_from_what_is_generated(saved, tmp_path, monkeypatch, place):
    monkeypatch.setattr(engine_module, "LEARN_TOKENS", 10)
    checkpoint = saved("nano-flex3")
    model = checkpoint.load(device="cuda", memory=False)
    below = tier_of(checkpoint, tmp_path, place)
    assert below is not None
    tier = HotRows(below, HotSet.load(below, torch.empty(0, dtype=torch.int64), device="cuda"))
    engine = engine_of(model, tier, learn=5, max_sequences=3)
    requests = [engine.submit([i, i, i], max_new_tokens=40) for i in range(3)]
    while engine.busy:
        engine.step()
    assert len(tier.hot) == 5
    assert tier.traffic.counts[tier.hot.ids].min() > 0
    assert tier.traffic.counts.sum() >= sum(len(request.tokens) - 1 for request in requests)
    tokens = [request.tokens for request in requests]
    assert tokens == [expected_of(model, tier, request) for request in requests]


def test_learning_needs_a_hot_set(saved, tmp_path):
    checkpoint = saved("nano-memory")
    model = checkpoint.load(device="cuda", memory=False)
    with pytest.raises(ValueError, match="no hot set to learn 5 rows for"):
        engine_of(model, tier_of(checkpoint, tmp_path, "disk"), learn=5)
