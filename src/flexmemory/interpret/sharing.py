"""Do similar tokens share keys? Clusters against classes, pairs of a category against other pairs, keys in common.

Each number has its controls: the same for any points of the tokens, so also for the embedding, which is all that an
FFN-M sees, and for random keys on it; and pairs that differ in string, frequency or kind (`interpret.pairs`).
Dimension key: N tokens, K keys (or other coordinates), P pairs, T keys of a token, R resamples.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from flexmemory.interpret.pairs import PairSet
from flexmemory.interpret.resampling import Interval, group_mean, interval, resample_weights
from flexmemory.interpret.tkv import TokenMemory
from flexmemory.model.transformer import Transformer

INSTALL = "scikit-learn is not installed; pip install 'flexmemory[interpret]'"
CHUNK_PAIRS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """Of clusters with classes (M1)."""

    tokens: int
    """That have a class."""
    classes: int
    ami: float
    """Adjusted mutual information: 0 by chance, 1 if they are the same."""
    v_measure: float
    """Not adjusted for chance: compare it with `permuted_v_measure`."""
    permuted_ami: float
    """With classes permuted among the tokens (C3)."""
    permuted_v_measure: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sharing:
    """How near tokens of a category are to each other in some space (M2), and how many keys they share (M3)."""

    auroc: Interval
    """Chance that a pair of one category has a larger cosine than a pair of two."""
    auroc_permuted: float
    """With categories permuted among the tokens (C3): a half."""
    auroc_dissimilar: Interval
    """Of pairs whose strings are not alike (C4)."""
    auroc_same_kind: Interval
    """Of pairs of one kind, such as capitalised words."""
    jaccard: Interval
    """Mean share of keys in common, of those in either list: pairs of one category."""
    jaccard_dissimilar: Interval
    """Of those whose strings are not alike (C4)."""
    jaccard_matched: dict[str, Interval]
    """With a token outside the category in place of the second: same frequency (C5), and same kind too."""


def agreement(clusters: Int64[Tensor, " N"], classes: Sequence[str], *, seed: int = 0) -> Agreement:
    """AMI and V-measure of clusters with classes, of the tokens that have one (not "").

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: no token has a class.
    """
    try:
        from sklearn.metrics import adjusted_mutual_info_score, v_measure_score
    except ImportError as error:
        raise ImportError(INSTALL) from error
    chosen = [i for i, each in enumerate(classes) if each]
    if not chosen:
        raise ValueError("no token has a class")
    names = sorted({classes[i] for i in chosen})
    truth = torch.tensor([names.index(classes[i]) for i in chosen])
    found = clusters.cpu()[chosen].numpy()
    permuted = truth[torch.randperm(len(truth), generator=torch.Generator().manual_seed(seed))].numpy()
    return Agreement(
        tokens=len(chosen),
        classes=len(names),
        ami=float(adjusted_mutual_info_score(truth.numpy(), found)),
        v_measure=float(v_measure_score(truth.numpy(), found)),
        permuted_ami=float(adjusted_mutual_info_score(permuted, found)),
        permuted_v_measure=float(v_measure_score(permuted, found)),
    )


@torch.no_grad()
def sharing(
    points: Float[Tensor, "N K"],
    keys: Int64[Tensor, "N T"],
    *,
    token_ids: Int64[Tensor, " N"],
    pairs: PairSet,
    resamples: int = 1000,
    seed: int = 0,
) -> Sharing:
    """Measure all pairs.

    Args:
        points: Of tokens; cosines are of these.
        keys: The keys of each token (`top_keys`).
        token_ids: Which tokens, ascending; all of `pairs` are among them.
        pairs: Of tokens.
        resamples: R, for intervals.
        seed: Of resamples and permutations.
    """
    place = torch.searchsorted(token_ids.cpu(), torch.stack([pairs.first, pairs.second])).to(points.device)
    scores = pair_cosines(points, *place).cpu()
    weights = resample_weights(len(pairs.names), resamples=resamples, seed=seed)
    same = pairs.same
    first, second = place[:, same.to(place.device)]
    shared = jaccard(keys, first, second).cpu()
    group = pairs.groups[same, 0]
    unlike = pairs.dissimilar[same]
    matched = {
        name: group_mean(
            jaccard(keys, first, torch.searchsorted(token_ids.cpu(), each).to(first.device)).cpu(),
            group,
            weights=weights,
        )
        for name, each in pairs.partners.items()
    }
    return Sharing(
        auroc=_auroc(scores, pairs.groups, weights),
        auroc_permuted=_permuted(scores, pairs, seed=seed),
        auroc_dissimilar=_auroc(scores[pairs.dissimilar], pairs.groups[pairs.dissimilar], weights),
        auroc_same_kind=_auroc(scores[pairs.same_kind], pairs.groups[pairs.same_kind], weights),
        jaccard=group_mean(shared, group, weights=weights),
        jaccard_dissimilar=group_mean(shared[unlike], group[unlike], weights=weights),
        jaccard_matched=matched,
    )


@torch.no_grad()
def top_keys(
    points: Float[Tensor, "N K"], *, count: int = 32, norms: Float[Tensor, " K"] | None = None
) -> Int64[Tensor, "N T"]:
    """The coordinates of largest absolute value of each point, times the norm of the cell's value if given."""
    sizes = points.abs() if norms is None else points.abs() * norms
    return sizes.topk(min(count, points.shape[1]), dim=1).indices


