"""Rows decoded at once are those that the reference decodes slice by slice."""

import dataclasses

import pytest
import torch

from flexmemory.tol import decoder as decoder_module
from flexmemory.tol.decoder import RowDecoder
from flexmemory.tol.scheme import as_stored
from tests.tol.schemes import CODECS, decoded, encoded, one_codec, several_bands

WIDTH = 48


def scheme_of_name(name):
    torch.manual_seed(0)
    return several_bands(WIDTH) if name == "several bands" else one_codec(name, WIDTH)


def fresh(scheme, count, dtype=torch.float32):
    return torch.full((count, scheme.num_slices, WIDTH), float("nan"), dtype=dtype)


@pytest.mark.parametrize("count", [0, 1, 2, 29])
@pytest.mark.parametrize("name", [*CODECS, "several bands"])
def test_rows_are_those_of_the_reference(name, count, monkeypatch):
    monkeypatch.setattr(decoder_module, "CHUNK_NUMBERS", 3 * 4 * WIDTH)  # a few rows at a time
    scheme = scheme_of_name(name)
    decoder = RowDecoder(scheme.bands, scheme.tensors, hidden_size=WIDTH, device="cpu")
    data, band = encoded(scheme, count)
    out = fresh(scheme, count)
    decoder.decode(data, band, out)
    expected = decoded(scheme, data, band, torch.float32)
    if scheme.tensors[0][1].basis is None:
        assert torch.equal(out, expected)
    else:  # of which a product may be summed in another order
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=2e-6)
    rounded = fresh(scheme, count, torch.bfloat16)
    decoder.decode(data, band, rounded)
    assert torch.equal(rounded, out.bfloat16())


def test_one_row_is_that_of_many():
    scheme = scheme_of_name("several bands")
    decoder = RowDecoder(scheme.bands, scheme.tensors, hidden_size=WIDTH, device="cpu")
    data, band = encoded(scheme, 20)
    many = fresh(scheme, 20)
    decoder.decode(data, band, many)
    for row in range(20):
        one = fresh(scheme, 1)
        decoder.decode(data[row : row + 1], band[row : row + 1], one)
        torch.testing.assert_close(one[0], many[row], rtol=1e-6, atol=2e-6)


def test_dropped_slices_are_zero():
    scheme = scheme_of_name("several bands")
    decoder = RowDecoder(scheme.bands, scheme.tensors, hidden_size=WIDTH, device="cpu")
    data, _ = encoded(scheme, 4)
    out = fresh(scheme, 4)
    decoder.decode(data, torch.full((4,), 2), out)
    assert out[:, 3].eq(0).all()
    assert out[:, :3].ne(0).any()


@pytest.mark.parametrize("slices", [1, 2, 3])
def test_the_first_slices_of_rows_can_be_decoded_alone(slices):
    """From the bytes that they have, with the tensors of all."""
    scheme = scheme_of_name("several bands")
    bands = tuple(dataclasses.replace(band, slices=band.slices[:slices]) for band in scheme.bands)
    data, band = encoded(scheme, 15)
    out = fresh(scheme, 15)[:, :slices].contiguous()
    decoder = RowDecoder(bands, scheme.tensors, hidden_size=WIDTH, device="cpu")
    decoder.decode(data[:, : max(one.row_bytes for one in bands)].contiguous(), band, out)
    expected = decoded(scheme, data, band, torch.float32)[:, :slices]
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=2e-6)


def test_tensors_as_they_are_stored_are_shared_by_bands():
    scheme = scheme_of_name("several bands")
    stored = dataclasses.replace(scheme, tensors=as_stored(scheme))
    decoder = RowDecoder(stored.bands, stored.tensors, hidden_size=WIDTH, device="cpu")
    data, band = encoded(stored, 15)
    out = fresh(stored, 15)
    decoder.decode(data, band, out)
    torch.testing.assert_close(out, decoded(stored, data, band, torch.float32), rtol=1e-6, atol=2e-6)
    basis = stored.tensors[0][1].basis
    assert basis is not None
    assert decoder.nbytes < 3 * basis.nbytes + 60_000
