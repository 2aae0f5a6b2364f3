"""Linear layers whose weights are int8, with one scale per output: half the bytes of bf16, a quarter of fp32.

y = scale * (W x), W in [-127, 127], symmetric, row-wise. Dimension key: N outputs, K inputs.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from jaxtyping import Float, Float32, Int8
from torch import Tensor, nn
from torch.nn import functional as F

from flexmemory.model.transformer import Transformer

Int8Part = Literal["head", "all"]
"""What is int8: the output head, or also the projections of attention and FFN-C (never norms nor the memory)."""

PACKED_ROWS = 16
"""Inputs at once up to which PyTorch's own int8 kernel for CPUs beats converting the weights (AVX2, 2 cores)."""
KERNEL_ROWS = 256
"""Inputs at once up to which weights are read as int8 on a GPU; beyond, the product outweighs them."""
CONVERTED_OUTPUTS = 8192
"""Outputs whose weights exist in floating point at once."""
QUANTIZED_NUMBERS = 2**18
"""Weights made int8 at once: larger temporaries, freed, leave holes in the heap as large as the int8 weights."""


class Int8Linear(nn.Module):
    """A linear layer without bias: `weight` (N, K) int8, row-major and contiguous, and `scale` (N,) fp32."""

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Int8[Tensor, "N K"], scale: Float32[Tensor, " N"]) -> None:
        """Hold `weight` and `scale` as they are."""
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    @classmethod
    def of(cls, weight: Float[Tensor, "N K"]) -> Int8Linear:
        """The layer whose weights are nearest to `weight`."""
        return cls(*quantize_rows(weight))

    def forward(self, x: Float[Tensor, "*M K"]) -> Float[Tensor, "*M N"]:
        """See `int8_linear`."""
        return int8_linear(x, self.weight, self.scale)


@torch.no_grad()
def quantize_rows(weight: Float[Tensor, "N K"]) -> tuple[Int8[Tensor, "N K"], Float32[Tensor, " N"]]:
    """Integers and scales with `scale * integers` nearest to `weight`, the largest of each row at +-127."""
    integers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    parts = (tensor.split(max(1, QUANTIZED_NUMBERS // weight.shape[1])) for tensor in (weight, integers, scale))
    for rows, out, row_scale in zip(*parts, strict=True):
        exact = rows.float()
        largest = exact.abs().amax(dim=1)
        row_scale.copy_(torch.where(largest > 0, largest / 127, 1.0))
        out.copy_((exact / row_scale[:, None]).round_())
    return integers, scale


def int8_linear(
    x: Float[Tensor, "*M K"], weight: Int8[Tensor, "N K"], scale: Float32[Tensor, " N"]
) -> Float[Tensor, "*M N"]:
    """`scale * (x W^T)` in the dtype of `x`.

    On a CPU few inputs at once go through a kernel that reads the int8 weights themselves, and computes with `x` and
    the product rounded to bf16; on a GPU a kernel does likewise in the dtype of `x`. Otherwise weights are converted to
    the dtype of `x`, some outputs at a time.
    """
    inputs = x.reshape(-1, x.shape[-1])
    # The kernel reads past the end of rows that are no whole number of vectors (torch 2.13).
    if x.device.type == "cpu" and len(inputs) <= PACKED_ROWS and weight.shape[1] % 16 == 0:
        ones = torch.ones(len(weight), dtype=torch.bfloat16)  # scales are kept from being rounded to bf16
        product = torch._weight_int8pack_mm(inputs.bfloat16(), weight, ones)
    elif x.is_cuda and len(inputs) <= KERNEL_ROWS and x.dtype in (torch.bfloat16, torch.float32):
        from flexmemory.engine.int8_kernel import int8_product  # Triton is there where a GPU is

        return int8_product(inputs, weight, scale).view(*x.shape[:-1], len(weight))
    else:
        product = torch.cat([F.linear(inputs, rows.to(x.dtype)) for rows in weight.split(CONVERTED_OUTPUTS)], dim=-1)
    return (product * scale).to(x.dtype).view(*x.shape[:-1], len(weight))


def int8_linear_reference(
    x: Float[Tensor, "*M K"], weight: Int8[Tensor, "N K"], scale: Float32[Tensor, " N"]
) -> Float[Tensor, "*M N"]:
    """What `int8_linear` approximates, in fp64."""
    return x.double() @ (weight.double() * scale.double()[:, None]).T


def int8_names(model: Transformer, part: Int8Part | None) -> list[str]:
    """The linear layers of `model` that are int8 when `part` is."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    match part:
        case None:
            return []
        case "head":
            return ["head"]
        case "all":
            return [name for name in linears if ".memory." not in name]


def quantize(model: Transformer, part: Int8Part) -> None:
    """Replace linear layers of `model` by int8 ones, in place and for inference only.

    An embedding that the head is tied to stays as it is; the head gets its own int8 copy.
    """
    for name in int8_names(model, part):
        owner, _, attribute = name.rpartition(".")
        linear = cast(nn.Linear, model.get_submodule(name))
        setattr(model.get_submodule(owner), attribute, Int8Linear.of(linear.weight))
