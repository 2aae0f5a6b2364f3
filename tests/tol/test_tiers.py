"""Tiers: moving rows changes no bit, and looked-up rows make the model's logits."""

import dataclasses
import inspect
import os

import pytest
import torch

from flexmemory.model.memory import Rows, ScaledRows
from flexmemory.tol.build import build_store
from flexmemory.tol.disk import DISK_THREADS
from flexmemory.tol.tiers import DeviceRows, DiskRows, HostRows, RowTier, Where, lookup, open_rows
from tests.conftest import NANO
from tests.tol.conftest import poisoned, whole_table

TIERS: dict[Where, type[DeviceRows | HostRows | DiskRows]] = {"device": DeviceRows, "host": HostRows, "disk": DiskRows}


@pytest.fixture(params=TIERS)
def tier(request, stored):
    rows = open_rows(stored, request.param, device="cpu")
    assert type(rows) is TIERS[request.param]
    yield rows
    if isinstance(rows, DiskRows):
        rows.close()


def layer_of(rows: Rows, layer: int) -> torch.Tensor:
    found = rows.layer(layer)
    assert found is not None
    return found


def test_tiers_say_what_they_hold(tier, stored):
    assert isinstance(tier, RowTier)
    assert (tier.layers, tier.hidden_size, tier.vocab_size) == ((0, 1, 2), 48, 512)
    assert tier.dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[stored.codec]


@pytest.mark.parametrize("count", [0, 1, 3, 7, 4 * DISK_THREADS + 3, 700])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_gathered_rows_are_the_tables_bits(count, dtype, tier, stored):
    table = whole_table(stored)
    generator = torch.Generator().manual_seed(count)
    ids = torch.randint(512, (count,), generator=generator, dtype=dtype)  # unsorted, with duplicates
    out = poisoned(tier, count)
    tier.gather(ids, out)
    assert torch.equal(out, table[ids])


def test_every_token_can_be_gathered(tier, stored):
    out = poisoned(tier, 512)
    tier.gather(torch.arange(512), out)
    assert torch.equal(out, whole_table(stored))


def test_padding_is_not_part_of_a_row(checkpoint_of, tmp_path):
    wide = dataclasses.replace(NANO["nano-memory"], hidden_size=1336, intermediate_size=8, vocab_size=20)
    store = build_store(checkpoint_of(wide), tmp_path / "wide", block_bytes=40_000)
    assert store.stride_bytes > store.row_bytes
    ids = torch.tensor([19, 3, 3, 0])
    for where in TIERS:
        rows = open_rows(store, where, device="cpu")
        out = poisoned(rows, 4)
        rows.gather(ids, out)
        assert torch.equal(out, whole_table(store)[ids])


@pytest.mark.parametrize("bad", [-1, 512])
def test_ids_out_of_range_are_refused(bad, tier):
    out = poisoned(tier, 2)
    with pytest.raises(ValueError, match=f"token id {bad} is out of range"):
        tier.gather(torch.tensor([0, bad]), out)
    with pytest.raises(ValueError, match=f"token id {bad} is out of range"):
        lookup(tier, torch.tensor([[0, bad]]), dtype=torch.float32)


def test_outputs_that_do_not_fit_are_refused(tier):
    ids = torch.tensor([0, 1])
    other = {torch.bfloat16: torch.float32, torch.float32: torch.bfloat16}[tier.dtype]
    for out in (
        torch.empty(2, 2, 48, dtype=tier.dtype),
        torch.empty(2, 3, 47, dtype=tier.dtype),
        torch.empty(2, 3, 48, dtype=other),
        torch.empty(2, 48, 3, dtype=tier.dtype).transpose(1, 2),
    ):
        with pytest.raises(ValueError, match=r"out must be contiguous .* of shape \[2, 3, 48\], got"):
            tier.gather(ids, out)


def test_unknown_places_are_refused(stored):
    with pytest.raises(ValueError, match="device, host or disk"):
        inspect.unwrap(open_rows)(stored, "cloud", device="cpu")  # behind the hook that checks types first


def test_lookup_gathers_each_id_once_and_casts(stored, tokens):
    ids = tokens(2, 30, vocab_size=20)
    tier = open_rows(stored, "device", device="cpu")
    seen = []
    original = tier.gather
    tier.gather = lambda token_ids, out: seen.append(token_ids.tolist()) or original(token_ids, out)
    rows = lookup(tier, ids, dtype=torch.float64)
    assert seen == [sorted(set(ids.flatten().tolist()))]
    for layer in range(3):
        assert torch.equal(layer_of(rows, layer), whole_table(stored)[ids][:, :, layer].double())


