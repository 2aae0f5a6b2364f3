"""Batches: every window once an epoch, the same from any start; broken folders are refused."""

import dataclasses
import itertools
import json
import shutil
import threading

import numpy as np
import pytest
import torch

from flexmemory.train.data import (
    Batch,
    MixedStreams,
    Prefetcher,
    SequentialBatches,
    ShuffledBatches,
    TokenDataset,
    TokenStream,
)
from tests.train.conftest import recipe, write_prepared


def stream(count, *, cuts=(), vocab_size=1000):
    tokens = np.arange(count, dtype=np.uint16) % vocab_size
    return TokenStream(np.split(tokens, cuts), vocab_size=vocab_size, num_bytes=0)


def same(first: Batch, second: Batch) -> bool:
    fields = [field.name for field in dataclasses.fields(Batch)]
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in fields)


def test_shards_read_as_one_stream():
    whole, cut = stream(100), stream(100, cuts=(1, 7, 7, 60))
    assert len(cut) == 100
    for start, length in ((0, 100), (0, 1), (1, 6), (5, 60), (59, 1), (60, 40), (99, 1)):
        assert np.array_equal(cut.read(start, length), whole.read(start, length))


def test_batch_holds_windows_targets_and_unique_ids():
    batch = stream(200, cuts=(30,), vocab_size=50).batch([0, 3], seq_len=16)
    assert batch.token_ids.tolist() == [list(range(16)), [48, 49, *range(14)]]
    assert torch.equal(batch.targets[:, :-1], batch.token_ids[:, 1:])
    assert batch.targets[:, -1].tolist() == [16, 14]
    assert torch.equal(batch.unique_ids[batch.index], batch.token_ids)
    assert batch.num_unique == 18
    assert torch.equal(batch.unique_ids[: batch.num_unique], batch.token_ids.unique())
    assert {tensor.dtype for tensor in (batch.token_ids, batch.targets, batch.unique_ids, batch.index)} == {torch.int64}


@pytest.mark.parametrize("highest", [1, 50, 4999])
def test_unique_ids_are_those_of_a_sort(highest):
    tokens = np.random.default_rng(0).integers(highest, size=(4, 65))
    tokens[0, 0], tokens[-1, -1] = highest, highest  # of the vocabulary the last; of all tokens the last
    batch = Batch.of(list(tokens), vocab_size=highest + 1)
    unique, index = np.unique(tokens[:, :-1], return_inverse=True)
    assert np.array_equal(batch.unique_ids[: batch.num_unique], unique)
    assert np.array_equal(batch.index, index.reshape(4, 64))
    assert all(tensor.is_contiguous() for tensor in (batch.token_ids, batch.targets, batch.unique_ids, batch.index))


def test_padding_repeats_an_id_that_is_never_indexed():
    tokens = stream(20_000, vocab_size=1000)
    sizes = {len(tokens.batch(range(n), seq_len=64).unique_ids) for n in range(1, 16)}
    assert sizes == {64 * n for n in range(1, 16)}
    batch = tokens.batch([0], seq_len=50)
    assert len(batch.unique_ids) == 64
    assert (batch.unique_ids[50:] == batch.unique_ids[49]).all()
    assert batch.index.max() == 49


def test_each_epoch_has_every_window_once_in_its_own_order():
    tokens, config = stream(10 * 32 + 5), recipe(steps=1)
    batches = ShuffledBatches(tokens, config=config)
    starts = torch.cat([batches[number].token_ids[:, 0] for number in range(10)]).tolist()
    first, second = starts[:10], starts[10:]
    assert sorted(first) == sorted(second) == [32 * n for n in range(10)]
    assert first != second
    assert first != sorted(first)


def test_batch_depends_on_its_number_and_the_seed_alone():
    tokens, config = stream(640), recipe(steps=1)
    in_order = ShuffledBatches(tokens, config=config)
    expected = [in_order[number] for number in range(25)]
    jumping = ShuffledBatches(tokens, config=config)
    for number in (24, 3, 9, 10, 0):
        assert same(jumping[number], expected[number])
    other = ShuffledBatches(tokens, config=dataclasses.replace(config, seed=1))
    assert not same(other[0], expected[0])


def test_order_does_not_depend_on_micro_batches():
    tokens, config = stream(640), recipe(steps=1)
    small = ShuffledBatches(tokens, config=config)
    large = ShuffledBatches(tokens, config=dataclasses.replace(config, micro_batch_size=4))
    joined = torch.cat([small[0].token_ids, small[1].token_ids])
    assert torch.equal(large[0].token_ids, joined)


