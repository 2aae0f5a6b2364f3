"""The transform of each layer, and schemes made of them: means, bases, gains; errors fed back from layer to layer.

Dimension key: U tokens, L layers, D model width, N coefficients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from flexmemory.tol.allocate import Allocation, Choice, falling
from flexmemory.tol.coding import SliceTensors, coding_of
from flexmemory.tol.fit import CHUNK_TOKENS
from flexmemory.tol.scheme import Band, Scheme, round_basis
from flexmemory.tol.sensitivity import Feedback

RIDGE = 0.01
"""Share of the mean eigenvalue that is added to a metric before its root is inverted."""
ROOM = 4.0
"""How far the scale of a token that was not seen may be above the largest that was."""
BASIS_POWER = 0.25
"""Of the share of positions, in the moments that bases come from: rare tokens are most of the bytes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """Tokens whose rows stand for all."""

    rows: Float[Tensor, "U L D"]
    """Exact rows of the model's layers, on the device where plans are made; `share` and `factor` too."""
    share: Float[Tensor, " U"]
    """The share of positions that each stands for; of all, 1."""
    band: Int64[Tensor, " U"]
    """The band of each, in rising order; on the CPU."""
    factor: Float[Tensor, "bands L"]
    """What an error costs in each band and layer, as a multiple of what it costs on average."""

    @property
    def num_bands(self) -> int:
        """How many bands there are."""
        return len(self.factor)

    def of(self, band: int) -> slice:
        """Where a band's tokens are."""
        first, stop = torch.searchsorted(self.band, torch.tensor([band, band + 1])).tolist()
        return slice(first, stop)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transform:
    """How a layer's slices become coefficients."""

    mean: Float[Tensor, " D"]
    basis: Float[Tensor, "N D"] | None
    analysis: Float[Tensor, "D N"] | None
    variance: Float[Tensor, "bands N"]
    """Of each coefficient in each band, about zero."""
    weight: Float[Tensor, " N"]
    """What a squared error of each costs."""
    metric: Float[Tensor, "D D"]
    """What errors of the slice cost."""
    choice: Choice

    def coefficients(self, targets: Float[Tensor, "U D"]) -> Float[Tensor, "U N"]:
        """Of some slices."""
        centred = targets - self.mean
        return centred if self.analysis is None else centred @ self.analysis


def fit_transform(
    targets: Float[Tensor, "U D"],
    sample: Sample,
    layer: int,
    metric: Float[Tensor, "D D"],
    *,
    basis: int,
    power: float = BASIS_POWER,
) -> Transform:
    """The transform of a layer whose slices are to be `targets`.

    Args:
        targets: What is to be written for each token of the sample.
        sample: Their shares and bands.
        layer: Which layer it is.
        metric: What errors of its slices cost.
        basis: Bits of the numbers of a basis, the principal directions under the metric; 0 for no basis.
        power: Of the shares, in the moments that the basis comes from.
    """
    mean = (sample.share[:, None] * targets).sum(0).half().float()
    bands = [sample.of(band) for band in range(sample.num_bands)]
    shares = torch.stack([sample.share[band].sum() for band in bands]) * sample.factor[:, layer]
    directions = analysis = None
    weight = metric.diagonal()
    if basis:
        directions = round_basis(_principal(targets - mean, sample.share**power, metric), bits=basis)
        analysis = torch.linalg.inv(directions.double()).float()
        variance = _variances((targets - mean) @ analysis, sample, bands)
        weight = torch.einsum("cd,de,ce->c", directions, metric, directions)
        tokens = torch.tensor([float(band.stop - band.start) for band in bands], device=targets.device)
        importance = torch.einsum("b,bn->n", tokens, (variance * weight).clamp(min=1e-30).log())
        order = importance.argsort(descending=True, stable=True)
        directions, analysis, variance, weight = (
            directions[order],
            analysis[:, order],
            variance[:, order],
            weight[order],
        )
    else:
        variance = _variances(targets - mean, sample, bands)
    spread = shares[:, None] * variance * weight
    squares = ((targets @ metric) * targets).sum(1)
    dropped = [(sample.share[band] * squares[band]).sum() * sample.factor[n, layer] for n, band in enumerate(bands)]
    return Transform(
        mean=mean,
        basis=directions,
        analysis=analysis,
        variance=variance,
        weight=weight,
        metric=metric,
        choice=Choice(
            basis=bool(basis), spread=(falling(spread) if basis else spread).cpu(), dropped=torch.stack(dropped).cpu()
        ),
    )


def _principal(
    centred: Float[Tensor, "U D"], shares: Float[Tensor, " U"], metric: Float[Tensor, "D D"]
) -> Float[Tensor, "D D"]:
    """Directions, orthogonal under the metric."""
    metric = metric.double()
    ridge = RIDGE * metric.diagonal().mean().clamp(min=1e-30)
    root = torch.linalg.cholesky(metric + ridge * torch.eye(len(metric)).to(metric))  # any root will do: it is turned
    turned = centred.double() @ root
    moments = turned.T @ ((shares / shares.sum()).double()[:, None] * turned)
    found = torch.linalg.eigh(moments).eigenvectors.flip(1)
    return torch.linalg.solve_triangular(root, found.T, upper=False, left=False).float()


