"""Counts beside the rows: as given, checked, and in the order that hot sets want."""

import pytest
import torch
from safetensors.torch import load_file

from flexmemory.storage import read_json
from flexmemory.tol.build import build_store
from flexmemory.tol.counts import COUNTS
from flexmemory.tol.format import partial_folder
from flexmemory.tol.hot import HotSet
from flexmemory.tol.store import ToLStore
from flexmemory.tol.tiers import open_rows
from flexmemory.tol.verify import verify_store
from tests.tol.conftest import SIZES, edit_manifest, files, flip_byte, whole_table
from tests.tol.test_build import interrupted


def some_counts() -> torch.Tensor:
    counts = torch.zeros(512, dtype=torch.int64)
    counts[[7, 300, 2, 511]] = torch.tensor([5, 2**40, 5, 1])
    return counts


@pytest.fixture
def counted(nano, tmp_path) -> ToLStore:
    return build_store(nano, tmp_path / "counted", counts=some_counts(), **SIZES)


def test_counts_come_back(counted, store):
    counts = counted.counts()
    assert counts is not None
    assert torch.equal(counts, some_counts())
    assert list(load_file(counted.path / COUNTS)) == ["counts"]
    entry = read_json(counted.path / "manifest.json")["counts"]
    assert list(entry) == ["sha256", "total"]
    assert entry["total"] == 2**40 + 11
    assert torch.equal(whole_table(counted), whole_table(store))
    assert "counts" not in read_json(store.path / "manifest.json")
    assert store.counts() is None


def test_hot_ids_are_the_most_frequent_with_ties_by_id(counted, store):
    assert counted.hot_ids(0).tolist() == []
    assert counted.hot_ids(5).tolist() == [300, 2, 7, 511, 0]
    assert sorted(counted.hot_ids(1000).tolist()) == list(range(512))
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        counted.hot_ids(-1)
    with pytest.raises(ValueError, match=r"does not say how frequent tokens are; build it with --counts DATA, or let"):
        store.hot_ids(3)
    tier = open_rows(counted, "host", device="cpu")
    hot = HotSet.load(tier, counted.hot_ids(3), device="cpu")
    assert torch.equal(hot.table, whole_table(counted)[[300, 2, 7]])


def test_damaged_and_missing_counts_are_found(counted):
    flip_byte(counted.path / COUNTS, 200)
    store = ToLStore.open(counted.path)
    for check in (store.counts, lambda: store.hot_ids(1), lambda: verify_store(store.path)):
        with pytest.raises(
            ValueError, match=r"damaged: counts.safetensors does not match its checksum; build it again"
        ):
            check()
    (counted.path / COUNTS).unlink()
    with pytest.raises(ValueError, match=r"incomplete: counts.safetensors is missing; build it again"):
        ToLStore.open(counted.path)


@pytest.mark.parametrize("entry", [{"sha256": "0"}, {"total": 3}, [], {"sha256": "0", "total": 1, "more": 2}])
def test_entries_of_another_shape_are_refused(counted, entry):
    edit_manifest(counted, lambda manifest: manifest.update(counts=entry))
    with pytest.raises(ValueError, match="is damaged: missing, unknown or ill-typed entry"):
        ToLStore.open(counted.path)


def test_an_interrupted_build_keeps_to_its_counts(nano, counted, tmp_path):
    out = tmp_path / "store"
    interrupted(nano, out, chunks=2, counts=some_counts())
    for other in (None, some_counts().flip(0)):
        with pytest.raises(ValueError, match=r"unfinished work of another kind \(counts differ\)"):
            build_store(nano, out, counts=other, **SIZES)
    build_store(nano, out, counts=some_counts(), **SIZES)
    assert files(out) == files(counted.path)


@pytest.mark.parametrize("wrong", [torch.zeros(511, dtype=torch.int64), torch.zeros(513, dtype=torch.int64)])
def test_counts_of_another_vocabulary_are_refused(wrong, nano, tmp_path):
    with pytest.raises(ValueError, match=rf"counts must be int64 of \[512\], got torch.int64 of \[{len(wrong)}\]"):
        build_store(nano, tmp_path / "store", counts=wrong)
    assert not partial_folder(tmp_path / "store").exists()
