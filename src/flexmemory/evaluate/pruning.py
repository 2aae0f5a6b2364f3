"""Pruned dense models, what memory models are compared with at equal active parameters (Fig. 11).

Three methods choose the weights of a matrix W that become zero, each as its authors define it:

- magnitude: the smallest |W| of the matrix;
- Wanda (arXiv 2306.11695): the smallest |W_ij| ||x_j|| of each output row, ||x_j|| the norm of input j over a text;
- SparseGPT (arXiv 2301.00774): in blocks of columns, the smallest w^2 / [H^-1]_jj, and the weights of later columns
  make up for them as far as they can (the update of Optimal Brain Surgeon), with H = X^T X over a text.

Blocks of the model are pruned in order; the second and third read the inputs that the blocks pruned before give.
Dimension key: N windows, T tokens, R outputs and C inputs of a matrix.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from flexmemory.config import ModelConfig
from flexmemory.model.accounting import count_parameters
from flexmemory.model.attention import rotary_table
from flexmemory.model.transformer import DenseBlock, Transformer, check_token_ids

BLOCK_COLUMNS = 128
"""Columns of a matrix whose weights SparseGPT chooses between at once, the paper's setting."""
DAMPING = 0.01
"""Share of the mean of H's diagonal that SparseGPT adds to it, the paper's setting."""

