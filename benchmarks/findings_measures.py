"""What benchmarks/findings.py measures of one space of tokens, as figures for JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexmemory.interpret.clusters import cluster_facts, kmeans
from flexmemory.interpret.coherence import Measurement, against_null
from flexmemory.interpret.intruders import draw_tests, intrusion
from flexmemory.interpret.key_categories import category_scores, end_ranks, key_scores
from flexmemory.interpret.outliers import count_outliers
from flexmemory.interpret.pairs import PairSet, permute_alike
from flexmemory.interpret.resampling import group_mean, resample_weights
from flexmemory.interpret.sharing import agreement, sharing
from flexmemory.interpret.tkv import TokenMemory

CLUSTERS = 100
SEED = 0
REACHES = (1, 5)
"""Of categories of n tokens: among the first n of a key's, or 5 n as the literature has it."""
KEY_PERMUTATIONS = 5
KEY_CATEGORY = 10
"""Tokens of a category that keys are scored by, or more: of one of five, a single token makes a score of 20 %."""
LEAST_SEEN = 50
"""Occurrences in the judge's text of a token that it is asked about."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Space:
    """Tokens as points: the coefficients of a layer, or what they are compared with."""

    points: Tensor
    """(N, K), raw."""
    keys: Tensor
    """(N, T) of largest |c| times the norm of the value; of an embedding as large a share of its coordinates."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge:
    """What the intruder test asks."""

    vectors: Tensor
    """(N, M)."""
    seen: Tensor
    """(N,) occurrences in the judge's text."""
    kinds: list[str]


def measure_coherence(
    points: Tensor, *, scaled: Tensor, weights: Tensor, other_clusters: Sequence[int], permutations: int
) -> dict[str, Any]:
    """Every variant of every measure beside its null."""
    settings = Measurement(clusters=CLUSTERS)
    variants = {
        "scaled": (scaled, settings, None),
        "raw": (points, settings, None),
        "weighted": (scaled, settings, weights),
    }
    variants |= {f"{count} clusters": (scaled, Measurement(clusters=count), None) for count in other_clusters}
    return {
        name: {
            measure: dataclasses.asdict(each)
            for measure, each in against_null(
                used, measurement=measurement, weights=weighed, permutations=permutations
            ).items()
        }
        for name, (used, measurement, weighed) in variants.items()
    }


def measure_sharing(
    space: Space, *, scaled: Tensor, token_ids: Tensor, pairs: PairSet, classes: dict[str, list[str]], resamples: int
) -> dict[str, Any]:
    """Clusters against classes, pairs of tokens, and keys in common."""
    found = kmeans(scaled, count=CLUSTERS, spherical=False, restarts=3, seed=SEED)
    agreements = {name: dataclasses.asdict(agreement(found.labels, each)) for name, each in classes.items()}
    measured = {
        name: dataclasses.asdict(sharing(points, space.keys, token_ids=token_ids, pairs=pairs, resamples=resamples))
        for name, points in (("scaled", scaled), ("raw", space.points))
    }
    return {"agreement": agreements, **measured}


def measure_outliers(memory: TokenMemory, *, token_ids: Tensor, weights: Tensor) -> list[dict[str, Any]]:
    """Means over tokens in every layer, each token counting once and as often as it occurs."""
    magnitudes, counted = count_outliers(memory, token_ids=token_ids)
    shares = {"mean": torch.ones(len(token_ids)), "weighted_mean": weights.cpu()}
    layers = []
    for sizes, counts in zip(magnitudes, counted, strict=True):
        per_token = {
            "beyond_layer": counts.beyond[0],
            "beyond_all": counts.beyond[1],
            "share_with_any": (counts.beyond[0] > 0),
            "half_energy": counts.half_energy,
            "participation": counts.participation,
        }
        figures: dict[str, Any] = {"threshold": sizes.threshold, "mean_size": sizes.mean, "deviation": sizes.deviation}
        for name, values in per_token.items():
            figures[name] = {
                how: ((share / share.sum()).double() @ values.double()).item() for how, share in shares.items()
            }
        layers.append(figures)
    return layers


