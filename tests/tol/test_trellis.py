from statistics import NormalDist

import pytest
import torch

from flexmemory.tol import trellis
from flexmemory.tol.allocate import noise
from flexmemory.tol.coding import Coding, SliceTensors, decode_slice, encode_slice, normal_levels
from flexmemory.tol.trellis import (
    NOISE,
    WINDOW,
    code_bits,
    decode_windows,
    encode_windows,
    search,
    spreads,
    trellis_levels,
)

MIXED = ((4, 8), (3, 8), (1, 16))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reconstructed(windows, widths):
    return trellis_levels()[windows] * spreads(widths)


def cost(numbers, windows, weight, widths):
    return ((reconstructed(windows, widths) - numbers).double().square() * weight).sum(1)


def test_levels_are_the_quantiles_of_normal_numbers_in_another_order():
    quantiles = [NormalDist().inv_cdf((place + 0.5) / 4096) for place in range(4096)]
    levels = trellis_levels().tolist()
    assert sorted(levels) == pytest.approx(quantiles, abs=1e-5)
    assert levels == pytest.approx([quantiles[s * (2 * s + 1) % 4096] for s in range(4096)], abs=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 3, 5])
def test_windows_that_differ_in_their_last_bits_have_levels_of_every_size(bits):
    """One in each of 2 ** bits classes that are alike in number, whatever the bits that are shared."""
    rank = trellis_levels().argsort().argsort().view(1 << bits, -1)
    classes = rank // ((1 << WINDOW) >> bits)
    assert torch.equal(classes.sort(0).values, torch.arange(1 << bits)[:, None].expand_as(classes))


@pytest.mark.parametrize("widths", [((1, 16),), ((2, 8),), MIXED, ((5, 8), (8, 3), (6, 4))])
def test_a_window_is_the_bits_from_its_code_on_around_the_slice(widths):
    bits = code_bits(widths)
    data = torch.randint(256, (5, sum(bits) // 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    windows = decode_windows(data, widths)
    for row, found in zip(data, windows, strict=True):
        ring = int.from_bytes(bytes(row.tolist()), "little")
        ring |= ring << sum(bits)
        at = 0
        for size, window in zip(bits, found.tolist(), strict=True):
            assert window == ring >> at & ((1 << WINDOW) - 1)
            at += size
    assert torch.equal(encode_windows(windows, widths), data)


@pytest.mark.parametrize("widths", [((1, 16),), ((2, 8),), ((3, 4), (1, 4)), ((8, 2),)])
def test_the_best_of_all_codes_is_found(widths, monkeypatch):
    monkeypatch.setattr(trellis, "RING", 1 << 20)  # every way over the seam
    count = sum(number for _, number in widths)
    numbers, weight = normal(3, count), torch.rand(count, generator=torch.Generator().manual_seed(2)) + 0.1
    every = torch.arange(1 << 16)[:, None] >> torch.tensor([0, 8]) & 255
    every = decode_windows(every.to(torch.uint8), widths)
    least = torch.stack([cost(row[None], every, weight, widths).min() for row in numbers])
    found = search(numbers, weight, widths)
    torch.testing.assert_close(cost(numbers, found, weight, widths), least, rtol=1e-5, atol=1e-7)
    assert torch.equal(decode_windows(encode_windows(found, widths), widths), found)


def test_few_ways_over_the_seam_are_nearly_as_good_as_all(monkeypatch):
    count = sum(number for _, number in MIXED)
    numbers, weight = normal(3, count, seed=3), torch.tensor(code_bits(MIXED)).double().mul(2).exp2().float()
    few = cost(numbers, search(numbers, weight, MIXED), weight, MIXED)
    monkeypatch.setattr(trellis, "RING", 1 << 20)
    best = cost(numbers, search(numbers, weight, MIXED), weight, MIXED)
    assert (few >= best * (1 - 1e-5)).all()
    assert few.mean() < 1.12 * best.mean()


def test_memory_does_not_change_what_is_found(monkeypatch):
    numbers, weight = normal(7, 32, seed=4), torch.ones(32)
    whole = search(numbers, weight, MIXED)
    monkeypatch.setitem(trellis.KEPT_BYTES, "cpu", 1 << 21)  # one or two tokens
    assert torch.equal(search(numbers, weight, MIXED), whole)
    monkeypatch.setitem(trellis.KEPT_BYTES, "cpu", 1)
    assert torch.equal(search(numbers, weight, MIXED), whole)


@pytest.mark.gpu
def test_a_gpu_finds_codes_as_good():
    numbers, weight = normal(40, 32, seed=7), torch.rand(32, generator=torch.Generator().manual_seed(8)) + 0.1
    found = search(numbers.cuda(), weight.cuda(), MIXED).cpu()
    assert torch.equal(decode_windows(encode_windows(found, MIXED), MIXED), found)
    expected = cost(numbers, search(numbers, weight, MIXED), weight, MIXED)
    torch.testing.assert_close(cost(numbers, found, weight, MIXED), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("bits", "share"), [(1, 0.78), (2, 0.65), (3, 0.58), (4, 0.55), (5, 0.55), (6, 0.56), (8, 0.2)]
)
def test_errors_are_as_stated_and_a_share_of_lloyd_and_max(bits, share):
    numbers, widths = normal(16, 256, seed=5), ((bits, 256),)
    found = reconstructed(search(numbers, torch.ones(256), widths), widths)
    error = float((found - numbers).square().mean())
    assert error == pytest.approx(NOISE[bits], rel=0.06)
    assert noise(bits) == NOISE[bits]
    alone = float((normal_levels(bits) - numbers[..., None]).abs().amin(-1).square().mean())
    assert error < share * alone


@pytest.mark.parametrize("bits", [1, 4, 6, 8])
def test_slices_with_scales_have_the_stated_errors(bits):
    numbers, coding = normal(16, 256, seed=9), Coding(levels="trellis", widths=((bits, 256),), group=256)
    numbers *= torch.linspace(0.01, 0.5, 16)[:, None]
    found = decode_slice(encode_slice(numbers, coding, SliceTensors()), coding, SliceTensors())
    error = float((found - numbers).square().sum() / numbers.square().sum())
    assert error == pytest.approx(NOISE[bits], rel=0.1)


def test_errors_go_where_they_cost_least():
    numbers, widths = normal(16, 64, seed=6), ((2, 64),)
    weight = torch.ones(64)
    weight[::2] = 16
    even, odd = (reconstructed(search(numbers, weight, widths), widths) - numbers).square().mean(0).view(-1, 2).mean(0)
    assert even < 0.5 * odd


@pytest.mark.parametrize("widths", [((1, 8),), ((1, 20),), ((3, 7),)])
def test_slices_that_do_not_end_with_a_byte_are_refused(widths):
    with pytest.raises(ValueError, match="whole bytes, two or more"):
        Coding(levels="trellis", widths=widths)
