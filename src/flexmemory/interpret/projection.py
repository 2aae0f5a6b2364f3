"""Tokens on a plane: t-SNE of the keys that they use (Fig. 5), or quickly their two principal components.

t-SNE is openTSNE's (`flexmemory[interpret]`), imported where it is used, on the first 50 principal components: 128k
tokens take some minutes on a CPU. A map shows neighbourhoods; distances between groups, their sizes and densities on
it mean nothing.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

CHUNK_ROWS = 4096
"""Points that exist in the working precision at once."""
INSTALL = "openTSNE is not installed; pip install 'flexmemory[interpret]', or draw principal_components instead"


@torch.no_grad()
def principal_components(points: Float[Tensor, "N K"], *, count: int = 2) -> Float[Tensor, "N count"]:
    """Coordinates on the directions of largest variance, largest first; the quick map, with `count=2`.

    Exact, from the K x K covariance in two passes. A direction's sign is such that its largest weight is positive.

    Raises:
        ValueError: `count` is more than the points or their coordinates allow.
    """
    if not 1 <= count <= min(points.shape):
        raise ValueError(f"{count} components of {len(points)} points with {points.shape[1]} coordinates are too many")
    dtype = torch.promote_types(points.dtype, torch.float32)
    chunks = points.split(CHUNK_ROWS)
    mean = torch.stack([chunk.double().sum(dim=0) for chunk in chunks]).sum(dim=0).div(len(points)).to(dtype)
    covariance = torch.zeros(points.shape[1], points.shape[1], dtype=dtype, device=points.device)
    for chunk in chunks:
        centred = chunk.to(dtype) - mean
        covariance += centred.T @ centred
    directions = torch.linalg.eigh(covariance).eigenvectors[:, -count:].flip(1)  # (K, count)
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    directions = directions * largest.sign()
    return torch.cat([(chunk.to(dtype) - mean) @ directions for chunk in chunks])


def require_opentsne() -> ModuleType:
    """The library.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import openTSNE
    except ImportError as error:
        raise ImportError(INSTALL) from error
    return openTSNE


def tsne(
    points: Float[Tensor, "N K"],
    *,
    seed: int = 0,
    perplexity: int = 30,
    components: int = 50,
    metric: str = "euclidean",
    threads: int = 1,
) -> Float[Tensor, "N 2"]:
    """A t-SNE map, on the CPU: started from the two largest of the principal components that it is made of.

    Args:
        points: On any device; the components are computed there.
        seed: Of the search for neighbours. With one thread the same seed gives the same map on one machine.
        perplexity: About how many neighbours count for a point; a third of the points at most.
        components: Principal components kept (all, of points with fewer coordinates).
        metric: Distance between points, as openTSNE names it.
        threads: Of the search and of the forces; more are faster, and no longer exactly repeatable.

    Raises:
        ImportError: openTSNE is not installed.
        ValueError: there are too few points for the perplexity.
    """
    if len(points) < 3 * perplexity + 1:
        raise ValueError(f"perplexity {perplexity} needs {3 * perplexity + 1} points or more; got {len(points)}")
    openTSNE = require_opentsne()
    kept = principal_components(points, count=min(components, *points.shape)).double().cpu()
    start = kept[:, :2] / kept[:, 0].std() * 1e-4
    algorithm: Any = openTSNE.TSNE  # its annotations know no array to start from
    embedded = algorithm(
        perplexity=perplexity,
        metric=metric,
        initialization=start.numpy(),
        n_jobs=threads,
        random_state=seed,
    ).fit(kept.numpy())
    return torch.from_numpy(embedded.__array__().copy()).float()
