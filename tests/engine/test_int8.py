"""Int8 weights: near to what they replace, computed as exactly as plain bf16 would, and only where they belong."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flexmemory.engine.int8 import (
    CONVERTED_OUTPUTS,
    PACKED_ROWS,
    QUANTIZED_NUMBERS,
    Int8Linear,
    int8_linear_reference,
    quantize,
)
from tests.conftest import VARIED, random_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def int8_layer(outputs: int, inputs: int, *, device="cpu") -> tuple[torch.Tensor, Int8Linear]:
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)).to(device)
    return weight, Int8Linear.of(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_weight_is_rounded_to_the_nearest_step(dtype):
    weight, layer = int8_layer(QUANTIZED_NUMBERS // 40 + 3, 40)
    weight = weight.to(dtype)
    weight[5] = 0
    layer = Int8Linear.of(weight)
    assert (layer.weight.dtype, layer.scale.dtype) == (torch.int8, torch.float32)
    assert layer.weight.is_contiguous()
    steps = (layer.weight.double() * layer.scale.double()[:, None] - weight.double()).abs() / layer.scale[:, None]
    assert steps.max() <= 0.5 + 1e-4
    assert (layer.weight.abs().amax(dim=1)[weight.abs().amax(dim=1) > 0] == 127).all()
    assert not layer.weight[5].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (2, 3), (PACKED_ROWS,), (PACKED_ROWS + 1,)])
@pytest.mark.parametrize(("outputs", "inputs"), [(7, 13), (33, 100), (96, 64), (CONVERTED_OUTPUTS + 5, 48)])
def test_is_as_exact_as_plain_bf16(outputs, inputs, shape, dtype, device):
    _, layer = int8_layer(outputs, inputs, device=device)
    x = torch.randn(*shape, inputs, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    exact = int8_linear_reference(x, layer.weight, layer.scale)
    plain = F.linear(x.bfloat16(), layer.weight.bfloat16()) * layer.scale
    out = layer(x)
    assert (out.dtype, out.shape) == (dtype, (*shape, outputs))
    error = (out.double() - exact).norm()
    assert error <= 2 * (plain.double() - exact).norm()
    if dtype == torch.float32 and (len(x.reshape(-1, inputs)) > PACKED_ROWS or inputs % 16 or device == "cuda"):
        assert error <= 1e-5 * exact.norm()  # weights were converted to fp32, not to bf16


def names_of(model: nn.Module, kind: type[nn.Module]) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, kind)}


@pytest.mark.parametrize("name", VARIED)
def test_only_the_parts_asked_for_are_int8(name, tokens):
    for part in ("head", "all"):
        model = random_model(VARIED[name], dtype=torch.float32)
        with torch.no_grad():
            expected = model(tokens(2, 30))
        embedding, linears = model.embedding, names_of(model, nn.Linear)
        quantize(model, part)
        assert model.embedding is embedding
        memory = {name for name in linears if ".memory." in name}
        assert names_of(model, Int8Linear) == ({"head"} if part == "head" else linears - memory)
        assert names_of(model, nn.Linear) == linears - names_of(model, Int8Linear)
        with torch.no_grad():
            logits = model(tokens(2, 30))
        assert 0 < (logits - expected).norm() < 0.05 * expected.norm()
