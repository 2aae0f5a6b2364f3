"""Figures with intervals over groups (categories, clusters): groups are drawn again, not their pairs or tokens.

Pairs of one category share tokens and are no independent draws; categories are. Dimension key: P values, G groups,
R resamples.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A figure and its 95 % interval, over groups drawn with replacement."""

    value: float
    low: float
    high: float


def resample_weights(groups: int, *, resamples: int, seed: int) -> Float[Tensor, "R G"]:
    """How often each group is drawn, in each of R draws of as many as there are; fp64."""
    drawn = torch.randint(groups, (resamples, groups), generator=torch.Generator().manual_seed(seed))
    return F.one_hot(drawn, groups).sum(dim=1).double()


def group_mean(
    values: Float[Tensor, " P"],
    groups: Int64[Tensor, " P"],
    *,
    weights: Float[Tensor, "R G"],
    masses: Int64[Tensor, " G"] | None = None,
) -> Interval:
    """The mean over groups of each one's mean, by `masses` or, without, every group counting the same."""
    count = weights.shape[1]
    sizes = groups.bincount(minlength=count).double()
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, groups, values.double())
    shares = (sizes > 0).double() if masses is None else masses * (sizes > 0).double()
    means = shares * sums / sizes.clamp(min=1)
    return interval((means.sum() / shares.sum()).item(), (weights @ means) / (weights @ shares))


def interval(value: float, resampled: Float[Tensor, " R"]) -> Interval:
    """`value` within the quantiles of its resamples, of those that are defined."""
    finite = resampled[resampled.isfinite()].double()
    low, high = finite.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(value=value, low=low, high=high)