def _variances(numbers: Float[Tensor, "U N"], sample: Sample, bands: Sequence[slice]) -> Float[Tensor, "bands N"]:
    """Mean squares in each band, by share."""
    found = []
    for band in bands:
        share = sample.share[band]
        found.append((share[:, None] * numbers[band].square()).sum(0) / share.sum().clamp(min=1e-30))
    return torch.stack(found)


def make_scheme(
    transforms: Sequence[Transform],
    allocation: Allocation,
    targets: Float[Tensor, "U L D"],
    sample: Sample,
    *,
    tokens: Sequence[int],
    layers: Sequence[int],
    order: Int64[Tensor, " V"] | None,
    embedding: bool,
    feedback: Feedback,
) -> Scheme:
    """The scheme that carries out an allocation."""
    width = targets.shape[2]
    columns: dict[int, list[SliceTensors]] = {}
    for layer, transform in enumerate(transforms):
        columns[layer] = _layer_tensors(transform, allocation.codings[layer], targets[:, layer], sample)
    bands, tensors = [], []
    for number, count in enumerate(tokens):
        codings = allocation.bands(number)
        slices = [codings[layer] for layer in layers]
        of_band = [columns[layer][number] for layer in layers]
        if embedding:
            slices.insert(0, coding_of("bf16", width))
            of_band.insert(0, SliceTensors())
        bands.append(Band(tokens=count, slices=tuple(slices)))
        tensors.append(tuple(of_band))
    return Scheme(
        codec="planned",
        layers=tuple(layers),
        embedding=embedding,
        hidden_size=width,
        bands=tuple(bands),
        tensors=tuple(tensors),
        order=order,
        feedback=feedback.matrices,
    )


def _layer_tensors(
    transform: Transform, codings: Sequence, targets: Float[Tensor, "U D"], sample: Sample
) -> list[SliceTensors]:
    """What a layer needs in each band; nothing in those that drop it."""
    ranks = [coding.num_coefficients for coding in codings if coding]
    if not ranks:
        return [SliceTensors()] * len(codings)
    rank = max(ranks)
    basis, analysis = transform.basis, transform.analysis
    if basis is not None:
        basis = basis[:rank]
        metric = transform.metric.double()
        metric = metric + RIDGE * metric.diagonal().mean() * torch.eye(len(metric)).to(metric)
        pushed = basis.double() @ metric  # the coefficients that cost least, of these directions
        analysis = torch.linalg.solve(pushed @ basis.double().T, pushed).T.float()
    centred = targets - transform.mean
    numbers = centred if analysis is None else centred @ analysis
    found = []
    for band, coding in enumerate(codings):
        gain = weight = None
        if coding and coding.levels != "bf16":
            count = coding.num_coefficients
            part = numbers[sample.of(band), :count]
            share = sample.share[sample.of(band)]
            spread = ((share[:, None] * part.square()).sum(0) / share.sum()).sqrt()
            spread = torch.maximum(spread, 1e-3 * spread.max()).clamp(min=1e-12)
            cost = spread.square() * transform.weight[:count]
            scales = ((part / spread).square() * cost).sum(1).div(cost.sum()).sqrt()
            gain = (spread * scales.max() * ROOM).bfloat16().float()
            weight = gain.square() * transform.weight[:count]
        found.append(SliceTensors(mean=transform.mean, gain=gain, basis=basis, analysis=analysis, weight=weight))
    return found


@torch.inference_mode()
def coded(scheme: Scheme, sample: Sample) -> Float[Tensor, "U L D"]:
    """The sample's rows as they come back, by layer of the model."""
    scheme = scheme.moved(sample.rows.device)
    places = [scheme.embedding + scheme.layers.index(layer) for layer in range(len(scheme.layers))]
    found = torch.empty_like(sample.rows)
    with tqdm(total=len(found), desc="coding", unit="token", leave=False, disable=None) as bar:
        for band in range(sample.num_bands):
            where = sample.of(band)
            for first in range(where.start, where.stop, 4 * CHUNK_TOKENS):
                part = slice(first, min(first + 4 * CHUNK_TOKENS, where.stop))
                rows = F.pad(sample.rows[part][:, list(scheme.layers)], (0, 0, int(scheme.embedding), 0))
                found[part] = scheme.decode(scheme.encode(rows, band), band)[:, places]
                bar.update(part.stop - part.start)
    return found


def fed_back(
    rows: Float[Tensor, "U L D"], decoded: Float[Tensor, "U L D"], feedback: Feedback
) -> Float[Tensor, "U L D"]:
    """What was to be written for `rows`, errors of earlier layers taken off, where `decoded` came back."""
    targets = rows.clone()
    for layer in range(rows.shape[1]):
        error = decoded[:, layer] - targets[:, layer]
        for later, matrix in feedback.matrices.get(layer, {}).items():
            targets[:, later] -= error @ matrix.T
    return targets
