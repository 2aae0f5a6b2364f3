"""The kernel that decodes rows gives those of the reference, wherever their bytes are.

On a GPU, or on a CPU by Triton's interpreter (`TRITON_INTERPRET=1`, as `make test` runs it).
"""

import dataclasses
import os

import pytest
import torch

from flexmemory.tol.scheme import as_stored, round_basis
from tests.tol.schemes import CODECS, decoded, encoded, one_codec, several_bands

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.interpreted if INTERPRETED else pytest.mark.gpu
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16
WIDTH = 48


def scheme_of_name(name, width=WIDTH):
    torch.manual_seed(0)
    return several_bands(width) if name == "several bands" else one_codec(name, width)


def kernel_of(scheme):
    from flexmemory.tol.decode_kernel import KernelDecoder

    return KernelDecoder(scheme.bands, scheme.tensors, hidden_size=scheme.hidden_size, device=DEVICE, basis_dtype=DTYPE)


def assert_as_exact(rows, exact):
    """err(fast) <= 2 err(reference, rounded)."""
    rows = rows.cpu()
    assert rows.isfinite().all()
    usual = (exact.to(rows.dtype).double() - exact).norm()
    assert (rows.double() - exact).norm() <= 2 * usual + 3e-7 * exact.norm()


def poisoned(scheme, count):
    return torch.full((count, scheme.num_slices, scheme.hidden_size), float("nan"), dtype=DTYPE, device=DEVICE)


@pytest.mark.parametrize("width", [48, 1100])
@pytest.mark.parametrize("name", [*CODECS, "several bands"])
def test_rows_are_those_of_the_reference(name, width):
    if width > WIDTH and name not in ("several bands", "int4"):
        pytest.skip("blocks end alike whatever the codec")
    scheme = scheme_of_name(name, width)
    data, band = encoded(scheme, 9 if width == WIDTH else 3)
    out = poisoned(scheme, len(data))
    kernel_of(scheme).decode(data.to(DEVICE).view(-1), band.to(DEVICE), out, pitch=data.shape[1])
    assert_as_exact(out, decoded(scheme, data, band, torch.float64))


@pytest.mark.parametrize("bits", [4, 8])
def test_stored_bases_lose_nothing_in_bf16(bits):
    from flexmemory.tol.decode_kernel import KernelDecoder

    scheme = scheme_of_name("svd16")
    rounded = [
        dataclasses.replace(of_slice, basis=round_basis(of_slice.basis, bits=bits))
        for of_slice in scheme.tensors[0]
        if of_slice.basis is not None
    ]
    stored = as_stored(dataclasses.replace(scheme, tensors=(tuple(rounded),)))
    decoder = KernelDecoder(scheme.bands, stored, hidden_size=WIDTH, device=DEVICE)
    basis = decoder._basis[:, :16].float().cpu()
    assert torch.equal(basis, basis.round())
    assert basis.abs().amax(dim=2).eq((1 << (bits - 1)) - 1).all()
    gain = decoder._grids[4][0, :, :16].cpu()
    expected = torch.stack([of_slice.basis[:16] for of_slice in stored[0] if of_slice.basis is not None])
    torch.testing.assert_close(basis * gain[:, :, None], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["int4", "pq4x8", "svd24+int8", "several bands"])
def test_what_it_keeps_is_foretold(name):
    from flexmemory.tol.decoder import gpu_bytes

    scheme = scheme_of_name(name)
    in_fp32 = kernel_of(scheme)._basis.nbytes * (DTYPE.itemsize - 2) // DTYPE.itemsize
    assert kernel_of(scheme).nbytes - in_fp32 == gpu_bytes(scheme.bands, scheme.tensors, hidden_size=WIDTH)


@pytest.fixture
def table():
    """Encoded rows of 20 tokens as a table: bytes, offsets and bands, and what the reference decodes."""
    scheme = scheme_of_name("several bands")
    data, band = encoded(scheme, 20)
    sizes = torch.tensor([-(-one.row_bytes // 4) * 4 for one in scheme.bands])[band]
    offset = sizes.cumsum(0) - sizes
    flat = torch.zeros(int(sizes.sum()), dtype=torch.uint8)
    for row, start, number in zip(data, offset.tolist(), band.tolist(), strict=True):
        size = scheme.bands[number].row_bytes
        flat[start : start + size] = row[:size]
    exact = decoded(scheme, data, band, torch.float64)
    return scheme, flat.to(DEVICE), offset.to(DEVICE), band.int().to(DEVICE), exact


def hot_rows(exact, ids):
    """Hot rows that no other can be mistaken for."""
    slot = torch.full((len(exact),), -1, dtype=torch.int32)
    slot[ids] = torch.arange(len(ids), dtype=torch.int32)
    table = (100 + torch.arange(len(ids) * exact[0].numel())).view(len(ids), *exact.shape[1:]).to(DTYPE)
    expected = exact.clone()
    expected[ids] = table.double()
    return slot.to(DEVICE), table.to(DEVICE), expected


@pytest.mark.parametrize("with_hot", [False, True])
def test_tokens_of_a_table_on_the_device(table, with_hot):
    from flexmemory.tol.decode_kernel import Hot

    scheme, flat, offset, band, exact = table
    slot, rows, expected = hot_rows(exact, [3, 19, 4])
    ids = torch.tensor([4, 19, 0, 7, 7, 3])
    out = poisoned(scheme, len(ids))
    hot = Hot(slot, rows) if with_hot else None
    kernel_of(scheme).decode(flat, band, out, chosen=ids.to(DEVICE), offset=offset, hot=hot)
    assert_as_exact(out, (expected if with_hot else exact)[ids])


@pytest.mark.parametrize("with_hot", [False, True])
@pytest.mark.parametrize("mailbox", [False, True])
def test_encoded_rows_are_fetched_and_then_decoded(table, mailbox, with_hot):
    from flexmemory.tol.decode_kernel import Hot

    scheme, flat, offset, band, exact = table
    kernel = kernel_of(scheme)
    slot, rows, expected = hot_rows(exact, [3, 19, 4])
    ids = torch.tensor([4, 19, 0, 7, 7, 3])
    staged = torch.zeros((8, kernel.pitch), dtype=torch.uint8, device=DEVICE)  # more slots than tokens
    below, box = flat, None
    if mailbox:
        below = torch.full((2, 8, kernel.pitch), 255, dtype=torch.uint8)
        steps = torch.tensor([0, 1, 2, 3, 4, 5, 0, 0])
        for place, token in enumerate(ids.tolist()):
            size, start = scheme.bands[int(band[token])].row_bytes, int(offset[token])
            below[steps[place] % 2, place, :size] = flat[start : start + size].cpu()
        ready = steps.clone()
        if not INTERPRETED:
            below, ready = below.pin_memory(), ready.pin_memory()
        active = torch.ones(8, dtype=torch.bool, device=DEVICE)
        box = (active, ready, steps.to(DEVICE))
    elif not INTERPRETED:
        below = flat.cpu().pin_memory()
    chosen = ids.to(DEVICE)
    kernel.fetch(
        below.view(-1), staged, chosen=chosen, count=6, band=band, offset=None if mailbox else offset, mailbox=box,
        hot_slot=slot if with_hot else None,
    )  # fmt: skip
    out = poisoned(scheme, 6)
    hot = Hot(slot, rows) if with_hot else None
    kernel.decode(staged.view(-1), band, out, chosen=chosen, pitch=kernel.pitch, hot=hot)
    assert_as_exact(out, (expected if with_hot else exact)[ids])
    if with_hot:
        assert staged[[0, 1, 5]].eq(0).all()  # nothing is fetched for them