@torch.no_grad()
def pair_cosines(
    points: Float[Tensor, "N K"], first: Int64[Tensor, " P"], second: Int64[Tensor, " P"]
) -> Float[Tensor, " P"]:
    """Cosine of each pair."""
    return torch.cat(
        [
            F.cosine_similarity(points[a], points[b])
            for a, b in zip(*(each.split(CHUNK_PAIRS) for each in (first, second)), strict=True)
        ]
    )


@torch.no_grad()
def jaccard(keys: Int64[Tensor, "N T"], first: Int64[Tensor, " P"], second: Int64[Tensor, " P"]) -> Float[Tensor, " P"]:
    """Keys in both lists by keys in either, for each pair; lists hold no key twice."""
    both = torch.cat(
        [
            (keys[a][:, :, None] == keys[b][:, None, :]).sum(dim=(1, 2))
            for a, b in zip(*(each.split(CHUNK_PAIRS) for each in (first, second)), strict=True)
        ]
    )
    return both / (2 * keys.shape[1] - both).float()


def auroc(
    scores: Float[Tensor, " P"], positive: Bool[Tensor, " P"], *, weights: Float[Tensor, " P"] | None = None
) -> float:
    """Chance that a positive has a larger score than a negative, a tie being half; each drawn by its weight.

    NaN without positives or without negatives.
    """
    if weights is None:
        weights = torch.ones(len(scores))
    weights = weights.double()
    values, place = scores.unique(return_inverse=True)
    above, below = (
        torch.zeros(len(values), dtype=torch.float64).index_add_(0, place[each], weights[each])
        for each in (positive, ~positive)
    )
    chance = (above * (below.cumsum(0) - below / 2)).sum() / (above.sum() * below.sum())
    return chance.item()


@torch.no_grad()
def random_keys(model: Transformer, *, seed: int = 0) -> Transformer:
    """A copy with gates and keys drawn anew, normal and of the same size; embedding and norms stay (C2).

    Raises:
        ValueError: the model has no keys (`TokenMemory`).
    """
    changed = copy.deepcopy(model)
    memory = TokenMemory(changed)
    generator = torch.Generator().manual_seed(seed)
    for layer in memory.layers:
        ffn = memory.cells(layer)
        for weight in (ffn.gate.weight, ffn.up.weight):
            size = weight.square().mean().sqrt()
            weight.copy_(torch.randn(weight.shape, generator=generator).to(weight) * size)
    return changed


def _auroc(scores: Tensor, groups: Tensor, weights: Tensor) -> Interval:
    """Wins are counted once for each category against each pair of categories; resamples only weigh them."""
    count = weights.shape[1]
    first, second = groups.unbind(dim=1)
    same = first == second
    others, between = scores[~same], (first * count + second)[~same]
    wins = torch.zeros(count, count**2, dtype=torch.float64)
    for category in range(count):
        own = scores[same & (first == category)].sort().values
        places = torch.searchsorted(own, others) + torch.searchsorted(own, others, right=True)
        wins[category].index_add_(0, between, len(own) - places.double() / 2)  # a tie is half a win
    sizes = first[same].bincount(minlength=count).double()
    sizes_between = between.bincount(minlength=count**2).double()
    weights_between = (weights[:, :, None] * weights[:, None, :]).flatten(1)
    resampled = ((weights @ wins) * weights_between).sum(dim=1)
    resampled = resampled / ((weights @ sizes) * (weights_between @ sizes_between))
    return interval((wins.sum() / (sizes.sum() * sizes_between.sum())).item(), resampled)


def _permuted(scores: Tensor, pairs: PairSet, *, seed: int, permutations: int = 20) -> float:
    """The mean over permutations of the tokens' categories."""
    tokens, place = torch.stack([pairs.first, pairs.second]).unique(return_inverse=True)
    group = torch.empty(len(tokens), dtype=torch.int64).scatter_(0, place[0], pairs.groups[:, 0])
    group.scatter_(0, place[1], pairs.groups[:, 1])
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(permutations):
        moved = group[torch.randperm(len(group), generator=generator)]
        values.append(auroc(scores, moved[place[0]] == moved[place[1]]))
    return sum(values) / len(values)