Method = Literal["magnitude", "wanda", "sparsegpt"]
Modules = Literal["all", "ffn"]
"""All matrices of the blocks, or those of the FFNs."""
Sparsity = float | tuple[int, int]
"""The share of weights that become zero, or (n, m): of every m inputs in a row, n are left."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Pruned:
    """What is left of a model."""

    weights: int
    """Weights of the matrices that were pruned."""
    zeros: int
    """Those of them that are zero now."""
    active: int
    """Parameters that are left, embedding and head apart, as `ParameterCounts.active` of a memory model."""


@torch.no_grad()
def prune(
    model: Transformer,
    *,
    method: Method,
    sparsity: Sparsity,
    calibration: Int[Tensor, "N T"] | None = None,
    modules: Modules = "all",
    batch_size: int = 8,
) -> Pruned:
    """Prune `model` in place. Embedding, head and norms stay as they are.

    Beside the model, memory holds the residual stream of the calibration text, N * T * D numbers of the model's dtype,
    and for SparseGPT the (C, C) moments of one block's inputs in fp64.

    Args:
        model: A dense model, on any device.
        method: See above.
        sparsity: How much goes.
        calibration: Token ids of a text, for Wanda and SparseGPT, on any device.
        modules: Which matrices.
        batch_size: Windows in one pass.

    Raises:
        ValueError: the model is not dense, `sparsity` is out of range, or the text is missing, not wanted or not fit.
    """
    blocks = [block for block in model.blocks if isinstance(block, DenseBlock)]
    if len(blocks) != len(model.blocks):
        raise ValueError(f"only dense models are pruned, got {model.config.architecture}: give the base model")
    _check_sparsity(sparsity, model.config)
    states, rotary = _start(model, method, calibration, batch_size)
    weights = zeros = 0
    for block in tqdm(blocks, desc=f"pruning, {method}", unit="block", leave=False, disable=None):
        groups = _matrices(block, modules)
        moments = [None] * len(groups)
        if states:
            moments = _moments(block, [linear for linear, _ in groups], states, rotary, whole=method == "sparsegpt")
        for (_, matrices), moment in zip(groups, moments, strict=True):
            for weight in matrices:
                weight.copy_(_pruned(weight, moment, method, sparsity))
                weights += weight.numel()
                zeros += int((weight == 0).sum())
        for number, state in enumerate(states):
            states[number] = block(state, None, rotary)
    return Pruned(weights=weights, zeros=zeros, active=count_parameters(model.config).backbone - zeros)


def sparsity_for(base: ModelConfig, active: int, *, modules: Modules = "all") -> float:
    """The sparsity at which `base` keeps `active` parameters, embedding and head apart.

    Args:
        base: A dense model.
        active: What shall be left, such as `count_parameters(...).active` of a memory model.
        modules: Which matrices are pruned.

    Raises:
        ValueError: `base` is not dense, has no more than `active`, or would have to lose other parameters too.
    """
    if base.architecture != "dense":
        raise ValueError(f"only dense models are pruned, got {base.architecture}: give the base model")
    counts = count_parameters(base)
    matrices = counts.ffn if modules == "ffn" else counts.ffn + counts.attention
    kept = counts.backbone - matrices
    if not kept < active <= counts.backbone:
        raise ValueError(
            f"pruning this model's matrices ({modules}) leaves more than {kept:,} and at most {counts.backbone:,} "
            f"parameters beside embedding and head, so not {active:,}; match another model"
        )
    return (counts.backbone - active) / matrices


def magnitude_mask(weight: Float[Tensor, "R C"], sparsity: Sparsity) -> Bool[Tensor, "R C"]:
    """Which weights magnitude pruning takes."""
    scores = weight.abs()
    if isinstance(sparsity, tuple):
        return _of_every_group(scores, sparsity)
    return _smallest(scores.view(1, -1), round(sparsity * weight.numel())).view_as(weight)


def wanda_mask(weight: Float[Tensor, "R C"], squares: Float[Tensor, " C"], sparsity: Sparsity) -> Bool[Tensor, "R C"]:
    """Which weights Wanda takes, `squares` being the summed squares of each input."""
    scores = weight.abs() * squares.sqrt()
    if isinstance(sparsity, tuple):
        return _of_every_group(scores, sparsity)
    return _smallest(scores, round(sparsity * weight.shape[1]))


def sparsegpt(
    weight: Float[Tensor, "R C"],
    moment: Float[Tensor, "C C"],
    sparsity: Sparsity,
    *,
    block_columns: int = BLOCK_COLUMNS,
) -> Float[Tensor, "R C"]:
    """What SparseGPT makes of `weight`, computed in fp64.

    With U the upper Cholesky factor of H^-1, U_jj^2 is [H^-1]_jj of the inputs from j on, and -w_j U_j / U_jj what
    their weights gain when w_j goes: so one factorisation serves all columns (Sec. 3 of its paper).

    Args:
        weight: The matrix.
        moment: X^T X of its inputs; the factor 2 of the paper's H cancels in what is chosen and in updates.
        sparsity: How much goes; a share is exact over all blocks of columns together.
        block_columns: For n:m the next lower multiple of m.
    """
    left, factor = weight.double().clone(), _inverse_factor(moment)
    gone = torch.zeros_like(left, dtype=torch.bool)
    rows, columns = left.shape
    if isinstance(sparsity, tuple):
        block_columns = max(block_columns // sparsity[1], 1) * sparsity[1]
    for start in range(0, columns, block_columns):
        stop = min(start + block_columns, columns)
        if not isinstance(sparsity, tuple):
            count = round(sparsity * rows * stop) - round(sparsity * rows * start)
            scores = (left[:, start:stop] / factor.diagonal()[start:stop]).square()
            gone[:, start:stop] = _smallest(scores.view(1, -1), count).view_as(scores)
        errors = torch.zeros_like(left[:, start:stop])
        for column in range(start, stop):
            if isinstance(sparsity, tuple) and column % sparsity[1] == 0:
                group = slice(column, column + sparsity[1])
                scores = (left[:, group] / factor.diagonal()[group]).square()
                gone[:, group] = _of_every_group(scores, sparsity)
            error = torch.where(gone[:, column], left[:, column] / factor[column, column], 0)
            left[:, column:stop] -= error[:, None] * factor[column, column:stop]
            errors[:, column - start] = error
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return left.masked_fill(gone, 0).to(weight.dtype)


def _inverse_factor(moment: Float[Tensor, "C C"]) -> Float[Tensor, "C C"]:
    """The upper Cholesky factor of the inverse of the damped moment; of inputs that are all zero, the identity."""
    damped = moment.double().clone()
    mean = damped.diagonal().mean()
    damped.diagonal().add_(torch.where(mean > 0, DAMPING * mean, 1))
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def _smallest(scores: Float[Tensor, "R C"], count: int) -> Bool[Tensor, "R C"]:
    """The `count` smallest of each row, of equal ones the first."""
    order = scores.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, value=True)


def _of_every_group(scores: Float[Tensor, "R C"], pattern: tuple[int, int]) -> Bool[Tensor, "R C"]:
    """All but the n largest of every m neighbours in a row."""
    kept, size = pattern
    return _smallest(scores.reshape(-1, size), size - kept).view_as(scores)


def _pruned(weight: Tensor, moment: Tensor | None, method: Method, sparsity: Sparsity) -> Tensor:
    if moment is None:
        return weight.masked_fill(magnitude_mask(weight, sparsity), 0)
    if method == "wanda":
        return weight.masked_fill(wanda_mask(weight, moment, sparsity), 0)
    return sparsegpt(weight, moment, sparsity)


def _matrices(block: DenseBlock, modules: Modules) -> list[tuple[nn.Linear, list[Tensor]]]:
    """Matrices that read the same inputs, and a module that is given these; what is fused is taken apart (views)."""
    attention, ffn = block.attention, block.ffn
    groups = [(ffn.gate, [ffn.gate.weight, ffn.up.weight]), (ffn.down, [ffn.down.weight])]
    if modules == "ffn":
        return groups
    rows = [heads * attention.head_size for heads in (attention.num_heads, *[attention.num_kv_heads] * 2)]
    fused = list(attention.qkv.weight.split(rows))
    return [(attention.qkv, fused), (attention.output, [attention.output.weight]), *groups]


def _start(
    model: Transformer, method: Method, calibration: Tensor | None, batch_size: int
) -> tuple[list[Float[Tensor, "N T D"]], Float[Tensor, "2 T E"] | None]:
    """The residual stream before the first block, in batches, none where no text is read; and rotary positions."""
    if method == "magnitude":
        if calibration is not None:
            raise ValueError("magnitude pruning reads no text: give none")
        return [], None
    if calibration is None or not calibration.numel():
        raise ValueError(f"{method} looks at the inputs of each matrix: give calibration text")
    length, longest = calibration.shape[1], model.config.max_seq_len
    if length > longest:
        raise ValueError(f"calibration windows of {length} tokens do not fit the model; expected 1 to {longest}")
    check_token_ids(calibration, model.config.vocab_size)
    rotary = rotary_table(
        torch.arange(length, device=model.device),
        head_size=model.config.head_size,
        theta=model.config.rope_theta,
        dtype=model.dtype,
    )
    return [model.embed(batch.to(model.device)) for batch in calibration.split(batch_size)], rotary


def _moments(
    block: DenseBlock, linears: list[nn.Linear], states: list[Tensor], rotary: Tensor | None, *, whole: bool
) -> list[Tensor]:
    """Of each linear map's inputs over all states, x^T x (C, C) or its diagonal (C), in fp64.

    Raises:
        ValueError: inputs are not finite.
    """
    moments, hooks = [], []
    for linear in linears:
        size = linear.in_features
        shape = (size, size) if whole else (size,)
        moment = torch.zeros(shape, dtype=torch.float64, device=linear.weight.device)
        moments.append(moment)

        def add(_module: nn.Module, args: tuple[Tensor, ...], moment: Tensor = moment) -> None:
            x = args[0].flatten(0, -2)  # (N*T, C)
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            moment += x.T @ x if whole else x.square().sum(0)

        hooks.append(linear.register_forward_pre_hook(add))
    try:
        for state in states:
            block(state, None, rotary)
    finally:
        for hook in hooks:
            hook.remove()
    if not all(bool(moment.isfinite().all()) for moment in moments):
        raise ValueError(f"inputs of block {block.attention.layer} are not finite on this text; is the model sound?")
    return moments


def _check_sparsity(sparsity: Sparsity, config: ModelConfig) -> None:
    if not isinstance(sparsity, tuple):
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity must be at least 0 and below 1, got {sparsity}")
        return
    kept, size = sparsity
    if not 0 < kept < size:
        raise ValueError(f"a pattern n:m keeps n of m weights, 0 < n < m, got {kept}:{size}")
    for name, width in {"D": config.hidden_size, "K": config.intermediate_size}.items():
        if width % size:
            raise ValueError(f"pattern {kept}:{size} needs inputs in groups of {size}, got {name} = {width}")
