"""What tokens do with their cells: clusters on a map (Fig. 5), clustering and outliers by layer (Fig. 6)."""

from __future__ import annotations

import functools
from typing import Any

import torch

from flexmemory.interpret.clusters import cluster_facts, kmeans, robust_scale
from flexmemory.interpret.coherence import cos_gap, permute_columns, silhouette
from flexmemory.interpret.outliers import count_outliers
from flexmemory.interpret.tkv import TokenMemory
from flexmemory.interpret.vocabulary import Vocabulary
from flexmemory.reproduce.runs import Run
from flexmemory.reproduce.study import Job, Study, reference
from flexmemory.train.frequency import token_counts

CLUSTERS = 100
EXAMPLES = 12
NULLS = 3


def jobs(study: Study) -> dict[str, Job]:
    """Of the memory model and flex-3 at every size."""
    runs = reference(study, ["memory", "flex3"])
    return {f"{size.family}-{run.variant}": functools.partial(_cells, run=run) for size, run in runs}


def _cells(study: Study, run: Run) -> dict[str, Any]:
    model = study.load(run)
    memory = TokenMemory(model)
    counts = token_counts(study.train_data.train, vocab_size=model.config.vocab_size)
    vocabulary = Vocabulary.of(study.train_data.tokenizer(), vocab_size=model.config.vocab_size, counts=counts)
    ids = vocabulary.mask.nonzero()[:, 0]
    clusters = min(CLUSTERS, len(ids) // 8)
    _, outliers = count_outliers(memory, token_ids=ids, progress=False)
    layers = []
    for layer in memory.layers:
        points = robust_scale(memory.coefficients(ids, layer=layer))
        found = _clustering(points, clusters)
        nulls = [_clustering(permute_columns(points, seed=seed), clusters) for seed in range(NULLS)]
        layers.append(
            {
                "cos_gap": found["cos_gap"],
                "silhouette": found["silhouette"],
                "null_cos_gap": sum(null["cos_gap"] for null in nulls) / NULLS,
                "null_silhouette": sum(null["silhouette"] for null in nulls) / NULLS,
                "outliers_of_layer": float(outliers[layer].beyond[0].double().mean()),
                "outliers_of_all": float(outliers[layer].beyond[1].double().mean()),
            }
        )
    first = robust_scale(memory.coefficients(ids, layer=0))
    clustering = kmeans(first, count=clusters, spherical=False, restarts=3)
    facts = cluster_facts(first, clustering)
    order = [i for i in facts.cohesion.argsort(descending=True).tolist() if facts.size[i] > 10]
    shown = [vocabulary.shown[i] for i in ids.tolist()]
    return {
        "size": run.size.family,
        "variant": run.variant,
        "tokens": len(ids),
        "clusters": clusters,
        "layers": layers,
        "examples": [
            {"size": int(facts.size[i]), "medoids": [shown[place] for place in facts.medoids[i]]}
            for i in order[:: max(1, len(order) // EXAMPLES)][:EXAMPLES]
        ],
    }


def _clustering(points: torch.Tensor, clusters: int) -> dict[str, float]:
    labels = kmeans(points, count=clusters, spherical=False, seed=0).labels
    return {"cos_gap": cos_gap(points, labels), "silhouette": silhouette(points, labels, sample=2000, seed=0)}
