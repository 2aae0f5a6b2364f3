"""The kernels of training give what `index_add_` and the plain loss give, on a GPU or by Triton's interpreter."""

import os

import pytest
import torch

from flexmemory.train.loss import logits_loss_and_gradient

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32] if INTERPRETED else [torch.bfloat16, torch.float32]
SUMS = [(1, 1, 64), (7, 100, 48)] + ([] if INTERPRETED else [(5, 4096, 2048), (3000, 9999, 1600)])
LOSSES = [(3, 5), (7, 8192), (2, 16_384)] + ([] if INTERPRETED else [(5, 50_257), (300, 128_256)])
# The type-checking hook cannot wrap a kernel.
pytestmark = pytest.mark.interpreted if INTERPRETED else [pytest.mark.gpu, pytest.mark.compile]


@pytest.mark.parametrize(("rows", "count", "width"), SUMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sorted_rows_add_up(rows, count, width, dtype):
    from flexmemory.train.kernels import add_sorted_rows

    generator = torch.Generator(DEVICE).manual_seed(0)
    index = (torch.rand(count, device=DEVICE, generator=generator) ** 3 * rows).long()  # few rows get most
    values = torch.randn(count, width, device=DEVICE, generator=generator).to(dtype)
    table = torch.randn(rows, 3, width, device=DEVICE, generator=generator)
    expected = table.double()
    expected[:, 1].index_add_(0, index, values.double())
    ids, order = index.sort()
    add_sorted_rows(table[:, 1], ids, order, values)
    torch.testing.assert_close(table.double(), expected, rtol=1e-5, atol=1e-3)
    assert torch.equal(table[:, ::2].double(), expected[:, ::2])


@pytest.mark.parametrize(("count", "vocab_size"), LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("z_loss", [0.0, 1e-6, 0.1])
def test_the_loss_and_its_gradient_are_as_close_to_fp64_as_the_plain_form(count, vocab_size, dtype, z_loss):
    from flexmemory.train.kernels import logits_loss_in_place

    generator = torch.Generator(DEVICE).manual_seed(0)
    logits = (5 * torch.randn(count, vocab_size, device=DEVICE, generator=generator)).to(dtype)
    targets = torch.randint(vocab_size, (count,), device=DEVICE, generator=generator)
    targets[-1], logits[0, 0] = vocab_size - 1, 80.0
    scale = torch.tensor(0.3 / count, device=DEVICE)
    exact = logits_loss_and_gradient(logits.double(), targets, z_loss, scale.double())
    plain = logits_loss_and_gradient(logits, targets, z_loss, scale)
    found = logits_loss_in_place(logits, targets, z_loss, scale)
    assert found[1].data_ptr() == logits.data_ptr()
    for fast, slow, true in zip(found, plain, exact, strict=True):
        error, plain_error = ((value.double() - true).norm() / true.norm() for value in (fast, slow))
        assert error <= max(2 * plain_error, 1e-7)  # of sums of a few numbers the plain error may be 0
