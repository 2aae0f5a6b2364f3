"""Hot rows: the same bits as without them, whoever is hot and whatever is asked."""

import os

import pytest
import torch

from flexmemory.tol.build import build_store
from flexmemory.tol.contract import RowTier
from flexmemory.tol.disk import DiskRows
from flexmemory.tol.hot import HotRows, HotSet, Traffic
from flexmemory.tol.tiers import lookup, open_rows
from tests.tol.conftest import SIZES, poisoned, whole_table

HOT = torch.tensor([9, 500, 3, 130])


class Counting:
    """A tier that notes what it is asked for."""

    def __init__(self, tier: RowTier) -> None:
        self.dtype = tier.dtype
        self.embedding, self.layers, self.num_slices = tier.embedding, tier.layers, tier.num_slices
        self.hidden_size, self.vocab_size = tier.hidden_size, tier.vocab_size
        self.tier = tier
        self.asked: list[list[int]] = []

    def gather(self, token_ids, out):
        self.asked.append(token_ids.tolist())
        self.tier.gather(token_ids, out)


@pytest.fixture(params=["host", "disk"])
def below(request, stored):
    tier = open_rows(stored, request.param, device="cpu")
    yield Counting(tier)
    if isinstance(tier, DiskRows):
        tier.close()


@pytest.fixture
def rows(below):
    hot = HotSet.load(below, HOT, device="cpu")
    below.asked.clear()
    return HotRows(below, hot)


def test_a_hot_set_knows_its_places(rows, stored):
    hot = rows.hot
    assert torch.equal(hot.table, whole_table(stored)[HOT])
    assert hot.slot.dtype == torch.int32
    assert hot.slot[HOT].tolist() == [0, 1, 2, 3]
    assert int((hot.slot >= 0).sum()) == len(hot) == 4
    assert hot.nbytes == 4 * stored.row_bytes + 4 * 512
    assert isinstance(rows, RowTier)


