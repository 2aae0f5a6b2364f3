"""Rows on disk: read around the page cache or through it, one by one or together, and what failures leave behind."""

import concurrent.futures
import dataclasses
import errno
import inspect
import logging
import mmap
import os

import numpy as np
import pytest
import torch

from flexmemory.storage import write_json
from flexmemory.tol import disk
from flexmemory.tol.build import build_store
from flexmemory.tol.disk import DiskRows, cached_share, drop_cache
from flexmemory.tol.format import MANIFEST, shard_header
from flexmemory.tol.layout import layout
from flexmemory.tol.pages import AlignedBuffer, address_of, after, resident_pages
from flexmemory.tol.store import ToLStore
from tests.conftest import NANO
from tests.tol.conftest import SIZES, poisoned, whole_table

EIO = OSError(errno.EIO, "Input/output error")


def opened_with_direct_reads(store) -> DiskRows:
    rows = DiskRows(store, direct="always")
    if not rows.direct:
        rows.close()
        pytest.skip("the file system of the temporary folder has no direct reads")
    return rows


@pytest.fixture(params=[48, 1336, 2048], ids=["unaligned", "padded", "whole pages"])
def shaped(request, tmp_path):
    """Stores of random bytes whose rows are no pages, padded to pages, and whole pages; several files each."""
    config = dataclasses.replace(NANO["nano-memory"], hidden_size=request.param, vocab_size=40)
    manifest = layout(config, shard_bytes=60_000, block_bytes=30_000)
    manifest = manifest.with_blocks(["0" * 64] * sum(-(-s.tokens // manifest.block_rows) for s in manifest.shards))
    generator = np.random.default_rng(0)
    for shard in manifest.shards:
        rows = generator.integers(256, size=shard.tokens * manifest.stride_bytes, dtype=np.uint8)
        (tmp_path / shard.file).write_bytes(shard_header(manifest, shard) + rows.tobytes())
    write_json(tmp_path / MANIFEST, manifest.to_json())
    return ToLStore.open(tmp_path)


def same_bits(rows: torch.Tensor, others: torch.Tensor) -> bool:
    return torch.equal(rows.view(torch.uint8), others.view(torch.uint8))  # random bytes hold NaN


@pytest.mark.parametrize("span_rows", [1, 3, 512])
def test_direct_and_buffered_reads_give_the_tables_bits(shaped, span_rows, monkeypatch):
    monkeypatch.setattr(disk, "SPAN_ROWS", span_rows)
    monkeypatch.setattr(disk, "BYTES_PER_THREAD", 1)  # many threads
    table = whole_table(shaped)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.arange(40), torch.tensor([39]), torch.randint(40, (100,), generator=generator)]
    for rows in (DiskRows(shaped, direct="never"), opened_with_direct_reads(shaped)):
        with rows:
            for ids in batches:
                out = poisoned(rows, len(ids))
                rows.gather(ids, out)
                assert same_bits(out, table[ids])


def test_direct_reads_go_straight_to_where_rows_are_wanted_if_both_lie_on_pages(shaped, monkeypatch):
    targets, original = [], os.preadv

    def noting(fd, buffers, offset):
        targets.append(address_of(np.frombuffer(buffers[0], np.uint8)))
        return original(fd, buffers, offset)

    size = shaped.row_bytes
    memory = np.frombuffer(mmap.mmap(-1, 3 * 4096 + size), np.uint8)
    with opened_with_direct_reads(shaped) as rows:
        monkeypatch.setattr(os, "preadv", noting)
        for start in (0, 64, 4096):
            out = memory[start : start + size]
            rows.read_row(17, out)
            assert out.tobytes() == whole_table(shaped)[17].view(torch.uint8).numpy().tobytes()
            straight = size % 4096 == 0 and start % 4096 == 0
            target = targets.pop()
            assert (target == address_of(out)) == straight
            assert target % 4096 == 0
            assert not targets


@pytest.mark.parametrize("direct", ["never", "always"])
def test_a_row_is_read_from_any_thread(stored, direct):
    table = whole_table(stored).flatten(1).view(torch.uint8).numpy()
    with DiskRows(stored, direct=direct) as rows, concurrent.futures.ThreadPoolExecutor(8) as pool:

        def right(token: int) -> bool:
            out = np.full(stored.row_bytes, 255, np.uint8)
            rows.read_row(token, out)
            return out.tobytes() == table[token].tobytes()

        assert all(pool.map(right, [*range(512), *reversed(range(512))]))


def test_a_row_that_cannot_be_read_so_is_refused(store):
    with DiskRows(store) as rows:
        good = np.empty(store.row_bytes, np.uint8)
        for bad in (-1, 512):
            with pytest.raises(ValueError, match=f"token id {bad} is out of range: the vocabulary has 512 ids"):
                rows.read_row(bad, good)
        for out in (good[1:], np.empty(2 * store.row_bytes, np.uint8)[::2], good.view(np.int8)):
            with pytest.raises(ValueError, match=r"out must be contiguous uint8 of shape \[288\], got"):
                inspect.unwrap(DiskRows.read_row)(rows, 3, out)  # behind the hook that checks types first
    with pytest.raises(ValueError, match="are closed; open them again"):
        rows.read_row(3, good)


def test_reads_go_around_a_cold_cache_and_through_a_warm_one(store, monkeypatch):
    share = 0.0
    monkeypatch.setattr(disk, "cached_share", lambda store, most: share)
    with opened_with_direct_reads(store):
        pass
    with DiskRows(store) as rows:
        assert rows.direct
        share = 1.0
        assert rows.direct  # looked up when told to
        rows.look_at_cache()
        assert not rows.direct
        share = 0.0
        rows.look_at_cache()
        assert rows.direct
        out = poisoned(rows, 2)
        rows.gather(torch.tensor([300, 5]), out)
        assert torch.equal(out, whole_table(store)[torch.tensor([300, 5])])
        descriptors = list(rows._descriptors)
        assert len(descriptors) == 2 * len(store.paths)
    for descriptor in descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_the_page_cache_is_used_where_files_cannot_be_opened_for_direct_reads(store, monkeypatch, caplog):
    monkeypatch.setattr(disk, "open_direct", lambda path: None)
    with caplog.at_level(logging.WARNING), DiskRows(store, direct="always") as rows:
        assert not rows.direct
        out = poisoned(rows, 2)
        rows.gather(torch.tensor([300, 5]), out)
        assert torch.equal(out, whole_table(store)[torch.tensor([300, 5])])
    assert "no direct reads here; rows are read through the page cache" in caplog.text


def test_the_page_cache_is_used_where_direct_reads_are_refused(store, monkeypatch, caplog):
    with opened_with_direct_reads(store) as rows:
        direct, original = set(rows._direct_descriptors), os.preadv

        def picky(fd, buffers, offset):
            if fd in direct:
                raise OSError(errno.EINVAL, "Invalid argument")
            return original(fd, buffers, offset)

        monkeypatch.setattr(os, "preadv", picky)
        out = poisoned(rows, 2)
        rows.gather(torch.tensor([300, 5]), out)
        assert torch.equal(out, whole_table(store)[torch.tensor([300, 5])])
        assert not rows.direct
    assert "no direct reads here" in caplog.text


@pytest.mark.parametrize("direct", ["never", "always"])
def test_a_file_cut_short_fails_what_needs_it_and_is_served_again_when_whole(store, direct):
    table = whole_table(store)
    shard = store.paths[2]
    data = shard.read_bytes()
    with DiskRows(store, direct=direct) as rows:
        os.truncate(shard, 4096 + 10 * 288 + 7)
        out = poisoned(rows, 3)
        with pytest.raises(OSError, match=rf"{shard} ends at byte {4096 + 10 * 288 + 7}, 281 bytes early"):
            rows.gather(torch.tensor([265, 266, 5]), out)
        for row, token in zip(out, (265, 266, 5), strict=True):
            if token != 266:
                assert torch.equal(row, table[token]) or row.isnan().all()
        with pytest.raises(OSError, match=rf"{shard} ends at byte"):
            rows.read_row(300, np.empty(288, np.uint8))
        rows.gather(torch.tensor([265, 5]), out[:2])
        assert torch.equal(out[:2], table[[265, 5]])
        shard.write_bytes(data)
        rows.gather(torch.tensor([265, 266, 5]), out)
        assert torch.equal(out, table[[265, 266, 5]])


@pytest.mark.parametrize("direct", ["never", "always"])
def test_a_failing_disk_fails_one_call_and_touches_no_other_row(store, direct, monkeypatch):
    monkeypatch.setattr(disk, "BYTES_PER_THREAD", 1)
    table = whole_table(store)
    original = os.preadv
    with DiskRows(store, direct=direct) as rows:
        bad_files = {rows._descriptors[1], *rows._direct_descriptors[1:2]}

        def failing(fd, buffers, offset):
            if fd in bad_files:
                raise EIO
            return original(fd, buffers, offset)

        ids = torch.arange(0, 512, 3)
        out = poisoned(rows, len(ids))
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", failing)
            message = rf"cannot read {store.paths[1]} at byte \d+ \(Input/output error\)"
            with pytest.raises(OSError, match=message):
                rows.gather(ids, out)
            with pytest.raises(OSError, match=message):
                rows.read_row(128, np.empty(288, np.uint8))
            for row, token in zip(out, ids, strict=True):
                assert row.isnan().all() if 128 <= token < 256 else torch.equal(row, table[token]) or row.isnan().all()
            before = out.clone()
            others = poisoned(rows, 2)
            rows.gather(torch.tensor([5, 300]), others)
            assert torch.equal(others, table[[5, 300]])
        assert torch.equal(out.view(torch.uint8), before.view(torch.uint8))  # no thread goes on writing
        rows.gather(ids, out)
        assert torch.equal(out, table[ids])


def test_what_the_page_cache_holds_can_be_dropped(nano, tmp_path):
    store = build_store(nano, tmp_path / "store", **SIZES)
    for path in store.paths:
        path.read_bytes()
    assert cached_share(store) == 1.0
    assert cached_share(store, most=4) == 1.0
    drop_cache(store)
    if resident_pages(store.paths[0]).all():
        pytest.skip("the file system of the temporary folder keeps its pages")
    assert cached_share(store) == 0.0
    store.paths[0].read_bytes()
    assert 0 < cached_share(store) < 1


def test_sampled_pages_are_spread_over_the_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(100 * mmap.PAGESIZE + 1))
    assert resident_pages(path).shape == (101,)
    assert resident_pages(path, most=7).shape == (7,)
    assert resident_pages(path, most=1000).shape == (101,)


def test_aligned_memory_grows_and_stays_on_pages():
    buffer = AlignedBuffer()
    for size in (1, 5000, 4096 * 9, 12):
        memory = buffer.take(size)
        assert len(memory) == size
        assert np.frombuffer(memory, np.uint8).ctypes.data % 4096 == 0


@pytest.mark.parametrize(("count", "left"), [(0, [3, 2]), (1, [2, 2]), (3, [2]), (4, [1]), (5, [])])
def test_buffers_go_on_where_a_short_read_ended(count, left):
    rest = after([memoryview(bytearray(3)), memoryview(bytearray(2))], count)
    assert [len(buffer) for buffer in rest] == left
