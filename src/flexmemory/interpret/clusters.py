"""K-means over tokens by the keys they use (Sec. 4, Fig. 5), and what the clusters are like.

Points stay as they are given; what is made beside them is bounded: a chunk of rows, and the sample that centres start
from. The sums of an update are matrix products, so that a seed gives the same clusters again on a GPU too, where
scattered additions would not.
Dimension key: N points, K keys, C clusters, n rows of a chunk.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

CHUNK_ROWS = 4096
"""Points that exist in the working precision at once."""
SEEDING_POINTS = 32
"""Points for each cluster that initial centres are drawn from, at most: a copy, and a pass over it for every centre."""
COLUMN_CHUNK = 256
"""Columns that are sorted at once."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Clustering:
    """Centres, and to which each point is nearest."""

    labels: Int64[Tensor, " N"]
    centres: Float[Tensor, "C K"]
    """Means of the points; of unit length if spherical."""
    inertia: float
    """Weighted sum of squared distances of (scaled) points to their centres."""
    iterations: int
    spherical: bool
    """Points count by direction alone."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ClusterFacts:
    """What each cluster is like."""

    size: Int64[Tensor, " C"]
    cohesion: Float[Tensor, " C"]
    """Mean cosine of members with their centre; 0 for an empty cluster."""
    medoids: list[list[int]]
    """Of each, the members nearest to the centre's direction, nearest first."""


@torch.no_grad()
def kmeans(
    points: Float[Tensor, "N K"],
    *,
    count: int,
    seed: int = 0,
    spherical: bool = True,
    weights: Float[Tensor, " N"] | None = None,
    restarts: int = 1,
    iterations: int = 50,
    tolerance: float = 1e-4,
    chunk_rows: int = CHUNK_ROWS,
) -> Clustering:
    """Lloyd's algorithm from k-means++ centres; the best of `restarts`.

    Args:
        points: Of any floating type, on any device; computed on in fp32, or in fp64 if they are that.
        count: C, clusters. Some may end empty only if fewer points than that differ.
        seed: Of the initial centres; restart r draws by seed and r.
        spherical: Scale every point to unit length first (a zero point stays), and centres after each update.
        weights: Of points, not negative; the same for all if none are given.
        restarts: Runs, of which the one of least inertia is kept.
        iterations: Updates of a run, at most.
        tolerance: A run ends when inertia falls by less than this share of itself.
        chunk_rows: n; bounds memory, changes rounding only.

    Raises:
        ValueError: there are fewer points than clusters, weights are not of use, or a point is not finite.
    """
    _check(points, count=count, weights=weights, restarts=restarts)
    source = _Points.of(points, spherical=spherical, weights=weights, chunk_rows=chunk_rows)
    best: Clustering | None = None
    for restart in range(restarts):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + restart)
        centres = _seed_centres(source, count=count, generator=generator)
        found = _lloyd(source, centres, iterations=iterations, tolerance=tolerance)
        if best is None or found.inertia < best.inertia:
            best = found
    assert best is not None
    return best


@torch.no_grad()
def cluster_facts(
    points: Float[Tensor, "N K"], clustering: Clustering, *, medoids: int = 8, chunk_rows: int = CHUNK_ROWS
) -> ClusterFacts:
    """Size, cohesion and the most typical members of each cluster of `points`."""
    count = len(clustering.centres)
    directions = F.normalize(clustering.centres, dim=1)
    cosines = torch.cat(
        [
            (F.normalize(rows.to(directions.dtype), dim=1) * directions[labels]).sum(dim=1)
            for rows, labels in zip(points.split(chunk_rows), clustering.labels.split(chunk_rows), strict=True)
        ]
    )
    size = clustering.labels.bincount(minlength=count)
    total = torch.zeros(count, dtype=torch.float64, device=points.device)
    total.index_add_(0, clustering.labels, cosines.double())
    nearest = cosines.argsort(descending=True, stable=True)
    by_cluster = nearest[clustering.labels[nearest].argsort(stable=True)].split(size.tolist())
    return ClusterFacts(
        size=size,
        cohesion=(total / size.clamp(min=1)).to(directions.dtype),
        medoids=[members[:medoids].tolist() for members in by_cluster],
    )


