"""The intruder test: of five tokens of a cluster and a stranger, is the stranger found?

Chang et al. 2009, "Reading Tea Leaves", asked people; here a judge that knows nothing of the model answers, such as
`cooccurrence.cooccurrence_vectors`: the odd one is that which is least like the other five. The stranger replaces a
member, and is of its kind and frequency, so that neither case nor frequency gives it away. Chance is 1 in 6, exactly so
for labels that mean nothing (`pairs.permute_alike`).
Dimension key: N tokens, M tests, D dimensions of the judge.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from flexmemory.interpret.resampling import Interval, group_mean, resample_weights

MEMBERS = 5
CHANCE = 1 / (MEMBERS + 1)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class IntruderTests:
    """Sets of tokens, one of which does not belong."""

    tokens: Int64[Tensor, "M 6"]
    """Places of N; the last is the intruder."""
    cluster: Int64[Tensor, " M"]
    size: Int64[Tensor, " M"]
    """Tokens of the cluster."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Intrusion:
    """How often the intruder was found."""

    accuracy: Interval
    """Mean over clusters, all alike; `CHANCE` where clusters mean nothing to the judge."""
    by_token: Interval
    """The same, clusters counting by their tokens: one that holds most of them cannot hide behind many small ones."""
    clusters: int
    tests: int


def draw_tests(
    labels: Int64[Tensor, " N"],
    *,
    kinds: Sequence[str],
    counts: Int64[Tensor, " N"],
    tests: int = 20,
    window: int = 25,
    seed: int = 0,
) -> IntruderTests:
    """Tests of every cluster of six or more.

    Args:
        labels: Cluster of each token; those below 0 take no part.
        kinds: Of each token; the intruder is of that of the member which it replaces.
        counts: Occurrences of each token.
        tests: Of each cluster.
        window: The intruder is one of so many strangers next in frequency on either side.
        seed: Of all draws.

    Raises:
        ValueError: no cluster has six tokens, one of which can be replaced.
    """
    names = sorted(set(kinds))
    kind = torch.tensor([names.index(each) for each in kinds])
    order = counts.argsort(stable=True)
    order = order[labels[order] >= 0]
    ordered = {int(code): order[kind[order] == code] for code in kind.unique()}
    place = torch.zeros(len(labels), dtype=torch.int64)
    for members in ordered.values():
        place[members] = torch.arange(len(members))
    generator = torch.Generator().manual_seed(seed)
    drawn, clusters, sizes = [], [], []
    for cluster in range(int(labels.max()) + 1):
        members = (labels == cluster).nonzero()[:, 0]
        strange = {code: labels[each] != cluster for code, each in ordered.items()}
        with_strangers = torch.tensor([code for code, each in strange.items() if each.any()])
        replaceable = members[torch.isin(kind[members], with_strangers)]
        if len(members) <= MEMBERS or not len(replaceable):
            continue
        for _ in range(tests):
            replaced = replaceable[torch.randint(len(replaceable), (1,), generator=generator)]
            others = members[members != replaced]
            others = others[torch.randperm(len(others), generator=generator)[:MEMBERS]]
            code = int(kind[replaced])
            at = int(place[replaced])
            below = ordered[code][:at][strange[code][:at]][-window:]
            above = ordered[code][at:][strange[code][at:]][:window]
            near = torch.cat([below, above])
            intruder = near[torch.randint(len(near), (1,), generator=generator)]
            drawn.append(torch.cat([others, intruder]))
            clusters.append(cluster)
            sizes.append(len(members))
    if not drawn:
        raise ValueError(f"no cluster has {MEMBERS + 1} tokens with a stranger like one of them: make fewer clusters")
    return IntruderTests(tokens=torch.stack(drawn), cluster=torch.tensor(clusters), size=torch.tensor(sizes))


@torch.no_grad()
def odd_ones(vectors: Float[Tensor, "N D"], tokens: Int64[Tensor, "M 6"]) -> Int64[Tensor, " M"]:
    """Which of each set, 0 to 5, has the smallest mean cosine with the others."""
    directions = F.normalize(vectors, dim=1)[tokens]  # (M, 6, D)
    cosines = directions @ directions.mT
    return (cosines.sum(dim=2) - cosines.diagonal(dim1=1, dim2=2)).argmin(dim=1)


def intrusion(
    vectors: Float[Tensor, "N D"], tests: IntruderTests, *, resamples: int = 1000, seed: int = 0
) -> Intrusion:
    """How often a judge who knows tokens as `vectors` finds the intruder; the interval is over clusters."""
    found = (odd_ones(vectors, tests.tokens) == MEMBERS).float()
    clusters, group = tests.cluster.unique(return_inverse=True)
    weights = resample_weights(len(clusters), resamples=resamples, seed=seed)
    sizes = torch.empty_like(clusters).scatter_(0, group, tests.size)
    return Intrusion(
        accuracy=group_mean(found, group, weights=weights),
        by_token=group_mean(found, group, weights=weights, masses=sizes),
        clusters=len(clusters),
        tests=len(found),
    )
