"""The search on a GPU against that of PyTorch; by Triton's interpreter where there is no GPU."""

import os

import pytest
import torch

from flexmemory.tol import trellis
from flexmemory.tol.trellis import WINDOW, code_bits, decode_windows, encode_windows, spreads, trellis_levels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.interpreted if INTERPRETED else pytest.mark.gpu
DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.mark.parametrize("widths", [((1, 16),), ((3, 8), (1, 8)), ((5, 8), (8, 3), (6, 4)), ((4, 2), (2, 2), (4, 1))])
def test_rings_are_those_of_pytorch(widths):
    from flexmemory.tol.trellis_kernel import ring

    bits, generator = code_bits(widths), torch.Generator().manual_seed(1)
    targets = torch.randn(len(bits), 37, generator=generator)
    factors = spreads(widths) * (torch.rand(len(bits), generator=generator) + 0.5)
    seam = torch.randint((1 << WINDOW) >> bits[-1], (37,), generator=generator)
    levels = trellis_levels() * factors[:, None]
    memory = targets.new_empty(37 * sum(trellis._sizes(bits)))
    least, expected = trellis._ring(targets, levels, bits, seam, memory=memory)
    cost, windows = ring(targets.to(DEVICE), trellis_levels().to(DEVICE), factors.to(DEVICE), bits, seam.to(DEVICE))
    cost, windows = cost.cpu(), windows.cpu()
    torch.testing.assert_close(cost, least, rtol=1e-5, atol=1e-6)
    reached = (levels.gather(1, windows) - targets).square().sum(0)
    torch.testing.assert_close(reached, least, rtol=1e-5, atol=1e-6)
    assert torch.equal(decode_windows(encode_windows(windows.T, widths), widths), windows.T)
    assert (windows == expected).double().mean() > (0.999 if INTERPRETED else 0.9)  # ways that cost the same
