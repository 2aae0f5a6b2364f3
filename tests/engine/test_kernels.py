"""Each kernel of a decode step is as near to the exact result as the plain operation is.

On a GPU, or on a CPU by Triton's interpreter (`TRITON_INTERPRET=1`, as `make test` runs it).
"""

import os

import pytest
import torch
from torch import nn

from flexmemory.engine import plain
from flexmemory.engine.int8 import Int8Linear

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.interpreted if INTERPRETED else pytest.mark.gpu
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]
KINDS = ["no-pdl", "wide"] if INTERPRETED else ["pdl", "no-pdl", "wide"]

SHAPES = {
    "nano": {"batch": 2, "width": 48, "heads": 4, "kv_heads": 4, "cells": 128, "vocab": 512, "capacity": 64},
    "odd": {"batch": 3, "width": 120, "heads": 2, "kv_heads": 1, "cells": 300, "vocab": 1000, "capacity": 700},
    "one": {"batch": 1, "width": 2048, "heads": 32, "kv_heads": 32, "cells": 5464, "vocab": 4001, "capacity": 2048},
    "one small": {"batch": 1, "width": 64, "heads": 2, "kv_heads": 2, "cells": 100, "vocab": 77, "capacity": 129},
    "many": {"batch": 40, "width": 256, "heads": 8, "kv_heads": 2, "cells": 512, "vocab": 999, "capacity": 300},
}


class Case:
    """Random weights and inputs of one shape."""

    def __init__(self, *, batch, width, heads, kv_heads, cells, vocab, capacity, dtype):
        torch.manual_seed(0)
        self.dtype = dtype
        size = width // heads
        self.norm = nn.RMSNorm(width, eps=1e-5)
        nn.init.normal_(self.norm.weight, 1, 0.3)
        shapes = {
            "qkv": (width, (heads + 2 * kv_heads) * size), "output": (heads * size, width), "gate": (width, cells),
            "up": (width, cells), "down": (cells, width), "head": (width, vocab),
        }  # fmt: skip
        self.linear = {name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()}
        self.x, self.inner, self.coefficients = (torch.randn(batch, n) for n in (width, heads * size, cells))
        self.query = torch.randn(batch, heads, size)
        self.lengths = torch.randint(0, capacity, (batch,), dtype=torch.int32)
        self.lengths[0] = 0
        self.lengths[-1] = capacity - 1
        angles = torch.rand(capacity, size // 2) * 7
        self.rotary = torch.stack((angles.cos(), angles.sin())).repeat(1, 1, 2)
        self.keys, self.values = torch.randn(2, batch + 1, kv_heads, capacity, size)
        self.row = plain.RowOf(torch.randn(7, 3, width)[:, 2], torch.randint(0, 7, (batch,)))

    def run(self, operations, operation, *, device, dtype, int8=False):
        """The results of one operation, in fp64 on the CPU, with everything first rounded to the case's dtype.

        With `int8`, so are matrices to int8 first; they stay that only where the results are in the case's dtype.
        """

        def there(tensor):
            return tensor.to(self.dtype).to(device, dtype)

        def layer(name):
            linear = nn.Linear(1, 1, bias=False)
            rounded = Int8Linear.of(self.linear[name].weight.to(self.dtype))
            if int8 and dtype == self.dtype and operations is not plain:
                return rounded.to(device)
            weight = rounded.weight.to(dtype) * rounded.scale[:, None].to(dtype) if int8 else self.linear[name].weight
            linear.weight = nn.Parameter(weight.to(device, dtype) if int8 else there(weight))
            return linear

        norm = nn.RMSNorm(len(self.norm.weight), eps=1e-5)
        norm.weight = nn.Parameter(there(self.norm.weight))
        keys, values, lengths = there(self.keys), there(self.values), self.lengths.to(device)
        row = plain.RowOf(there(self.row.rows), self.row.chosen.to(device))
        x = there(self.x)
        cache = {"lengths": lengths, "keys": keys, "values": values}
        rotary = self.rotary.to(device, torch.promote_types(dtype, torch.float32))
        with torch.no_grad():
            match operation:
                case "query_and_cache":
                    query = operations.query_and_cache(x, norm, layer("qkv"), rotary=rotary, **cache)
                    return torch.cat([t.double().cpu().flatten() for t in (query, keys, values)])
                case "attend":
                    keys[-1], values[-1] = torch.nan, torch.nan  # another's slot
                    for slot, length in enumerate(self.lengths.tolist()):
                        keys[slot, :, length + 1 :] = torch.nan
                        values[slot, :, length + 1 :] = torch.nan
                    result = operations.attend(there(self.query), **cache)
                case "add_projection":
                    result = operations.add_projection(x, there(self.inner), layer("output"), row=None)
                case "add_projection_and_row":
                    result = operations.add_projection(x, there(self.coefficients), layer("down"), row=row)
                case "gated":
                    result = operations.gated(x, norm, layer("gate"), layer("up"))
                case _:
                    result = operations.logits(x, norm, layer("head"))
        return result.double().cpu()


OPERATIONS = ["query_and_cache", "attend", "add_projection", "add_projection_and_row", "gated", "logits"]


def kernels_of(kind):
    from flexmemory.engine.narrow import NarrowKernels
    from flexmemory.engine.wide import WideKernels

    device = torch.device(DEVICE)
    return WideKernels(device) if kind == "wide" else NarrowKernels(device, pdl=kind == "pdl")


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_are_as_exact_as_plain_operations(kind, shape, dtype, operation):
    if kind != "wide" and SHAPES[shape]["batch"] > 8:
        pytest.skip("these kernels are for few sequences")
    if INTERPRETED and shape in ("one", "many"):
        pytest.skip("too large to be interpreted")
    case = Case(**SHAPES[shape], dtype=dtype)
    exact = case.run(plain, operation, device="cpu", dtype=torch.float64)
    usual = case.run(plain, operation, device=DEVICE, dtype=dtype)
    fast = case.run(kernels_of(kind), operation, device=DEVICE, dtype=dtype)
    assert fast.isfinite().all()
    floor = 3e-7 * exact.norm()
    assert (fast - exact).norm() <= 2 * (usual - exact).norm() + floor


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "attend"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["nano", "one small"])
@pytest.mark.parametrize("kind", KINDS)
def test_int8_weights_are_multiplied_as_exactly(kind, shape, dtype, operation):
    """Against the exact product with the weights that the integers stand for."""
    if INTERPRETED and kind == "wide":
        pytest.skip("on a CPU the library multiplies int8")
    case = Case(**SHAPES[shape], dtype=dtype)
    exact = case.run(plain, operation, device="cpu", dtype=torch.float64, int8=True)
    usual = case.run(plain, operation, device=DEVICE, dtype=dtype, int8=True)
    fast = case.run(kernels_of(kind), operation, device=DEVICE, dtype=dtype, int8=True)
    floor = 3e-7 * exact.norm()
    assert (fast - exact).norm() <= 2 * (usual - exact).norm() + floor


