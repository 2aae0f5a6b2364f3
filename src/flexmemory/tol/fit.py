"""A scheme for one codec, fitted to the rows that it is for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from flexmemory.tol.coding import SliceTensors, coding_of
from flexmemory.tol.scheme import Band, Scheme


def fit(
    codec: str,
    source: Callable[[Tensor], Tensor],
    *,
    vocab_size: int,
    hidden_size: int,
    layers: Sequence[int],
    embedding: bool,
    counts: Int64[Tensor, " V"] | None = None,
    device: torch.device | str = "cpu",
) -> Scheme:
    """How `codec` writes the rows of `source` (the embedding, then all layers), all at once in memory.

    Raises:
        ValueError: there is no such codec.
    """
    coding = coding_of(codec, hidden_size)
    chosen = ([0] if embedding else []) + [1 + layer for layer in layers]
    rows = source(torch.arange(vocab_size))[:, chosen].float().to(device)
    weights = torch.ones(vocab_size, device=device) if counts is None else counts.to(device) + 0.5
    weights = weights / weights.sum()
    slices, tensors = [], []
    for place in range(rows.shape[1]):
        carried = embedding and place == 0
        slices.append(coding_of("bf16", hidden_size) if carried else coding)
        tensors.append(SliceTensors() if carried else _tensors(rows[:, place], weights, codec, hidden_size))
    band = Band(tokens=vocab_size, slices=tuple(slices))
    return Scheme(
        codec=codec,
        layers=tuple(layers),
        embedding=embedding,
        hidden_size=hidden_size,
        bands=(band,),
        tensors=(tuple(tensors),),
    )


def _tensors(rows: Float[Tensor, "V D"], weights: Float[Tensor, " V"], codec: str, hidden_size: int) -> SliceTensors:
    coding = coding_of(codec, hidden_size)
    mean = (weights @ rows).half().float()
    centred, basis = rows - mean, None
    if coding.basis:
        moments = centred.T @ (weights[:, None] * centred)
        basis = torch.linalg.eigh(moments.double()).eigenvectors.flip(1).T[: coding.num_coefficients].float()
        centred = centred @ basis.T
    largest = None if coding.levels == "bf16" else centred.abs().amax().expand(centred.shape[1]).clone()
    return SliceTensors(mean=mean, gain=largest, basis=basis)
