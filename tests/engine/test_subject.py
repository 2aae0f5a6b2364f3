"""Random subjects are what they stand for: their bytes, their stores, and ids that have rows."""

import dataclasses

import pytest
import torch

from flexmemory.engine.bench import sequences
from flexmemory.engine.subject import Subject, random_model, random_store
from flexmemory.model.accounting import decode_bytes_per_token
from flexmemory.tol.coded_rows import CodedRows
from flexmemory.tol.hot import HotRows, HotSet
from flexmemory.tol.tiers import open_rows
from tests.conftest import NANO, VARIED

CPU = torch.device("cpu")


@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("name", ["nano-base", "nano-memory", "nano-flex3", "untied", "grouped-query"])
def test_the_bytes_of_a_step_are_those_of_the_accounting(tmp_path, name, embedding):
    config = VARIED[name]
    tier = None
    if config.has_memory:
        store = random_store(tmp_path / "tol", config, num_ids=config.vocab_size, embedding=embedding)
        tier = open_rows(store, "device", device=CPU)
    model = random_model(config, device=CPU, dtype=torch.bfloat16, embedding=not (embedding and config.has_memory))
    subject = Subject(model=model, tier=tier)
    assert subject.step_bytes(batch=1, context=30) == decode_bytes_per_token(config, context=30)
    of_more = subject.step_bytes(batch=3, context=30)
    assert of_more == 3 * subject.step_bytes(batch=1, context=30) - 2 * subject.weight_bytes


def test_a_random_store_is_whole(tmp_path):
    store = random_store(tmp_path / "tol", NANO["nano-memory"], num_ids=300, embedding=True)
    assert store.damaged_blocks() == []
    assert (store.vocab_size, store.num_slices) == (300, 4)
    with pytest.raises(FileExistsError):
        random_store(tmp_path / "tol", NANO["nano-memory"], num_ids=300)


@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("codec", ["int4", "planned", "svd16+normal4", "pq4x8"])
def test_a_random_store_in_few_bits_is_whole_and_counted_as_it_is(tmp_path, codec, embedding):
    config = NANO["nano-memory"]
    store = random_store(tmp_path / "tol", config, num_ids=300, embedding=embedding, codec=codec)
    assert store.damaged_blocks() == []
    assert (store.vocab_size, store.num_slices, store.plain) == (300, 3 + embedding, False)
    plain = random_store(tmp_path / "plain", config, num_ids=300, embedding=embedding)
    model = random_model(config, device=CPU, dtype=torch.bfloat16, embedding=not embedding)
    rows = torch.empty(300, store.num_slices, 48, dtype=torch.bfloat16)
    subjects = {}
    for where in ("device", "host", "disk"):
        tier = open_rows(store, where, device=CPU)
        tier.gather(torch.arange(300), rows)
        assert 0.005 < rows.float().std() < 0.04
        subjects[where] = Subject(model=model, tier=tier)
    of_plain = Subject(model=model, tier=open_rows(plain, "device", device=CPU))
    tier = subjects["device"].tier
    assert isinstance(tier, CodedRows)
    assert tier.nbytes < of_plain.table_bytes / (1.2 if embedding else 2)
    assert subjects["device"].table_bytes == tier.nbytes + tier.decoder(CPU).nbytes
    assert subjects["disk"].table_bytes == 0
    saved = of_plain.step_bytes(batch=2, context=9) - subjects["device"].step_bytes(batch=2, context=9)
    assert abs(saved - 2 * (plain.row_bytes - store.nbytes / 300)) < 10


@pytest.mark.parametrize("int8", [None, "all"])
def test_ids_without_rows_are_never_chosen(tmp_path, int8):
    config = dataclasses.replace(NANO["nano-memory"], tie_embeddings=False)
    store = random_store(tmp_path / "tol", config, num_ids=40)
    tier = open_rows(store, "host", device=CPU)
    model = random_model(config, device=CPU, dtype=torch.float32, num_ids=40, int8=int8)
    subject = Subject(model=model, tier=HotRows(tier, HotSet.load(tier, torch.arange(8), device=CPU)))
    assert subject.num_ids == 40
    engine = subject.engine(max_sequences=4, max_length=64)
    for tokens in engine.generate([[1], [2, 3], [39], [5, 6, 7]], max_new_tokens=40):
        assert max(tokens) < 40


def test_sequences_are_spread_over_the_stream():
    pieces = sequences(torch.arange(100), batch=4, length=30, num_ids=90)
    assert pieces[:, 0].tolist() == [0, 25, 50, 75]
    assert pieces[1].tolist() == list(range(25, 55))
    assert pieces[3].tolist() == [*range(75, 90), *[89] * 10, *range(5)]
    with pytest.raises(ValueError, match="empty"):
        sequences(torch.arange(0), batch=1, length=2, num_ids=3)
