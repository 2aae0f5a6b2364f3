"""Stores whose rows are coded in few bits: built, read, verified, compared and written again."""

import dataclasses
import json

import pytest
import torch

from flexmemory.tol import build as build_module
from flexmemory.tol.build import ModelRows, build_store
from flexmemory.tol.coding import Coding, SliceTensors, coding_of
from flexmemory.tol.diff import difference
from flexmemory.tol.disk import DiskRows
from flexmemory.tol.requantize import requantize
from flexmemory.tol.scheme import Band, Scheme
from flexmemory.tol.store import ORDER, TENSORS, ToLStore
from flexmemory.tol.verify import verify_store

CODECS = [
    "fp8",
    "int8",
    "int4",
    "int3",
    "int2",
    "nf4",
    "normal5",
    "normal1",
    "svd16",
    "svd24+int8",
    "svd16+normal3",
    "trellis2",
    "svd16+trellis3",
]


def rows_of(store, ids):
    rows = torch.empty((len(ids), store.num_slices, store.hidden_size), dtype=store.decoded_dtype)
    with DiskRows(store) as tier:
        tier.gather(ids, rows)
    return rows.float()


def banded(checkpoint, *, embedding=False):
    """Three bands in a shuffled order, with runs of widths, a basis, a dropped slice and feedback."""
    config = checkpoint.config
    vocab_size, width = config.vocab_size, config.hidden_size
    generator = torch.Generator().manual_seed(7)
    order = torch.randperm(vocab_size, generator=generator)
    fine = Coding(levels="normal", widths=((8, width - 8),), group=width - 8, basis=True)
    mixed = Coding(levels="trellis", widths=((6, 8), (4, 24), (2, width - 40)), group=width - 8, basis=True)
    codings = [
        [coding_of("bf16", width), fine, coding_of("int4", width)],
        [coding_of("int8", width), mixed, coding_of("normal3", width)],
        [coding_of("normal2", width), mixed, None],
    ]
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q[: width - 8]
    bands, tensors = [], []
    for size, slices in zip((5, 20, vocab_size - 25), codings, strict=True):
        values = [
            SliceTensors(
                gain=None if coding is None or coding.plain else torch.full((coding.num_coefficients,), 4.0),
                basis=basis if place == 1 else None,
            )
            for place, coding in enumerate(slices)
        ]
        if embedding:
            slices, values = [coding_of("bf16", width), *slices], [SliceTensors(), *values]
        bands.append(Band(tokens=size, slices=tuple(slices)))
        tensors.append(tuple(values))
    return Scheme(
        codec="planned", layers=(0, 1, 2), embedding=embedding, hidden_size=width, bands=tuple(bands),
        tensors=tuple(tensors), order=order, feedback={0: {1: 0.1 * torch.eye(width)}},
    )  # fmt: skip


@pytest.mark.parametrize("codec", CODECS)
def test_a_coded_store_holds_the_rows_within_its_errors(nano, tmp_path, codec):
    store = build_store(nano, tmp_path / "store", codec=codec)
    ids = torch.arange(store.vocab_size)
    exact = ModelRows(nano, device="cpu")(ids)[:, 1:]
    decoded = rows_of(store, ids)
    assert store.manifest.coded is not None
    errors = torch.tensor(store.manifest.coded.errors)[0][:, None]
    assert ((decoded - exact).abs() <= errors + decoded.abs() * 2**-8).all()
    assert (errors < exact.abs().max() * 1.5).all()
    assert store.row_bytes == store.num_slices * coding_of(codec, store.hidden_size).nbytes
    assert verify_store(store.path, checkpoint=nano, sample=20).sampled >= 20


@pytest.mark.parametrize("embedding", [False, True])
def test_bands_are_read_by_token(nano, tmp_path, embedding):
    scheme = banded(nano, embedding=embedding)
    store = build_store(nano, tmp_path / "store", scheme=scheme, chunk_tokens=64, block_bytes=4096)
    assert len(store.manifest.shards) == 3
    assert store.nbytes == sum(band.tokens * band.row_bytes for band in scheme.bands)
    slices = [0] * embedding + [1 + layer for layer in store.layers]
    exact = ModelRows(nano, device="cpu")(torch.arange(store.vocab_size))[:, slices]
    stored = dataclasses.replace(scheme, tensors=store.tensors)
    assert scheme.order is not None
    assert store.positions is not None
    ids = torch.tensor([3, 400, 3, int(scheme.order[0]), int(scheme.order[4]), int(scheme.order[5]), 77, 511])
    decoded = rows_of(store, ids)
    places = store.positions[ids]
    for row, (token, band) in enumerate(zip(ids.tolist(), store.band_of(places).tolist(), strict=True)):
        data = dataclasses.replace(scheme, tensors=build_module.as_stored(scheme)).encode(exact[[token]], band)
        torch.testing.assert_close(decoded[row], stored.decode(data, band)[0], rtol=1e-2, atol=1e-2)
        raw = torch.full((store.row_bytes,), 255, dtype=torch.uint8).numpy()
        with DiskRows(store) as tier:
            tier.read_row(token, raw)
        assert raw[: data.shape[1]].tolist() == data[0].tolist()
    assert store.band_of(store.positions[scheme.order]).tolist() == [0] * 5 + [1] * 20 + [2] * (store.vocab_size - 25)
    verify_store(store.path, checkpoint=nano, sample=100)


