"""How clustered the tokens of a layer are: the paper's "clustering coefficient" (Fig. 6a), which it does not define.

What the literature calls so is several things, which disagree, and two traps wait: a mean that all tokens share makes
the cosine within clusters high where there are no clusters, and a few keys of huge coefficients raise every measure
while they hide the clusters that there are. So points are given with every column scaled
(`clusters.robust_scale`), or raw beside that; and every measure stands beside its null, the same points with each
column permuted on its own: the same coefficients of each key, tied to no token.
Dimension key: N tokens, K keys, C clusters, m neighbours.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from flexmemory.interpret.clusters import kmeans

CHUNK_ELEMENTS = 2**25
"""Of a block of similarities or comparisons."""
MEASURES = ("cos_gap", "silhouette", "evr", "graph", "stability")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What is measured, and how finely."""

    clusters: int = 100
    """C of K-means (Euclidean)."""
    seeds: tuple[int, ...] = (0, 1)
    """Of K-means; measures are means over them."""
    iterations: int = 25
    """Of K-means, at most."""
    sample: int = 1024
    """Tokens whose silhouettes are averaged, each against all."""
    neighbours: int = 15
    """m of the graph."""

    def __post_init__(self) -> None:
        if len(self.seeds) < 2:
            raise ValueError(f"stability needs two seeds or more, got {self.seeds}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Coherence:
    """Measures of one set of points; what is not defined with weights is None."""

    cos_gap: float
    """Our clustering coefficient: `cos_gap` of K-means clusters."""
    silhouette: float | None
    """Mean of (b - a) / max(a, b), distances to the own and to the next cluster; in [-1, 1]."""
    evr: float
    """1 - SSW / SST: share of the variance that lies between clusters."""
    graph: float | None
    """Local clustering coefficient of the graph of nearest neighbours by cosine; in [0, 1]."""
    stability: float
    """Adjusted Rand index of clusters from different seeds: 1 the same, 0 chance."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AgainstNull:
    """A measure beside what it gives where columns are permuted."""

    value: float
    null: float
    """Mean over permutations."""
    null_deviation: float
    z: float | None
    """(value - null) / deviation; None where the permutations do not differ."""


@torch.no_grad()
def coherence(
    points: Float[Tensor, "N K"], *, measurement: Measurement, weights: Float[Tensor, " N"] | None = None
) -> Coherence:
    """All measures of `points`; with weights (occurrences of tokens) those that are means over pairs or points."""
    found = [
        kmeans(
            points,
            count=measurement.clusters,
            seed=seed,
            spherical=False,
            weights=weights,
            iterations=measurement.iterations,
        )
        for seed in measurement.seeds
    ]
    labels = [each.labels for each in found]
    total = _scatter(points, weights)
    silhouettes = [
        silhouette(points, each, sample=measurement.sample, seed=seed)
        for each, seed in zip(labels, measurement.seeds, strict=True)
        if weights is None
    ]
    pairs = list(itertools.combinations(labels, 2))
    return Coherence(
        cos_gap=statistics.fmean(cos_gap(points, each, weights=weights) for each in labels),
        silhouette=statistics.fmean(silhouettes) if silhouettes else None,
        evr=statistics.fmean(1 - each.inertia / total for each in found),
        graph=graph_coefficient(nearest(points, count=measurement.neighbours)) if weights is None else None,
        stability=statistics.fmean(adjusted_rand(first, second) for first, second in pairs),
    )


def against_null(
    points: Float[Tensor, "N K"],
    *,
    measurement: Measurement,
    weights: Float[Tensor, " N"] | None = None,
    permutations: int = 5,
) -> dict[str, AgainstNull]:
    """Each measure of `MEASURES` that is defined, beside its mean over `permutations` nulls (seeds from 0 up)."""
    if permutations < 2:
        raise ValueError(f"a deviation needs two permutations or more, got {permutations}")
    value = coherence(points, measurement=measurement, weights=weights)
    nulls = [
        coherence(permute_columns(points, seed=seed), measurement=measurement, weights=weights)
        for seed in range(permutations)
    ]
    compared = {}
    for name in MEASURES:
        if getattr(value, name) is None:
            continue
        each = [getattr(null, name) for null in nulls]
        mean, deviation = statistics.fmean(each), statistics.stdev(each)
        z = (getattr(value, name) - mean) / deviation if deviation > 0 else None
        compared[name] = AgainstNull(value=getattr(value, name), null=mean, null_deviation=deviation, z=z)
    return compared


@torch.no_grad()
def permute_columns(points: Float[Tensor, "N K"], *, seed: int) -> Float[Tensor, "N K"]:
    """Every column in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat(
        [
            columns.gather(0, torch.rand(columns.shape, generator=generator).argsort(dim=0).to(points.device))
            for columns in points.split(64, dim=1)
        ],
        dim=1,
    )


@torch.no_grad()
def cos_gap(
    points: Float[Tensor, "N K"], labels: Int64[Tensor, " N"], *, weights: Float[Tensor, " N"] | None = None
) -> float:
    """Mean over tokens of (mean cosine with the others of its cluster - mean cosine with all others).

    All pairs count, exactly. With weights, means are weighted. A token alone in its cluster adds 0. The second term
    removes what a shared mean would add to the first.
    """
    if weights is None:
        weights = torch.ones(len(points), device=points.device)
    weights = weights.double()
    directions = F.normalize(points.to(torch.promote_types(points.dtype, torch.float32)), dim=1)
    count = int(labels.max()) + 1
    masses = torch.zeros(count, dtype=torch.float64, device=points.device).index_add_(0, labels, weights)
    members = F.one_hot(labels, count).to(directions) * weights[:, None].to(directions)  # (N, C)
    sums = members.T @ directions  # (C, K)
    dots = directions @ sums.T  # (N, C)
    own = weights * directions.square().sum(dim=1)
    within = (dots.gather(1, labels[:, None])[:, 0] - own) / (masses[labels] - weights)
    overall = (dots.sum(dim=1) - own) / (weights.sum() - weights)
    alone = labels.bincount(minlength=count)[labels] == 1
    return ((weights * (within - overall).masked_fill(alone, 0)).sum() / weights.sum()).item()


@torch.no_grad()
def silhouette(
    points: Float[Tensor, "N K"], labels: Int64[Tensor, " N"], *, sample: int = 1024, seed: int = 0
) -> float:
    """Mean silhouette, by Euclidean distance, of `sample` tokens drawn at random, each against all tokens.

    A token alone in its cluster counts as 0, as in scikit-learn.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(points), generator=generator)[:sample].to(points.device)
    dtype = torch.promote_types(points.dtype, torch.float32)
    points = points.to(dtype)
    count = int(labels.max()) + 1
    sizes = labels.bincount(minlength=count).to(dtype)
    members = F.one_hot(labels, count).to(dtype)
    values = []
    for ids in chosen.split(max(1, CHUNK_ELEMENTS // len(points))):
        means = torch.cdist(points[ids], points) @ members  # (n, C): sums so far
        own = labels[ids]
        inside = means.gather(1, own[:, None])[:, 0] / (sizes[own] - 1)
        means = means / sizes
        means[:, sizes == 0] = torch.inf
        outside = means.scatter(1, own[:, None], torch.inf).amin(dim=1)
        value = (outside - inside) / torch.maximum(outside, inside)
        values.append(value.masked_fill(sizes[own] == 1, 0))
    return torch.cat(values).double().mean().item()


@torch.no_grad()
def nearest(points: Float[Tensor, "N K"], *, count: int) -> Int64[Tensor, "N count"]:
    """The `count` other points of largest cosine with each, nearest first."""
    if not 1 <= count < len(points):
        raise ValueError(f"{count} neighbours of each of {len(points)} points; expected 1 to {len(points) - 1}")
    directions = F.normalize(points.to(torch.promote_types(points.dtype, torch.float32)), dim=1)
    found = []
    for ids in torch.arange(len(points), device=points.device).split(max(1, CHUNK_ELEMENTS // len(points))):
        cosines = directions[ids] @ directions.T
        cosines[torch.arange(len(ids), device=points.device), ids] = -torch.inf
        found.append(cosines.topk(count, dim=1).indices)
    return torch.cat(found)


@torch.no_grad()
def graph_coefficient(neighbours: Int64[Tensor, "N m"]) -> float:
    """Share of the pairs of a token's m neighbours that are linked, one being a neighbour of the other; the mean."""
    count = neighbours.shape[1]
    linked = []
    for near in neighbours.split(max(1, CHUNK_ELEMENTS // count**3)):
        is_near = (neighbours[near][:, :, :, None] == near[:, None, None, :]).any(dim=2)  # (n, m, m): a has b
        linked.append((is_near | is_near.mT).sum(dim=(1, 2)))
    pairs = count * (count - 1)  # each counted twice, above too; a point is not its own neighbour
    return torch.cat(linked).double().mean().item() / pairs if pairs else math.nan


def adjusted_rand(first: Int64[Tensor, " N"], second: Int64[Tensor, " N"]) -> float:
    """The Rand index of two clusterings, corrected for chance (Hubert and Arabie 1985)."""
    width = int(second.max()) + 1

    def pairs(sizes: Tensor) -> float:
        return (sizes.double() * (sizes - 1) / 2).sum().item()

    together = pairs((first * width + second).unique(return_counts=True)[1])
    one, other = pairs(first.bincount()), pairs(second.bincount())
    expected = one * other / (len(first) * (len(first) - 1) / 2)
    most = (one + other) / 2
    return 1.0 if most == expected else (together - expected) / (most - expected)


def _scatter(points: Tensor, weights: Tensor | None) -> float:
    """SST, with weights of mean 1 as K-means has them."""
    if weights is None:
        weights = torch.ones(len(points), device=points.device)
    weights = weights.double() / weights.double().mean()
    share = weights / weights.sum()
    mean = sum(
        part[:, None].mul(rows).sum(dim=0) for part, rows in zip(share.split(4096), points.split(4096), strict=True)
    )
    return sum(
        (part * (rows.double() - mean).square().sum(dim=1)).sum().item()
        for part, rows in zip(weights.split(4096), points.split(4096), strict=True)
    )
