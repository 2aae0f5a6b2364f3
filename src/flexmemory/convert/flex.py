"""A dense model as the start of a MemoryLLM or Flex-MemoryLLM: its FFN's cells, divided between FFN-M and FFN-C.

A dense FFN reads n = LN(y), y the residual stream; FFN-M reads q = LN_L(E[t]). So n is predicted from q by a linear
map A, fitted on text for each layer by least squares, and a cell that moves to FFN-M has its key and gate times A. How
badly that goes is measured for each cell, on text too: E[(c(n) - c(A q))^2] |v|^2. FFN-C gets the cells that lose most,
the context's; FFN-M the others. Attention, norms, embedding and head stay. Training goes on from there, with the dense
model as teacher or without (train/loss.py).

Dimension key: B windows, T tokens, N positions, D model width, K cells.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from flexmemory.config import ModelConfig
from flexmemory.model.ffn import SwiGLU
from flexmemory.model.init import new_model
from flexmemory.model.transformer import DenseBlock, FlexBlock, MemoryBlock, Transformer

RIDGE = 1e-3
"""Added to the second moment of q, as a share of its mean diagonal."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerFit:
    """How one layer's FFN can be read from the token alone."""

    linear: Float[Tensor, "D D"]
    """A: n is about A q."""
    explained: float
    """Share of the second moment of n that A q explains."""
    errors: Float[Tensor, " K"]
    """For each cell, the mean squared length of what it adds wrongly when it reads A q instead of n."""


def converted_config(dense: ModelConfig, *, flex_ratio: int) -> ModelConfig:
    """The model with the same cells: with `flex_ratio` 0 all in FFN-M, else round(b D / 3) of them in FFN-C.

    Raises:
        ValueError: the model is not dense, or FFN-C would take all cells.
    """
    if dense.architecture != "dense":
        raise ValueError(f"expected a dense model, got {dense.architecture}")
    if not flex_ratio:
        return dataclasses.replace(dense, architecture="memory")
    config = dataclasses.replace(dense, architecture="flex", flex_ratio=flex_ratio)
    left = dense.intermediate_size - config.ffn_c_size
    if left <= 0:
        raise ValueError(
            f"an FFN-C of {config.ffn_c_size} cells leaves none of {dense.intermediate_size} to FFN-M; "
            "take a smaller --flex-ratio"
        )
    return dataclasses.replace(config, intermediate_size=left)


@torch.no_grad()
def fit_layers(dense: Transformer, windows: Int64[Tensor, "B T"], *, batch_size: int = 8) -> list[LayerFit]:
    """Fit every layer on a text, in two passes over it.

    Args:
        dense: The model, on any device.
        windows: Token ids; more positions than D are needed for the fit to mean anything.
        batch_size: Windows in one pass.

    Raises:
        ValueError: the text has fewer positions than D.
    """
    width, positions = dense.config.hidden_size, windows.numel()
    if positions < width:
        raise ValueError(f"{positions} positions of text cannot fit {width} numbers; give more calibration tokens")
    blocks = [block for block in dense.blocks if isinstance(block, DenseBlock)]
    moments = [torch.zeros(3, width, width, dtype=torch.float64, device=dense.device) for _ in blocks]
    for layer, queries, inputs in _passes(dense, windows, batch_size=batch_size, desc="fit"):
        q, n = queries.double(), inputs.double()
        moments[layer] += torch.stack((q.T @ q, n.T @ q, n.T @ n))
    linear, explained = [], []
    for second, cross, whole in moments:
        ridge = RIDGE * second.diagonal().mean() * torch.eye(width, dtype=torch.float64, device=second.device)
        fitted = torch.linalg.solve(second + ridge, cross.T).T
        left = whole.trace() - 2 * (fitted * cross).sum() + ((fitted @ second) * fitted).sum()
        linear.append(fitted)
        explained.append(float(1 - left / whole.trace()))
    errors = [torch.zeros(block.ffn.up.out_features, dtype=torch.float64, device=dense.device) for block in blocks]
    for layer, queries, inputs in _passes(dense, windows, batch_size=batch_size, desc="cells"):
        ffn = blocks[layer].ffn
        predicted = queries @ linear[layer].to(queries).T
        errors[layer] += (ffn.coefficients(inputs) - ffn.coefficients(predicted)).double().square().sum(0)
    return [
        LayerFit(
            linear=linear[layer].float(),
            explained=explained[layer],
            errors=(errors[layer] / positions * block.ffn.down.weight.double().square().sum(0)).float(),
        )
        for layer, block in enumerate(blocks)
    ]