@pytest.mark.parametrize(
    ("ids", "asked"),
    [
        ([], [[]]),
        ([3], []),
        ([500, 3, 3, 9, 500], []),
        ([7], [[7]]),
        ([300, 2, 511], [[300, 2, 511]]),
        ([300, 2, 300, 2], [[2, 300]]),
        ([3, 300, 9, 2, 300, 3], [[2, 300]]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_are_the_tables_bits_and_misses_are_asked_for_once(ids, asked, dtype, rows, below, stored):
    out = poisoned(rows, len(ids))
    rows.gather(torch.tensor(ids, dtype=dtype), out)
    assert torch.equal(out, whole_table(stored)[torch.tensor(ids, dtype=torch.long)])
    assert [sorted(part) for part in below.asked] == [sorted(part) for part in asked]


def test_random_batches_are_the_tables_bits(rows, stored):
    generator = torch.Generator().manual_seed(0)
    for number, count in enumerate((1, 2, 40, 700)):
        ids = torch.randint(512, (count,), generator=generator)
        ids[torch.rand(count, generator=generator) < number / 3] = 9
        out = poisoned(rows, count)
        rows.gather(ids, out)
        assert torch.equal(out, whole_table(stored)[ids])


def test_lookup_takes_hot_rows(rows, below, stored):
    ids = torch.tensor([[3, 300, 3], [2, 300, 9]])
    looked_up = lookup(rows, ids, dtype=rows.dtype)
    assert below.asked == [[2, 300]]
    assert torch.equal(looked_up.table[looked_up.index], whole_table(stored)[ids])


def test_an_empty_hot_set_answers_nothing(below, stored):
    hot = HotSet.load(below, HOT[:0], device="cpu")
    rows = HotRows(below, hot)
    out = poisoned(rows, 3)
    rows.gather(torch.tensor([3, 3, 9]), out)
    assert torch.equal(out, whole_table(stored)[torch.tensor([3, 3, 9])])


def test_a_smaller_hot_set_keeps_the_most_frequent_and_frees_the_rest(rows, below, stored):
    before = rows.hot
    rows.hot = before.resized(2)
    assert (len(before), before.table.nbytes, int((before.slot >= 0).sum())) == (0, 0, 0)
    assert rows.hot.table.untyped_storage().nbytes() == 2 * stored.row_bytes
    out = poisoned(rows, 4)
    rows.gather(HOT, out)
    assert torch.equal(out, whole_table(stored)[HOT])
    assert [sorted(asked) for asked in below.asked] == [[3, 130]]
    with pytest.raises(ValueError, match="a hot set of 2 rows can be made one of 0 to 2, got 3"):
        rows.hot.resized(3)


def test_frequent_rows_are_learnt_from_traffic(rows, below, stored):
    for ids in ([7, 7, 9], [7, 300, 9], [7, 300]):
        rows.gather(torch.tensor(ids), poisoned(rows, len(ids)))
    below.asked.clear()
    rows.relearn(3)
    assert rows.hot.ids.tolist() == [7, 9, 300]  # 9 before 300: ties by id
    assert below.asked == [[7, 300]]  # 9 was there
    below.asked.clear()
    ids = torch.tensor([300, 7, 9, 9])
    out = poisoned(rows, 4)
    rows.gather(ids, out)
    assert below.asked == []
    assert torch.equal(out, whole_table(stored)[ids])
    rows.relearn(100)
    assert len(rows.hot) == 3  # nothing else was asked for


def test_traffic_counts_repeats():
    traffic = Traffic(8)
    traffic.add(torch.tensor([5, 5, 1], dtype=torch.int32))
    traffic.add(torch.tensor([], dtype=torch.int64))
    assert traffic.counts.tolist() == [0, 1, 0, 0, 0, 2, 0, 0]
    assert traffic.most_frequent(8).tolist() == [5, 1]


def test_a_failure_below_leaves_out_and_the_hot_set_as_they_were(store, monkeypatch):
    def broken(*args):
        raise OSError(5, "Input/output error")

    with DiskRows(store) as disk:
        rows = HotRows(disk, HotSet.load(disk, HOT, device="cpu"))
        rows.gather(torch.tensor([7, 7]), poisoned(rows, 2))
        out = poisoned(rows, 2)
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", broken)
            with pytest.raises(OSError, match="Input/output error"):
                rows.gather(torch.tensor([3, 8]), out)
            with pytest.raises(OSError, match="Input/output error"):
                rows.relearn(2)
        assert out.isnan().all()
        assert rows.hot.ids.tolist() == HOT.tolist()
        rows.gather(torch.tensor([3, 8]), out)
        assert torch.equal(out, whole_table(store)[torch.tensor([3, 8])])


def test_hot_rows_are_read_once_with_few_reads(store, monkeypatch):
    reads = []
    original = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: reads.append(at) or original(fd, buffers, at))
    with DiskRows(store, direct="never") as disk:
        HotSet.load(disk, torch.tensor([4, 300, 2, 301, 3]), device="cpu")
    assert len(reads) == 2


def test_mistakes_are_refused(rows):
    with pytest.raises(ValueError, match="hot ids must be distinct, got 3 of which 2 are"):
        HotSet.load(rows, torch.tensor([1, 2, 1]), device="cpu")
    with pytest.raises(ValueError, match="token id 512 is out of range"):
        rows.gather(torch.tensor([3, 512]), poisoned(rows, 2))
    with pytest.raises(ValueError, match="out must be contiguous"):
        rows.gather(torch.tensor([3, 5]), poisoned(rows, 2).double())


def test_embeddings_are_hot_too(nano, tmp_path):
    store = build_store(nano, tmp_path / "store", embedding=True, **SIZES)
    tier = open_rows(store, "host", device="cpu")
    rows = HotRows(tier, HotSet.load(tier, HOT, device="cpu"))
    ids = torch.tensor([[3, 4]])
    looked_up = lookup(rows, ids, dtype=torch.float32)
    embedding = nano.load().get_parameter("embedding.weight").detach()
    embeddings = looked_up.embeddings()
    assert embeddings is not None
    assert torch.equal(embeddings, embedding[ids].bfloat16().float())


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["host", "disk"])
def test_hot_rows_on_a_gpu(where, stored):
    tier = open_rows(stored, where, device="cuda")
    rows = HotRows(tier, HotSet.load(tier, HOT, device="cuda"))
    generator = torch.Generator().manual_seed(0)
    for step in range(6):
        ids = torch.cat((torch.randint(512, (50 * step,), generator=generator), HOT))
        for ids_place, out_place in (("cpu", "cuda"), ("cuda", "cuda"), ("cpu", "cpu")):
            out = poisoned(rows, len(ids)).to(out_place)
            rows.gather(ids.to(ids_place), out)
            assert torch.equal(out.cpu(), whole_table(stored)[ids])
        if step == 2:
            rows.hot = rows.hot.resized(2)
        if step == 4:
            rows.relearn(64)
            assert rows.hot.table.is_cuda