@pytest.mark.parametrize("name", ["nano-memory", "nano-flex3"])
@pytest.mark.parametrize(("codec", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_lookup_is_as_exact_as_compute(name, codec, dtype, checkpoint_of, tokens, tmp_path):
    """err(lookup against fp64) <= 2 err(compute against fp64): GEMM shapes differ, so they are not bitwise equal."""
    checkpoint = checkpoint_of(NANO[name], dtype=dtype)
    store = build_store(checkpoint, tmp_path / "store", codec=codec)
    ids = tokens(4, 60)
    with torch.inference_mode():
        exact = checkpoint.load(dtype=torch.float64)(ids)
        computed = checkpoint.load()(ids)
        model = checkpoint.load(memory=False)
        looked_up = {
            where: model(ids, lookup(open_rows(store, where, device="cpu"), ids, dtype=dtype)) for where in TIERS
        }

    def error(logits):
        return float((logits.double() - exact).square().mean().sqrt() / exact.std())

    assert 0 < error(computed) < 0.03
    for logits in looked_up.values():
        assert logits.dtype == dtype
        assert 0 < error(logits) <= 2 * error(computed)


def test_kept_layers_are_the_model_without_the_others(nano, tokens, tmp_path):
    store = build_store(nano, tmp_path / "store", codec="fp32", layers=[2, 0])
    whole = build_store(nano, tmp_path / "whole", codec="fp32")
    assert store.layers == (2, 0)
    ids = tokens(2, 20)
    model = nano.load(memory=False)
    rows = lookup(open_rows(store, "disk", device="cpu"), ids, dtype=torch.float32)
    assert rows.layer(1) is None
    every = lookup(open_rows(whole, "disk", device="cpu"), ids, dtype=torch.float32)
    with torch.inference_mode():
        assert torch.equal(model(ids, rows), model(ids, ScaledRows(every, [1.0, 0.0, 1.0])))
        assert not torch.equal(model(ids, rows), model(ids, every))


def test_files_cut_short_while_open_are_reported(store):
    with DiskRows(store) as rows:
        shard = store.path / "rows-00002.safetensors"
        os.truncate(shard, 4096 + 10 * 288 + 7)
        out = poisoned(rows, 1)
        rows.gather(torch.tensor([265]), out)  # before the cut
        for ids in ([266], [256, 300], list(range(512))):
            with pytest.raises(OSError, match=rf"{shard} ends at byte \d+, \d+ bytes early"):
                rows.gather(torch.tensor(ids), poisoned(rows, len(ids)))


def test_read_errors_name_the_file(store, monkeypatch):
    def broken(*args):
        raise OSError(5, "Input/output error")

    with DiskRows(store) as rows:
        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(OSError, match=r"cannot read .*rows-00000.safetensors at byte 4096 \(Input/output error\)"):
            rows.gather(torch.tensor([0]), poisoned(rows, 1))


def test_short_reads_are_continued(store, monkeypatch):
    original = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: original(fd, [buffers[0][:100]], offset))
    with DiskRows(store) as rows:
        ids = torch.tensor([500, 3])
        out = poisoned(rows, 2)
        rows.gather(ids, out)
    assert torch.equal(out, whole_table(store)[ids])


def test_disk_rows_read_each_row_once_in_the_order_of_the_disk_and_neighbours_at_once(store, monkeypatch):
    reads = []
    original = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda fd, buffers, at: reads.append((at, sum(map(len, buffers)))) or original(fd, buffers, at)
    )
    ids = torch.tensor([130, 7, 1, 6, 130, 127, 128])
    with DiskRows(store, direct="never") as rows:
        out = poisoned(rows, len(ids))
        rows.gather(ids, out)
    # 127 and 128 lie in two files
    assert reads == [(4096 + 288, 288), (4096 + 6 * 288, 576), (4096 + 127 * 288, 288), (4096, 288), (4672, 288)]
    assert torch.equal(out, whole_table(store)[ids])


def test_closed_rows_are_refused_and_their_files_closed(store):
    with DiskRows(store) as rows:
        descriptors = list(rows._descriptors)
        assert len(descriptors) == 4
    with pytest.raises(ValueError, match="are closed; open them again"):
        rows.gather(torch.tensor([0]), poisoned(rows, 1))
    for descriptor in descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
    rows.close()  # twice is fine


def test_forgotten_disk_rows_close_their_files(store):
    rows = DiskRows(store)
    descriptors = list(rows._descriptors)
    del rows
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptors[0])


@pytest.mark.gpu
@pytest.mark.parametrize("where", TIERS)
def test_rows_reach_a_gpu_unchanged(where, stored):
    rows = open_rows(stored, where, device="cuda")
    if isinstance(rows, HostRows):
        assert rows.table.is_pinned()
    generator = torch.Generator().manual_seed(0)
    for count in (1, 5, 700):
        ids = torch.randint(512, (count,), generator=generator)
        for place in ("cpu", "cuda"):
            out = poisoned(rows, count).cuda()
            rows.gather(ids.to(place), out)
            assert torch.equal(out.cpu(), whole_table(stored)[ids])
        looked_up = lookup(rows, ids.view(1, -1).cuda(), dtype=rows.dtype)
        assert torch.equal(layer_of(looked_up, 1).cpu(), whole_table(stored)[ids][None, :, 1])