def example_clusters(scaled: Tensor, *, shown: Sequence[str], count: int = 24) -> list[dict[str, Any]]:
    """Of the clusters of more than 10 tokens some, from the most coherent to the least."""
    found = kmeans(scaled, count=CLUSTERS, spherical=False, restarts=3, seed=SEED)
    facts = cluster_facts(scaled, found)
    order = [i for i in facts.cohesion.argsort(descending=True).tolist() if facts.size[i] > 10]
    return [
        {
            "size": int(facts.size[i]),
            "cohesion": float(facts.cohesion[i]),
            "medoids": [shown[place] for place in facts.medoids[i]],
        }
        for i in order[:: max(1, len(order) // count)][:count]
    ]


def cluster_labels(scaled: Tensor) -> Tensor:
    """Clusters for the intruder test, as those for agreement with classes."""
    return kmeans(scaled, count=CLUSTERS, spherical=False, restarts=3, seed=SEED).labels.cpu()


def measure_intruders(labels: Tensor, *, judge: Judge, resamples: int) -> dict[str, Any]:
    """How often the judge finds the intruder in clusters, and in the same with labels permuted among like tokens.

    Tokens of a label below 0, or that the judge has hardly seen, take no part.
    """
    labels = torch.where(judge.seen >= LEAST_SEEN, labels, -1)
    permuted = labels[permute_alike(judge.kinds, judge.seen, seed=SEED)]
    return {
        name: dataclasses.asdict(
            intrusion(
                judge.vectors,
                draw_tests(each, kinds=judge.kinds, counts=judge.seen, seed=SEED),
                resamples=resamples,
                seed=SEED,
            )
        )
        for name, each in (("clusters", labels), ("permuted", permuted))
    }


def measure_keys(
    points: Tensor, *, members: Sequence[Tensor], kinds: Sequence[str], weights: Tensor, resamples: int
) -> dict[str, Any]:
    """Of each key the score of its best category, of each category that of its best key; and of permuted tokens."""
    permutations = [permute_alike(kinds, weights.cpu().long(), seed=seed) for seed in range(KEY_PERMUTATIONS)]
    ranks = end_ranks(points)
    categories = torch.arange(len(members))
    resampled = resample_weights(len(members), resamples=resamples, seed=SEED)
    figures = {}
    for reach in REACHES:
        scores = category_scores(ranks, members, reach=reach)
        permuted = [[permutation[each] for each in members] for permutation in permutations]
        nulls = torch.stack([category_scores(ranks, each, reach=reach) for each in permuted])
        of_keys, null_keys = scores.amax(dim=(0, 1)), nulls.amax(dim=(1, 2))
        of_categories, null_categories = scores.amax(dim=(1, 2)).cpu(), nulls.amax(dim=(2, 3))
        figures[str(reach)] = {
            "keys": of_keys.double().mean().item(),
            "keys_null": null_keys.double().mean().item(),
            "keys_beyond_99": (of_keys > null_keys.flatten().quantile(0.99)).double().mean().item(),
            "categories": dataclasses.asdict(group_mean(of_categories, categories, weights=resampled)),
            "categories_null": null_categories.double().mean().item(),
            "categories_half": int((of_categories >= 0.5).sum()),
        }
    return figures


def example_keys(
    points: Tensor, *, members: Sequence[Tensor], names: Sequence[str], shown: Sequence[str]
) -> list[dict[str, Any]]:
    """Of each category that is the best of some key, the key that fits it best; from the best fit to the worst."""
    found = key_scores(category_scores(end_ranks(points), members))
    rows = []
    for i, name in enumerate(names):
        score, key = found.score.masked_fill(found.category != i, -1).max(dim=0)
        if score > 0:
            first = (points[:, key] * found.sign[key]).topk(10).indices
            rows.append(
                {
                    "category": name,
                    "key": int(key),
                    "sign": int(found.sign[key]),
                    "score": score.item(),
                    "tokens": [shown[place] for place in first.tolist()],
                }
            )
    return sorted(rows, key=lambda row: -row["score"])
