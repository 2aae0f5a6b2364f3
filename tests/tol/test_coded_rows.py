"""Tiers of stores in few bits keep encoded bytes, and every tier gives the rows of the reference."""

import dataclasses

import pytest
import torch

from flexmemory.tol import coded_rows
from flexmemory.tol.build import build_store
from flexmemory.tol.coded_rows import CodedRows
from flexmemory.tol.contract import RowTier
from flexmemory.tol.decoder import RowDecoder
from flexmemory.tol.disk import DiskRows
from flexmemory.tol.hot import HotRows, HotSet
from flexmemory.tol.tiers import lookup, open_rows
from tests.tol.conftest import poisoned
from tests.tol.schemes import scheme_of, several_bands

CODECS = ["int4", "svd16+normal3", "planned", "with embedding"]


def scheme_for(vocab_size: int, *, embedding: bool):
    """Four bands in a shuffled order; one slice of four is the embedding, or is left out."""
    torch.manual_seed(1)
    bands = several_bands(48).bands
    sizes = (9, 100, 60, vocab_size - 169)
    slices = slice(0, 4) if embedding else slice(1, 4)
    return scheme_of(
        *((size, list(band.slices[slices])) for size, band in zip(sizes, bands, strict=True)),
        width=48, embedding=embedding,
    )  # fmt: skip


@pytest.fixture(scope="session", params=CODECS)
def coded(request, nano, tmp_path_factory):
    """A store of each kind, and all of its rows as the reference decodes them."""
    folder = tmp_path_factory.mktemp("coded") / "store"
    if request.param in ("planned", "with embedding"):
        scheme = scheme_for(nano.config.vocab_size, embedding=request.param != "planned")
        store = build_store(nano, folder, scheme=scheme, chunk_tokens=64, block_bytes=3000)
    else:
        store = build_store(nano, folder, codec=request.param, block_bytes=3000)
    ids = torch.arange(store.vocab_size)
    data = torch.full((len(ids), store.row_bytes), 7, dtype=torch.uint8)
    with DiskRows(store) as disk:
        for token, row in zip(ids.tolist(), data.numpy(), strict=True):
            disk.read_row(token, row)
    places = ids if store.positions is None else store.positions
    rows = torch.empty((len(ids), store.num_slices, store.hidden_size), dtype=torch.bfloat16)
    RowDecoder(store.bands, store.tensors, hidden_size=store.hidden_size, device="cpu").decode(
        data, store.band_of(places), rows
    )
    return store, rows


@pytest.mark.parametrize("count", [0, 1, 30, 700])
@pytest.mark.parametrize("where", ["device", "host", "disk"])
def test_every_tier_gives_the_same_rows(coded, where, count, monkeypatch):
    monkeypatch.setattr(coded_rows, "GATHER_ROWS", 50)
    store, rows = coded
    tier = open_rows(store, where, device="cpu")
    assert isinstance(tier, RowTier)
    ids = torch.randint(store.vocab_size, (count,), generator=torch.Generator().manual_seed(count))
    out = poisoned(tier, count)
    assert out.dtype == torch.bfloat16
    tier.gather(ids, out)
    torch.testing.assert_close(out, rows[ids], rtol=2**-7, atol=1e-6)  # a basis: one unit of bf16
    if store.tensors[0][1].basis is None and store.tensors[0][0].basis is None:
        assert torch.equal(out, rows[ids])
    hot = HotRows(tier, HotSet.load(tier, torch.arange(0, 512, 3), device="cpu"))
    again = poisoned(tier, count)
    hot.gather(ids, again)
    torch.testing.assert_close(again, rows[ids], rtol=2**-7, atol=1e-6)


def test_tables_in_memory_are_as_small_as_on_disk(coded):
    store, _ = coded
    tier = open_rows(store, "host", device="cpu")
    assert isinstance(tier, CodedRows)
    assert store.nbytes <= tier.nbytes < store.nbytes + 4 * store.vocab_size
    assert (
        tier.nbytes
        == tier.data.nbytes
        == sum(band.tokens * pitch for band, pitch in zip(store.bands, tier.index.pitches, strict=True))
    )


def test_rows_looked_up_are_decoded(coded):
    store, rows = coded
    tier = open_rows(store, "device", device="cpu")
    ids = torch.tensor([[3, 500, 3], [0, 511, 77]])
    found = lookup(tier, ids, dtype=torch.bfloat16)
    assert not found.fixed
    place = store.num_slices - 1
    layer = found.layer(store.layers[-1])
    assert layer is not None
    torch.testing.assert_close(layer, rows[ids][:, :, place], rtol=2**-7, atol=1e-6)


def test_ids_and_outputs_that_do_not_fit_are_refused(coded):
    store, _ = coded
    tier = open_rows(store, "host", device="cpu")
    with pytest.raises(ValueError, match="token id 512 is out of range"):
        tier.gather(torch.tensor([0, 512]), poisoned(tier, 2))
    with pytest.raises(ValueError, match="out must be contiguous"):
        tier.gather(torch.tensor([0]), poisoned(tier, 1).float())


def test_damaged_rows_are_refused(nano, tmp_path):
    store = build_store(nano, tmp_path / "store", codec="int4")
    path = store.paths[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        open_rows(store, "host", device="cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["device", "host", "disk"])
def test_rows_reach_a_gpu(coded, where):
    store, rows = coded
    tier = open_rows(store, where, device="cuda")
    exact = rows.double()
    if isinstance(tier, CodedRows):
        assert tier.data.is_cuda if where == "device" else tier.data.is_pinned()
    for count in (1, 5, 1500):
        ids = torch.randint(store.vocab_size, (count,), generator=torch.Generator().manual_seed(count))
        for place in ("cpu", "cuda"):
            out = poisoned(tier, count).cuda()
            tier.gather(ids.to(place), out)
            error = (out.cpu().double() - exact[ids]).norm()
            assert error <= 2**-8 * exact[ids].norm()
    if where != "host":
        back = poisoned(tier, 3)
        tier.gather(torch.tensor([3, 2, 1]), back)
        assert (back.double() - exact[[3, 2, 1]]).norm() <= 2**-8 * exact[[3, 2, 1]].norm()


def test_the_first_layers_of_coded_rows_are_loaded_alone(coded):
    store, rows = coded
    kept = type(store).open(store.path, keep_layers=1)
    tier = open_rows(kept, "host", device="cpu")
    out = poisoned(tier, 512)
    tier.gather(torch.arange(512), out)
    torch.testing.assert_close(out, rows[:, : kept.num_slices], rtol=2**-7, atol=1e-6)
    assert dataclasses.replace(kept.manifest, layers=store.layers, coded=store.manifest.coded) == store.manifest
    assert isinstance(tier, CodedRows)
    assert tier.nbytes < store.nbytes