@torch.no_grad()
def robust_scale(points: Float[Tensor, "N K"], *, clip: float = 0.005) -> Float[Tensor, "N K"]:
    """Every column clipped to its quantiles `clip` and 1 - `clip`, then to mean 0 and standard deviation 1.

    A few keys with coefficients far beyond all others, or a mean that all tokens share, decide distances and cosines
    of raw c; neither does afterwards. A column that does not vary becomes 0.

    Args:
        points: Raw coefficients.
        clip: Share of the points that is clipped at each end.

    Returns:
        A new tensor of the points' type, fp32 if that is smaller.
    """
    if not 0 <= clip < 0.5:
        raise ValueError(f"clip is a share of points at each end, in [0, 0.5); got {clip}")
    dtype = torch.promote_types(points.dtype, torch.float32)
    scaled = torch.empty(points.shape, dtype=dtype, device=points.device)
    lowest = int(clip * (len(points) - 1))
    for start in range(0, points.shape[1], COLUMN_CHUNK):
        columns = points[:, start : start + COLUMN_CHUNK].to(dtype)
        ordered = columns.sort(dim=0).values
        low, high = ordered[lowest], ordered[-1 - lowest]
        columns = columns.clamp(min=low, max=high)
        columns = columns - columns.mean(dim=0)
        deviation = columns.square().mean(dim=0).sqrt()
        flat = deviation <= 1e-6 * torch.maximum(low.abs(), high.abs())  # rounding of the mean alone
        scaled[:, start : start + COLUMN_CHUNK] = columns / deviation.masked_fill(flat, torch.inf)
    return scaled


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Points:
    """Points as the algorithm sees them: chunk by chunk, scaled, weighted."""

    points: Tensor
    scales: Tensor  # (N,)
    squares: Tensor  # (N,) of the scaled points
    weights: Tensor  # (N,) mean 1
    dtype: torch.dtype
    spherical: bool
    chunk_rows: int

    @staticmethod
    def of(points: Tensor, *, spherical: bool, weights: Tensor | None, chunk_rows: int) -> _Points:
        dtype = torch.promote_types(points.dtype, torch.float32)
        squares = torch.cat([chunk.to(dtype).square().sum(dim=1) for chunk in points.split(chunk_rows)])
        if not squares.isfinite().all():
            raise ValueError("points hold NaN or infinity; clusters need finite coordinates")
        if weights is None:
            weights = torch.ones_like(squares)
        weights = weights.to(squares)
        scales = torch.ones_like(squares)
        if spherical:
            scales = torch.where(squares > 0, squares.rsqrt(), scales)
            squares = squares.sign()
        return _Points(
            points=points,
            scales=scales,
            squares=squares,
            weights=weights / weights.mean(),
            dtype=dtype,
            spherical=spherical,
            chunk_rows=chunk_rows,
        )

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        return self.points[rows].to(self.dtype) * self.scales[rows, None]

    def inertia(self, distances: Tensor) -> float:
        return (distances.double() * self.weights).sum().item()

    def chunks(self) -> list[slice]:
        return [slice(start, start + self.chunk_rows) for start in range(0, len(self.points), self.chunk_rows)]


def _seed_centres(source: _Points, *, count: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next centre is a point, drawn by its squared distance to the nearest one so far."""
    sample = torch.randperm(len(source.points), generator=generator)
    weighted = source.weights.cpu()[sample] > 0
    sample = sample[weighted][: max(count, SEEDING_POINTS * count)].to(source.points.device)
    rows, squares, weights = source[sample], source.squares[sample], source.weights[sample]
    distances = torch.full_like(squares, torch.inf)
    chosen: list[Tensor] = []
    for _ in range(count):
        chances = (weights if not chosen else weights * distances).double().cpu().cumsum(0)
        drawn = torch.rand(1, generator=generator, dtype=torch.float64) * chances[-1]
        pick = int(torch.searchsorted(chances, drawn, right=True).clamp(max=len(sample) - 1))
        chosen.append(rows[pick])
        reached = (squares + squares[pick] - 2 * (rows @ rows[pick])).clamp(min=0)
        distances = torch.minimum(distances, reached)
    return torch.stack(chosen)


def _lloyd(source: _Points, centres: Tensor, *, iterations: int, tolerance: float) -> Clustering:
    labels, distances, sums, masses = _assign(source, centres)
    inertia = source.inertia(distances)
    done = 0
    while done < iterations:
        centres = _update(source, centres, distances=distances, sums=sums, masses=masses)
        labels, distances, sums, masses = _assign(source, centres)
        before, inertia = inertia, source.inertia(distances)
        done += 1
        if before - inertia <= tolerance * inertia:
            break
    return Clustering(labels=labels, centres=centres, inertia=inertia, iterations=done, spherical=source.spherical)


def _assign(source: _Points, centres: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Nearest centre of each point and the squared distance; sums (C, K) and masses (C,) of the points of each."""
    sums, masses = torch.zeros_like(centres), centres.new_zeros(len(centres))
    half_squares = centres.square().sum(dim=1) / 2
    labels, distances = [], []
    for chunk in source.chunks():
        rows = source[chunk]
        best, nearest = (rows @ centres.T - half_squares).max(dim=1)
        members = rows.new_zeros(len(rows), len(centres))
        members.scatter_(1, nearest[:, None], source.weights[chunk, None])
        sums += members.T @ rows
        masses += members.sum(dim=0)
        labels.append(nearest)
        distances.append((source.squares[chunk] - 2 * best).clamp(min=0))
    return torch.cat(labels), torch.cat(distances), sums, masses


def _update(source: _Points, centres: Tensor, *, distances: Tensor, sums: Tensor, masses: Tensor) -> Tensor:
    """Means of the members; a centre without any moves to one of the points that are farthest from theirs."""
    empty = masses == 0
    updated = torch.where(empty[:, None], centres, sums / masses.clamp(min=torch.finfo(masses.dtype).tiny)[:, None])
    if empty.any():
        far = (distances * (source.weights > 0)).topk(int(empty.sum())).indices
        updated[empty] = source[far]
    return F.normalize(updated, dim=1) if source.spherical else updated


def _check(points: Tensor, *, count: int, weights: Tensor | None, restarts: int) -> None:
    if restarts < 1:
        raise ValueError(f"restarts is {restarts}; expected at least 1")
    usable = len(points)
    if weights is not None:
        if weights.shape != points.shape[:1] or not (weights.isfinite().all() and (weights >= 0).all()):
            raise ValueError(f"weights are one finite number >= 0 for each of {len(points)} points")
        usable = int((weights > 0).sum())
    if not 1 <= count <= usable:
        raise ValueError(f"{count} clusters of {usable} points (that have weight); expected 1 to {usable}")
