"""Clusters and maps of an index: tokens as points in the space of a layer's coefficients, or of embeddings.

Points are the tokens of the mask. Coefficients are scaled robustly, column by column, as a few keys far beyond all
others would decide everything (docs/index-format.md), then to unit length, and held in 16 bit: 1.4 GB of a layer at the
1B shape. Dimension key: V vocabulary, N tokens in the mask, K cells, X coordinates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Float16, Float32, Int64
from torch import Tensor
from torch.nn import functional as F

from flexmemory.interpret.clusters import COLUMN_CHUNK, cluster_facts, kmeans, robust_scale
from flexmemory.interpret.index_format import NO_CLUSTER, NOWHERE
from flexmemory.interpret.index_layer import BYTES_PER_COEFFICIENT, WORKING_BYTES, chunk_size
from flexmemory.interpret.projection import principal_components, tsne
from flexmemory.interpret.tkv import TokenMemory

MapMethod = Literal["tsne", "pca"]
PERPLEXITY = 30
KINDS = 4
"""Kinds of tokens that are named of a cluster."""


@torch.no_grad()
def layer_points(
    memory: TokenMemory,
    *,
    layer: int,
    token_ids: Int64[Tensor, " N"],
    extremes: Float32[Tensor, "K 2"],
    working_bytes: int = WORKING_BYTES,
) -> Float16[Tensor, "N K"]:
    """Tokens by their coefficients in a layer, robustly scaled, each of unit length.

    `extremes` are each cell's smallest and largest coefficient: columns are in [-1, 1] before they go to fp16.
    """
    largest = extremes.abs().amax(1).to(memory.model.device)
    largest = torch.where(largest > 0, largest, 1)
    chunk = chunk_size(memory.num_keys, bytes_each=BYTES_PER_COEFFICIENT, working_bytes=working_bytes)
    points = _filled(
        token_ids.to(memory.model.device),
        lambda ids: memory.coefficients(ids, layer=layer) / largest,
        width=memory.num_keys,
        chunk=chunk,
    )
    for start in range(0, memory.num_keys, COLUMN_CHUNK):
        columns = points[:, start : start + COLUMN_CHUNK]
        columns.copy_(robust_scale(columns))
    for rows in points.split(chunk):
        rows.copy_(F.normalize(rows.float(), dim=1))
    return points


@torch.no_grad()
def embedding_points(memory: TokenMemory, *, token_ids: Int64[Tensor, " N"]) -> Float16[Tensor, "N D"]:
    """Tokens by the direction of their input embedding."""
    ids = token_ids.to(memory.model.device)
    return _filled(ids, lambda part: F.normalize(memory.model.embed(part), dim=1), width=memory.hidden_size, chunk=4096)


def clustered(
    points: Float[Tensor, "N X"], *, token_ids: Int64[Tensor, " N"], kinds: Sequence[str], count: int, seed: int
) -> tuple[Int64[Tensor, " V"], list[dict[str, Any]]]:
    """K-means by direction: the label of every token of the vocabulary, and what `clusters.json` says of each cluster.

    Args:
        points: Of the tokens in the mask.
        token_ids: Which those are; all others have the label `NO_CLUSTER`.
        kinds: Of all tokens of the vocabulary.
        count: Clusters.
        seed: Of the initial centres.
    """
    found = kmeans(points, count=count, seed=seed)
    facts = cluster_facts(points, found)
    labels = torch.full((len(kinds),), NO_CLUSTER, dtype=torch.int64)
    labels[token_ids] = found.labels.cpu()
    counted = [Counter[str]() for _ in range(count)]
    for token, label in zip(token_ids.tolist(), found.labels.tolist(), strict=True):
        counted[label][kinds[token]] += 1
    return labels, [
        {
            "size": size,
            "cohesion": round(cohesion, 6),
            "medoids": token_ids[medoids].tolist(),
            "kinds": sorted(counter.items(), key=lambda item: (-item[1], item[0]))[:KINDS],
        }
        for size, cohesion, medoids, counter in zip(
            facts.size.tolist(), facts.cohesion.tolist(), facts.medoids, counted, strict=True
        )
    ]


def mapped(
    points: Float[Tensor, "N X"], *, token_ids: Int64[Tensor, " N"], vocab_size: int, method: MapMethod, seed: int
) -> Int64[Tensor, "V 2"]:
    """Every token's place on a plane of 0 .. 65534 both ways, with one scale for both; others are `NOWHERE`.

    Raises:
        ImportError: openTSNE is not installed.
    """
    if method == "tsne":
        flat = tsne(points, seed=seed, perplexity=max(1, min(PERPLEXITY, (len(points) - 1) // 3)))
    else:
        flat = principal_components(points, count=2).cpu()
    flat = flat.double() - flat.double().amin(0)
    size = float(flat.max())
    places = torch.full((vocab_size, 2), NOWHERE, dtype=torch.int64)
    places[token_ids] = (flat * ((NOWHERE - 1) / size if size > 0 else 0)).round().long()
    return places


def _filled(
    token_ids: Tensor, vectors: Callable[[Tensor], Tensor], *, width: int, chunk: int
) -> Float16[Tensor, "N X"]:
    """Vectors of tokens in fp16, computed a chunk at a time."""
    points = torch.empty(len(token_ids), width, dtype=torch.float16, device=token_ids.device)
    for ids, rows in zip(token_ids.split(chunk), points.split(chunk), strict=True):
        rows.copy_(vectors(ids))
    return points
