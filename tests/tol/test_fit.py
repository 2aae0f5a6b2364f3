import importlib.util

import pytest
import torch

from flexmemory.tol.coding import scale_of
from flexmemory.tol.fit import FAISS, fit, gather_statistics
from flexmemory.tol.rise import coded_rows
from flexmemory.tol.scheme import as_stored, pack_basis, round_basis, unpack_basis

V, L, D = 300, 3, 32


def table(seed=0):
    """An embedding and rows of L layers whose channels and tokens differ in size, with a mean."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(V, 1 + L, D, generator=generator) * torch.logspace(-1, 1, D)
    rows = rows * torch.exp(torch.randn(V, 1, 1, generator=generator)) + torch.randn(1 + L, D, generator=generator)
    rows[7] *= 30
    return rows


ROWS = table()


def source(token_ids):
    return ROWS[token_ids]


def fitted(codec, **kwargs):
    scheme = fit(codec, kwargs.pop("source", source), vocab_size=V, hidden_size=D, layers=range(L), **kwargs)
    return type(scheme)(**{**vars(scheme), "tensors": as_stored(scheme)})


@pytest.mark.parametrize("chunk_tokens", [7, 64, 1000])
def test_statistics_are_those_of_the_whole_table(chunk_tokens):
    weights = torch.rand(V, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(V, generator=torch.Generator().manual_seed(2))
    found = gather_statistics(
        source, places=[1, 3], sizes=[100, 200], weights=weights, order=order, second=True, sample=True,
        chunk_tokens=chunk_tokens,
    )  # fmt: skip
    rows, share = ROWS[:, [1, 3]], weights / weights.sum()
    assert torch.allclose(found.overall_mean, torch.einsum("v,vpd->pd", share, rows), rtol=1e-4, atol=1e-5)
    first = order[:100]
    part = share[first] / share[first].sum()
    assert torch.allclose(found.mean[0], torch.einsum("v,vpd->pd", part, rows[first]), rtol=1e-4, atol=1e-5)
    assert torch.equal(found.largest[0], rows[first].abs().amax(0))
    assert torch.allclose(found.norm[1], rows[order[100:]].norm(dim=-1).amax(0))
    centred = rows[:, 1] - torch.einsum("v,vd->d", share, rows[:, 1])
    assert torch.allclose(found.covariance(1), centred.T @ (share[:, None] * centred), rtol=1e-2, atol=1e-3)
    assert found.sample is not None
    assert len(found.sample) == V


@pytest.mark.parametrize("codec", ["int8", "fp8", "int4", "nf4", "normal4", "normal1", "svd16+int8", "svd32+normal4"])
def test_no_token_needs_a_scale_that_is_not_there(codec):
    scheme = fitted(codec)
    data = scheme.encode(ROWS[:, 1:], 0)
    at = 0
    for coding in scheme.bands[0].slices:
        assert coding is not None
        scales = scale_of(data[:, at : at + coding.num_scales])
        assert scales.max() < 1
        at += coding.nbytes


def test_int8_never_clips():
    scheme = fitted("int8")
    data = scheme.encode(ROWS[:, 1:], 0)
    error = (scheme.decode(data, 0) - ROWS[:, 1:]).abs()
    for place in range(L):
        gain = scheme.tensors[0][place].gain
        assert gain is not None
        step = scale_of(data[:, place * (D + 1) : place * (D + 1) + 1]) * gain
        assert (error[:, place] <= 0.501 * step + 1e-6).all()


@pytest.mark.parametrize(("codec", "most"), [
    ("bf16", 1e-5), ("int8", 1e-3), ("fp8", 2e-3), ("normal4", 0.03), ("nf4", 0.03), ("int2", 0.4), ("svd32", 1e-4),
    ("svd16", 0.05), ("svd32+normal4", 0.05),
])  # fmt: skip
def test_errors_are_as_small_as_the_bits_allow(codec, most):
    rows = coded_rows(fitted(codec), source, torch.arange(V))
    assert (rows - ROWS[:, 1:]).square().sum() / ROWS[:, 1:].square().sum() < most


def test_counts_move_errors_to_rare_tokens():
    counts = torch.ones(V, dtype=torch.int64)
    counts[:30] = 1000
    plain, weighted = (coded_rows(fitted("svd8", counts=c), source, torch.arange(V)) for c in (None, counts))
    error = [(rows - ROWS[:, 1:]).square().sum((1, 2)) for rows in (plain, weighted)]
    assert error[1][:30].sum() < 0.8 * error[0][:30].sum()


def test_embeddings_stay_bf16():
    rows = coded_rows(fitted("int2", embedding=True), source, torch.arange(V))
    assert torch.equal(rows[:, 0], ROWS[:, 0].bfloat16().float())
    rows = coded_rows(fitted("fp32", embedding=True), source, torch.arange(V))
    assert torch.equal(rows, ROWS)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_named(value):
    rows = ROWS.clone()
    rows[123, 1 + 2, 5] = value
    with pytest.raises(ValueError, match="token 123 in layer 2 is not finite"):
        fitted("int4", source=lambda ids: rows[ids])


def test_unknown_codecs_are_refused():
    with pytest.raises(ValueError, match="codec"):
        fitted("int7")


@pytest.mark.parametrize("bits", [4, 8])
def test_bases_come_back_from_a_store_as_they_were(bits):
    basis = round_basis(torch.randn(5, 16, generator=torch.Generator().manual_seed(0)), bits=bits)
    stored, scale = pack_basis(basis)
    assert stored.numel() == 5 * 16 * bits // 8
    assert torch.allclose(unpack_basis(stored, scale), basis, rtol=1e-6, atol=1e-7)


@pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="codebooks are trained by faiss")
def test_codebooks_beat_two_levels():
    pq, scalar = (coded_rows(fitted(codec), source, torch.arange(V)) for codec in ("pq4x8", "normal2"))
    error = [(rows - ROWS[:, 1:]).square().sum() for rows in (pq, scalar)]
    assert error[0] < error[1]


@pytest.mark.skipif(importlib.util.find_spec("faiss") is not None, reason="faiss is there")
def test_a_lack_of_faiss_is_said():
    with pytest.raises(ImportError, match="flexmemory\\[compress\\]"):
        fitted("pq4x8")
    assert "pip install" in FAISS
