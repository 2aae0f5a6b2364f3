"""One row changed through W_down: ROME's update (arXiv 2202.05262) with the exact second moment of coefficients.

Published editors estimate C from a hundred thousand passages. Here coefficients are functions of the token, so unigram
counts give C exactly, and what the update does to every other token's row is a formula. Dimension key: V vocabulary,
K cells, D model width.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from flexmemory.interpret.stream import Gram, enumerate_layer
from flexmemory.interpret.tkv import TokenMemory

RIDGE = 1e-6
"""Times the mean of C's diagonal, added to the diagonal: C has no inverse where cells outnumber tokens."""


def smoothed(counts: Int64[Tensor, " V"] | None, *, vocab_size: int) -> Float[Tensor, " V"]:
    """The probability of each token: (count + 1) / (the sum of these), so that none is impossible.

    Raises:
        ValueError: counts are of another vocabulary, or negative.
    """
    if counts is None:
        return torch.full((vocab_size,), 1 / vocab_size, dtype=torch.float64)
    if counts.shape != (vocab_size,) or int(counts.min()) < 0:
        raise ValueError(f"counts must be of {vocab_size} tokens and not negative, got {list(counts.shape)}")
    raised = counts.double() + 1
    return raised / raised.sum()


def second_moment(
    memory: TokenMemory, *, layer: int, counts: Int64[Tensor, " V"] | None = None, progress: bool = True
) -> Float[Tensor, "K K"]:
    """C = sum over t of p(t) c(t) c(t)^T, in fp64, in one pass over the vocabulary.

    Args:
        memory: Whose coefficients.
        layer: Of which layer.
        counts: How often each token occurs; by default all as often.
        progress: Whether a bar is shown (on a terminal).

    Raises:
        ValueError: the layer cannot be read, or the counts are of another vocabulary.
    """
    gram = Gram(smoothed(counts, vocab_size=memory.vocab_size))
    enumerate_layer(memory, layer=layer, reducers=[gram], progress=progress)
    return gram.result()


def moment_factor(moment: Float[Tensor, "K K"], *, ridge: float = RIDGE) -> Float[Tensor, "K K"]:
    """The Cholesky factor of C with `ridge` times the mean of its diagonal added to the diagonal, in fp64.

    Raises:
        ValueError: the ridge is negative, or so small that C has no inverse.
    """
    if ridge < 0:
        raise ValueError(f"ridge must be 0 or more, got {ridge}")
    raised = moment.double().clone()
    raised.diagonal().add_(ridge * moment.diagonal().mean())
    factor, failed = torch.linalg.cholesky_ex(raised)
    if int(failed):
        raise ValueError(f"the second moment of coefficients has no inverse; give a larger ridge than {ridge}")
    return factor


def rank_one_factors(
    memory: TokenMemory, token_id: int, *, layer: int, row: Float[Tensor, " D"], factor: Float[Tensor, "K K"]
) -> tuple[Float[Tensor, " D"], Float[Tensor, " K"]]:
    """What is to be added to W_down, as an outer product: (row - W c) and C^-1 c / (c^T C^-1 c), on the CPU.

    Any C that is symmetric and positive gives the token exactly `row`; C, of which `factor` is the Cholesky factor,
    decides who else moves.

    Raises:
        ValueError: a shape does not fit, or the token uses no cell.
    """
    if row.shape != (memory.hidden_size,) or factor.shape != (memory.num_keys,) * 2:
        raise ValueError(
            f"expected a row of {memory.hidden_size} and a moment of {[memory.num_keys] * 2}, got {list(row.shape)} "
            f"and {list(factor.shape)}"
        )
    ids = torch.tensor([token_id])
    coefficients = memory.coefficients(ids, layer=layer)[0]
    right = torch.cholesky_solve(coefficients.double()[:, None], factor.to(coefficients.device))[:, 0]
    scale = coefficients.double() @ right
    if not scale > 0:
        raise ValueError(f"token {token_id} uses no cell of layer {layer}, so W_down cannot change its row")
    left = row.to(coefficients.device).double() - memory.rows(ids, layer=layer)[0].double()
    dtype = coefficients.dtype
    return left.to(dtype).cpu(), (right / scale).to(dtype).cpu()


def rank_one_moves(
    memory: TokenMemory, *, layer: int, left: Float[Tensor, " D"], right: Float[Tensor, " K"]
) -> Float[Tensor, " V"]:
    """How far each token's row moves by the update, in closed form: |c(t) . right| ||left||.

    Raises:
        ValueError: the layer cannot be read.
    """
    device = memory.model.device
    chunks = [memory.coefficients(ids, layer=layer) @ right.to(device) for ids in memory.vocabulary_chunks()]
    return torch.cat(chunks).abs() * left.to(device).norm()