def _passes(
    dense: Transformer, windows: Tensor, *, batch_size: int, desc: str
) -> Iterator[tuple[int, Float[Tensor, "N D"], Float[Tensor, "N D"]]]:
    """For each layer of each batch: its number, q and n of all positions (N, D)."""
    kept: dict[int, Tensor] = {}
    hooks = []
    for layer, block in enumerate(dense.blocks):
        assert isinstance(block, DenseBlock)

        def keep(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor, layer: int = layer) -> None:
            kept[layer] = output

        hooks.append(block.ffn_norm.register_forward_hook(keep))
    try:
        bar = tqdm(windows.split(batch_size), desc=desc, unit="batch", leave=False, disable=None)
        for batch in bar:
            ids = batch.to(dense.device)
            dense.hidden_states(ids)
            embeddings = dense.embed(ids).flatten(0, 1)
            for layer, block in enumerate(dense.blocks):
                assert isinstance(block, DenseBlock)
                yield layer, _query(block, embeddings), kept[layer].flatten(0, 1)
    finally:
        for hook in hooks:
            hook.remove()


def _query(block: DenseBlock, embeddings: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
    """LN_L(E[t]) with a gain of one, which is how `start` sets it."""
    return F.rms_norm(embeddings, (embeddings.shape[-1],), eps=block.ffn_norm.eps)


def convert(
    dense: Transformer, windows: Int64[Tensor, "B T"], *, flex_ratio: int
) -> tuple[Transformer, list[LayerFit]]:
    """The converted model, on the CPU in fp32, and how well each layer could be fitted.

    Args:
        dense: The model, on any device.
        windows: Text by which cells are divided.
        flex_ratio: As for `converted_config`.

    Raises:
        ValueError: the model cannot be converted so, or the text is too short.
    """
    config = converted_config(dense.config, flex_ratio=flex_ratio)
    fits = fit_layers(dense, windows)
    return start(dense, config, fits), fits


@torch.no_grad()
def start(dense: Transformer, config: ModelConfig, fits: list[LayerFit]) -> Transformer:
    """The converted model, on the CPU in fp32.

    Args:
        dense: The model that is converted.
        config: What it becomes: `converted_config`.
        fits: `fit_layers` of it.
    """
    model = new_model(config, seed=0)
    shared = {name: value for name, value in dense.state_dict().items() if ".ffn." not in name}
    wanted = model.state_dict()
    model.load_state_dict(
        {name: shared[name].float().cpu() if name in shared else value for name, value in wanted.items()}
    )
    for old, new, fit in zip(dense.blocks, model.blocks, fits, strict=True):
        assert isinstance(old, DenseBlock)
        assert isinstance(new, MemoryBlock)
        assert new.memory is not None
        assert new.memory.norm is not None
        assert new.memory.ffn is not None
        order = fit.errors.argsort(stable=True).cpu()  # the cells that lose least first
        memory = order[: config.intermediate_size].sort().values
        context = order[config.intermediate_size :].sort().values
        new.memory.norm.weight.fill_(1)
        _copy_cells(old.ffn, new.memory.ffn, memory, linear=fit.linear.cpu())
        if isinstance(new, FlexBlock):
            assert isinstance(new.ffn_c, SwiGLU)
            _copy_cells(old.ffn, new.ffn_c, context, linear=None)
    return model


def _copy_cells(old: SwiGLU, new: SwiGLU, cells: Tensor, *, linear: Tensor | None) -> None:
    up, gate = (old.get_parameter(f"{name}.weight").float().cpu()[cells] for name in ("up", "gate"))
    new.up.weight.copy_(up if linear is None else up @ linear)
    new.gate.weight.copy_(gate if linear is None else gate @ linear)
    new.down.weight.copy_(old.down.weight.float().cpu()[:, cells])