def test_order_never_changes_between_versions():
    batches = ShuffledBatches(stream(8 * 32 + 1), config=recipe(steps=1, micro_batch_size=4))
    assert (batches[0].token_ids[:, 0] // 32).tolist() == [3, 2, 1, 6]


def mixed(*windows, weights=None):
    """Streams of these numbers of windows of 32 tokens; token t of stream k is 200 k + t."""
    streams = [
        TokenStream([np.arange(200 * k, 200 * k + 32 * count + 1, dtype=np.uint16)], vocab_size=1000, num_bytes=0)
        for k, count in enumerate(windows)
    ]
    return MixedStreams(streams, weights=weights)


def first_tokens(batches, numbers):
    return [start for number in numbers for start in batches[number].token_ids[:, 0].tolist()]


def test_one_stream_in_a_mix_gives_its_own_batches():
    tokens, config = stream(640), recipe(steps=1)
    alone, mix = ShuffledBatches(tokens, config=config), ShuffledBatches(MixedStreams([tokens]), config=config)
    assert all(same(alone[number], mix[number]) for number in range(25))
    assert same(mix[3], ShuffledBatches(MixedStreams([tokens], weights=[7]), config=config)[3])


def test_a_mix_without_weights_has_epochs_of_all_its_windows():
    batches = ShuffledBatches(mixed(5, 1, 2), config=recipe(steps=1))
    starts = first_tokens(batches, range(8))
    everything = [32 * n for n in range(5)] + [200] + [400, 432]
    assert sorted(starts[:8]) == sorted(starts[8:]) == everything
    assert starts[:8] != starts[8:]


def test_each_stream_of_a_mix_has_epochs_of_its_own():
    """Weights 3 and 1 for 5 and 4 windows: 24 sequences are 3.6 epochs of the one, 1.5 of the other."""
    batches = ShuffledBatches(mixed(5, 4, weights=[3, 1]), config=recipe(steps=1))
    starts = first_tokens(batches, range(12))
    of_first, of_second = ([start for start in starts if (start >= 200) == second] for second in (False, True))
    assert (len(of_first), len(of_second)) == (18, 6)
    epochs = [of_first[start : start + 5] for start in (0, 5, 10)]
    assert all(sorted(epoch) == [0, 32, 64, 96, 128] for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    assert sorted(of_second[:4]) == [200, 232, 264, 296]


def test_streams_of_one_size_have_orders_of_their_own():
    starts = np.array(first_tokens(ShuffledBatches(mixed(6, 6), config=recipe(steps=1)), range(6)))
    assert (starts[starts < 200]).tolist() != (starts[starts >= 200] - 200).tolist()


@pytest.mark.parametrize("weights", [None, [5, 2, 1]])
def test_a_batch_of_a_mix_is_the_same_from_any_start_and_with_any_size(weights):
    tokens, config = mixed(5, 3, 4, weights=weights), recipe(steps=1)
    in_order = ShuffledBatches(tokens, config=config)
    expected = [in_order[number] for number in range(24)]
    for number in (23, 7, 8, 0):
        jumping = ShuffledBatches(tokens, config=config)
        assert same(jumping[number], expected[number])
        assert same(jumping[number + 1 if number < 23 else 5], expected[number + 1 if number < 23 else 5])
    for size in (1, 3, 8):
        batches = ShuffledBatches(tokens, config=config, batch_size=size)
        assert first_tokens(batches, range(48 // size)) == first_tokens(in_order, range(24))


def test_the_order_of_a_mix_never_changes_between_versions():
    batches = ShuffledBatches(mixed(4, 3, weights=[2, 1]), config=recipe(steps=1, micro_batch_size=4))
    assert first_tokens(batches, [0, 1]) == [96, 232, 64, 32, 200, 0, 32, 264]


def test_validation_of_a_mix_takes_every_stream_by_its_size():
    tokens, config = mixed(4, 0, 2), recipe(steps=1)
    whole = SequentialBatches(tokens, config=config, max_tokens=10_000)
    starts = first_tokens(whole, range(len(whole)))
    assert sorted(starts) == [0, 32, 64, 96, 400, 432]
    half = SequentialBatches(tokens, config=config, max_tokens=3 * 32)
    assert sorted(first_tokens(half, range(len(half)))) == [0, 32, 400]


def test_a_short_stream_of_a_mix_is_named():
    streams = [TokenStream([np.arange(n)], vocab_size=1000, num_bytes=0, name=f"text {n}") for n in (100, 32)]
    with pytest.raises(ValueError, match=r"text 32 holds 32 tokens, need at least seq_len \+ 1 = 33"):
        ShuffledBatches(MixedStreams(streams), config=recipe(steps=1))
    damaged = TokenStream([np.full(100, 1000)], vocab_size=1000, num_bytes=0, name="text 2")
    with pytest.raises(ValueError, match="text 2 holds token id 1000"):
        ShuffledBatches(MixedStreams([streams[0], damaged]), config=recipe(steps=1))[0]


def test_validation_reads_each_window_once_in_order_up_to_its_limit():
    tokens, config = stream(7 * 32 + 1), recipe(steps=1)
    batches = SequentialBatches(tokens, config=config, max_tokens=10_000)
    assert [len(batches[number].token_ids) for number in range(len(batches))] == [2, 2, 2, 1]
    starts = [start for number in range(len(batches)) for start in batches[number].token_ids[:, 0].tolist()]
    assert starts == [32 * n for n in range(7)]
    assert len(SequentialBatches(tokens, config=config, max_tokens=5 * 32 + 31)) == 3
    assert len(SequentialBatches(tokens, config=config, max_tokens=1)) == 1


def test_too_few_tokens_for_one_sequence():
    with pytest.raises(ValueError, match=r"holds 32 tokens, need at least seq_len \+ 1 = 33"):
        ShuffledBatches(stream(32), config=recipe(steps=1))
    assert len(ShuffledBatches(stream(33), config=recipe(steps=1))[5].token_ids) == 2


def test_id_outside_the_vocabulary_is_refused():
    damaged = TokenStream([np.full(100, 77, dtype=np.uint16)], vocab_size=77, num_bytes=0)
    with pytest.raises(ValueError, match="token id 77, but its vocabulary has 77"):
        damaged.batch([0], seq_len=8)


class Numbered:
    """Batches that count how often they were asked for."""

    def __init__(self, *, broken=None):
        self.tokens = stream(2000)
        self.broken = broken
        self.asked = []

    def __getitem__(self, number):
        self.asked.append(number)
        if number == self.broken:
            raise ValueError("shard went away")
        return self.tokens.batch([number], seq_len=8)


def test_prefetcher_gives_every_batch_in_order_and_stays_bounded():
    source = Numbered()
    with Prefetcher(source, numbers=range(3, 15), pin_memory=False, depth=2) as batches:
        for number in range(3, 15):
            assert same(next(batches), source.tokens.batch([number], seq_len=8))
            assert max(source.asked) <= number + 2
        assert next(batches, None) is None
        assert batches.wait_s > 0


def test_prefetcher_takes_numbers_in_any_order_and_without_end():
    source = Numbered()
    with Prefetcher(source, numbers=itertools.cycle([5, 2]), pin_memory=False) as batches:
        assert [next(batches).token_ids[0, 0].item() // 8 for _ in range(5)] == [5, 2, 5, 2, 5]


def test_prefetcher_passes_errors_on_and_ends_its_thread():
    before = threading.active_count()
    with Prefetcher(Numbered(broken=2), numbers=range(100), pin_memory=False) as batches:
        assert next(batches).token_ids[0, 0] == 0
        next(batches)
        with pytest.raises(ValueError, match="shard went away"):
            next(batches)
    assert threading.active_count() == before


def test_prefetcher_may_be_left_early():
    before, source = threading.active_count(), Numbered()
    with Prefetcher(source, numbers=range(100), pin_memory=False) as batches:
        next(batches)
    assert threading.active_count() == before
    assert len(source.asked) <= 6


def test_opens_a_prepared_folder(dataset, prepared, tokenizer):
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert dataset.vocab_size == tokenizer.vocab_size
    assert len(dataset.train) == manifest["splits"]["train"]["tokens"]
    assert len(dataset.validation) == manifest["splits"]["validation"]["tokens"]
    assert dataset.tokenizer().fingerprint == tokenizer.fingerprint
    ids = [np.fromfile(prepared / f"train-0000{n}.bin", dtype="<u2") for n in (0, 1)]
    assert np.array_equal(dataset.train.read(0, len(dataset.train)), np.concatenate(ids))
    assert "red fox" in tokenizer.decode(dataset.train.read(0, 500).tolist())


def test_wide_ids_and_empty_splits(tmp_path, tokenizer):
    splits = {"train": [[1, 2, 70_000], []], "validation": []}
    folder = write_prepared(tmp_path / "p", tokenizer=tokenizer, splits=splits, dtype="uint32", vocab_size=70_001)
    opened = TokenDataset.open(folder)
    assert opened.train.read(0, 3).tolist() == [1, 2, 70_000]
    assert opened.validation is None


def test_fingerprint_is_of_the_tokens_not_of_the_folder(prepared, tmp_path, dataset):
    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["inputs"] = ["elsewhere"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert TokenDataset.open(copy).fingerprint == dataset.fingerprint
    manifest["splits"]["train"]["shards"].reverse()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert TokenDataset.open(copy).fingerprint != dataset.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "is not prepared data"),
        ({"format_version": 2}, "data format 2; this version reads up to 1"),
        ({"dtype": "int8"}, "dtype 'int8', expected uint16 or uint32"),
        ({"splits": {"train": {"shards": [], "bytes": 0}}}, "lacks 'validation'"),
    ],
)
def test_unknown_manifests_are_refused(prepared, tmp_path, change, message):
    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises(ValueError, match=message):
        TokenDataset.open(copy)


def test_truncated_or_missing_shards_and_foreign_tokenizers_are_refused(prepared, tmp_path, tokenizer):
    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    shard = copy / "train-00001.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"train-00001.bin has \d+ bytes, expected \d+; prepare the data again"):
        TokenDataset.open(copy)
    shard.unlink()
    with pytest.raises(ValueError, match=r"train-00001.bin is missing"):
        TokenDataset.open(copy)
    other = write_prepared(
        tmp_path / "other",
        tokenizer=tokenizer,
        splits={"train": [[0, 1]], "validation": []},
        tokenizer_fingerprint="0" * 64,
    )
    with pytest.raises(ValueError, match="is not the tokenizer that made the tokens"):
        TokenDataset.open(other).tokenizer()
    with pytest.raises(FileNotFoundError, match="no prepared data"):
        TokenDataset.open(tmp_path / "nowhere")