def test_an_interrupted_build_ends_with_the_same_bytes(nano, tmp_path, monkeypatch):
    scheme = banded(nano)
    sizes = {"scheme": scheme, "chunk_tokens": 64, "block_bytes": 4096}
    whole = build_store(nano, tmp_path / "whole", **sizes)
    written = []

    def stops(*args, **kwargs):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(write(*args, **kwargs))

    write = build_module._write_chunk
    monkeypatch.setattr(build_module, "_write_chunk", stops)
    with pytest.raises(KeyboardInterrupt):
        build_store(nano, tmp_path / "part", **sizes)
    monkeypatch.undo()
    part = build_store(nano, tmp_path / "part", **sizes)
    assert part.manifest == whole.manifest
    for file in (*[shard.file for shard in whole.manifest.shards], TENSORS, ORDER):
        assert (part.path / file).read_bytes() == (whole.path / file).read_bytes()


def test_fewer_layers_are_a_prefix_of_the_same_file(nano, tmp_path):
    for scheme in (None, banded(nano)):
        store = build_store(nano, tmp_path / f"store{scheme is None}", scheme=scheme)
        ids = torch.tensor([5, 9, 300])
        whole = rows_of(store, ids)
        for kept in range(1, len(store.layers) + 1):
            part = ToLStore.open(store.path, checkpoint=nano, keep_layers=kept)
            assert part.layers == store.layers[:kept]
            assert part.row_bytes < store.row_bytes or kept == len(store.layers)
            torch.testing.assert_close(rows_of(part, ids), whole[:, :kept], rtol=0, atol=0)
    with pytest.raises(ValueError, match="rows have 3 layers; 4 of them cannot be kept"):
        ToLStore.open(store.path, keep_layers=4)


@pytest.mark.parametrize("codec", ["int4", "bf16"])
def test_another_codec_without_the_checkpoint(nano, tmp_path, codec):
    """From fp32 rows it is what the checkpoint gives, to the byte where nothing was lost."""
    source = build_store(nano, tmp_path / "source", codec="fp32", embedding=True, layers=[2, 0])
    again = requantize(source, tmp_path / "again", codec=codec)
    direct = build_store(nano, tmp_path / "direct", codec=codec, embedding=True, layers=[2, 0])
    assert again.manifest.checkpoint_fingerprint == nano.fingerprint
    assert again.layers == (2, 0)
    torch.testing.assert_close(rows_of(again, torch.arange(512)), rows_of(direct, torch.arange(512)))
    less = requantize(source, tmp_path / "less", codec=codec, layers=[0])
    assert less.layers == (0,)
    with pytest.raises(ValueError, match=r"holds layers \[2, 0\]; it lacks \[1\]"):
        requantize(source, tmp_path / "more", codec=codec, layers=[1])
    with pytest.raises(FileExistsError):
        requantize(source, tmp_path / "less", codec=codec)


def test_stores_are_compared(nano, tmp_path):
    exact = build_store(nano, tmp_path / "fp32", codec="fp32")
    rough = build_store(nano, tmp_path / "int4", codec="int4", layers=[1, 0])
    found = difference(exact, rough)
    assert found.names == ("layer 0", "layer 1")
    assert found.missing == ("layer 2",)
    one, other = rows_of(exact, torch.arange(512))[:, :2], rows_of(rough, torch.arange(512))[:, [1, 0]]
    error = other - one
    torch.testing.assert_close(found.rms, error.square().mean(dim=(0, 2)).sqrt())
    torch.testing.assert_close(found.largest, error.abs().amax(dim=(0, 2)))
    torch.testing.assert_close(found.by_token, error.norm(dim=2) / one.norm(dim=2))
    token, name, worst = found.worst(1)[0]
    assert worst == float(found.by_token.max()) == float(found.by_token[token, int(name[-1])])
    same = difference(exact, exact)
    assert float(same.by_token.max()) == 0
    assert json.dumps(found.to_json())


@pytest.mark.parametrize(("file", "reason"), [(TENSORS, "does not match its checksum"), (ORDER, "is missing")])
def test_damaged_parts_are_found_at_opening(nano, tmp_path, file, reason):
    store = build_store(nano, tmp_path / "store", scheme=banded(nano))
    if "missing" in reason:
        (store.path / file).unlink()
    else:
        data = bytearray((store.path / file).read_bytes())
        data[-1] ^= 1
        (store.path / file).write_bytes(data)
    with pytest.raises(ValueError, match=f"damaged: {file} {reason}"):
        ToLStore.open(store.path)


def test_rows_that_are_not_finite_are_refused(nano, tmp_path, monkeypatch):
    class Broken(ModelRows):
        def __call__(self, token_ids):
            rows = super().__call__(token_ids)
            rows[token_ids == 37, 2, 1] = torch.nan
            return rows

    monkeypatch.setattr(build_module, "ModelRows", Broken)
    with pytest.raises(ValueError, match="token 37 in layer 1 is not finite"):
        build_store(nano, tmp_path / "store", scheme=banded(nano))
