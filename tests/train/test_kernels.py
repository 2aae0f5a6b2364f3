"""The kernel of training adds what `index_add_` adds."""

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.compile]  # the type-checking hook cannot wrap a kernel


@pytest.mark.parametrize(("rows", "count", "width"), [(1, 1, 64), (7, 100, 48), (5, 4096, 2048), (3000, 9999, 1600)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sorted_rows_add_up(rows, count, width, dtype):
    from flexmemory.train.kernels import add_sorted_rows

    generator = torch.Generator("cuda").manual_seed(0)
    index = (torch.rand(count, device="cuda", generator=generator) ** 3 * rows).long()  # few rows get most
    values = torch.randn(count, width, device="cuda", generator=generator).to(dtype)
    table = torch.randn(rows, 3, width, device="cuda", generator=generator)
    expected = table.double()
    expected[:, 1].index_add_(0, index, values.double())
    ids, order = index.sort()
    add_sorted_rows(table[:, 1], ids, order, values)
    torch.testing.assert_close(table.double(), expected, rtol=1e-5, atol=1e-3)
    assert torch.equal(table[:, ::2].double(), expected[:, ::2])