@pytest.mark.parametrize("kind", KINDS)
def test_the_most_likely_token_is_that_of_the_logits(kind):
    case = Case(**SHAPES["nano"], dtype=torch.float32)
    operations = kernels_of(kind)
    norm, head, x = case.norm.to(DEVICE), case.linear["head"].to(DEVICE), case.x.to(DEVICE)
    with torch.no_grad():
        assert torch.equal(operations.most_likely(x, norm, head), operations.logits(x, norm, head).argmax(dim=-1))
        head.weight.zero_()  # all alike: the smallest id
        assert operations.most_likely(x, norm, head).tolist() == [0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 40, 48), (17, 100, 300), (70, 33, 256)])
def test_int8_products_of_many_inputs(shape, dtype):
    from flexmemory.engine.int8 import int8_linear_reference, quantize_rows
    from flexmemory.engine.int8_kernel import int8_product

    torch.manual_seed(0)
    count, outputs, inputs = shape
    weight, scale = (tensor.to(DEVICE) for tensor in quantize_rows(torch.randn(outputs, inputs)))
    x = torch.randn(count, inputs).to(DEVICE, dtype)
    exact = int8_linear_reference(x, weight, scale)
    usual = (x @ (weight.to(dtype) * scale[:, None].to(dtype)).T).double()
    fast = int8_product(x, weight, scale).double()
    assert (fast - exact).norm() <= 2 * (usual - exact).norm() + 3e-7 * exact.norm()
