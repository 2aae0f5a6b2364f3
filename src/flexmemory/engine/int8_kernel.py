"""int8 products on a GPU for a batch of inputs: weights are read as int8 and converted on their way to the product."""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

OUTPUTS, INPUTS = 32, 128
"""Outputs of a program, and inputs of each that it takes at once."""


@triton.jit
def _product(
    x_ptr, weight_ptr, scale_ptr, out_ptr, count, outputs, K: tl.constexpr,
    COUNT: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    numbers = tl.program_id(1) * COUNT + tl.arange(0, COUNT)
    columns = tl.arange(0, INPUTS)
    inside, present = rows < outputs, numbers < count
    summed = tl.zeros((COUNT, OUTPUTS), tl.float32)
    for start in range(0, K, INPUTS):
        at = start + columns
        x = tl.load(x_ptr + numbers[:, None] * K + at[None, :], mask=present[:, None] & (at < K)[None, :], other=0.0)
        pointers = weight_ptr + rows[None, :].to(tl.int64) * K + at[:, None]
        weight = tl.load(pointers, mask=inside[None, :] & (at < K)[:, None], other=0)
        summed = tl.dot(x, weight.to(x.dtype), summed, input_precision=PRECISION)
    result = summed * tl.load(scale_ptr + rows, mask=inside, other=0.0)[None, :]
    targets = out_ptr + numbers[:, None].to(tl.int64) * outputs + rows[None, :]
    tl.store(targets, result.to(out_ptr.dtype.element_ty), mask=present[:, None] & inside[None, :])


def int8_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """`scale * (x W^T)`: x (M, K) in bf16 or fp32, W (N, K) int8, scale (N,) fp32; (M, N) in the dtype of x."""
    count, inputs = x.shape
    outputs = len(weight)
    out = torch.empty(count, outputs, dtype=x.dtype, device=x.device)
    block = min(64, max(16, triton.next_power_of_2(count)))
    _product[triton.cdiv(outputs, OUTPUTS), triton.cdiv(count, block)](
        x.contiguous(), weight, scale, out, count, outputs,
        K=inputs, COUNT=block, OUTPUTS=OUTPUTS, INPUTS=INPUTS, PRECISION="ieee", num_stages=4, num_warps=4,
    )  # fmt: skip
    return out
