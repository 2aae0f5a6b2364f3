"""The paper's findings about keys, measured on a model: clusters, coherence, outliers, shared keys; as JSON.

    python benchmarks/findings.py models/mini-memory --counts DATA [--device cuda] [--dense CHECKPOINT]

DATA is a prepared folder (`flexmemory prepare`) of text like that of training, or an .npy file with the occurrences of
every id in one: tokens that it lacks are left out.
Everything is exact over the other tokens of the vocabulary. Writes benchmarks/results/findings_NAME.json; pictures are
made of it by benchmarks/findings_figures.py, and tables by benchmarks/readme.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from flexmemory.device import resolve_device
from flexmemory.interpret.clusters import cluster_facts, kmeans, robust_scale
from flexmemory.interpret.coherence import Measurement, against_null
from flexmemory.interpret.labels import categories, surface_classes
from flexmemory.interpret.outliers import count_outliers
from flexmemory.interpret.pairs import PairSet, pair_set
from flexmemory.interpret.sharing import agreement, random_keys, sharing, top_keys
from flexmemory.interpret.tkv import TokenMemory
from flexmemory.interpret.vocabulary import Vocabulary
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.model.init import new_model
from flexmemory.model.transformer import Transformer
from flexmemory.provenance import provenance
from flexmemory.storage import write_json
from flexmemory.train.data import TokenDataset
from flexmemory.train.frequency import token_counts

RESULTS = Path(__file__).parent / "results"
TOP_KEYS = 32
CLUSTERS = 100
SEED = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Space:
    """Tokens as points: the coefficients of a layer, or what they are compared with."""

    points: Tensor
    """(N, K), raw."""
    keys: Tensor
    """(N, T) of largest |c| times the norm of the value; of an embedding as large a share of its coordinates."""


def spaces_of(model: Transformer, *, token_ids: Tensor, dense: Transformer | None) -> dict[str, Callable[[], Space]]:
    """What makes each space when its turn comes, so that one is held at a time."""
    untrained = new_model(model.config, seed=SEED, device=model.device).to(next(model.parameters()).dtype)
    memory = TokenMemory(model)
    sources = {f"layer {layer}": (memory, layer) for layer in memory.layers}
    sources |= {
        "random keys": (TokenMemory(random_keys(model, seed=SEED)), 0),
        "untrained": (TokenMemory(untrained), 0),
    }
    embeddings = {"embedding": model}
    if dense is not None:
        sources["dense layer 0"] = (TokenMemory(dense), 0)
        embeddings["dense embedding"] = dense

    def of_layer(memory: TokenMemory, layer: int) -> Space:
        points = torch.cat([memory.coefficients(ids, layer=layer) for ids in token_ids.split(4096)])
        return Space(points=points, keys=top_keys(points, count=TOP_KEYS, norms=memory.value_norms(layer)))

    def of_embedding(model: Transformer) -> Space:
        points = model.embed(token_ids).detach()
        share = TOP_KEYS / memory.num_keys
        return Space(points=points, keys=top_keys(points, count=round(share * points.shape[1])))

    made: dict[str, Callable[[], Space]] = {name: partial(of_layer, *each) for name, each in sources.items()}
    return made | {name: partial(of_embedding, each) for name, each in embeddings.items()}


def measure_coherence(points: Tensor, *, scaled: Tensor, weights: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Every variant of every measure beside its null."""
    settings = Measurement(clusters=CLUSTERS)
    variants = {
        "scaled": (scaled, settings, None),
        "raw": (points, settings, None),
        "weighted": (scaled, settings, weights),
    }
    variants |= {f"{count} clusters": (scaled, Measurement(clusters=count), None) for count in args.other_clusters}
    return {
        name: {
            measure: dataclasses.asdict(each)
            for measure, each in against_null(
                used, measurement=measurement, weights=weighed, permutations=args.permutations
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


def measure(checkpoint: Checkpoint, args: argparse.Namespace) -> dict[str, Any]:
    """All findings of one model."""
    started = time.perf_counter()
    device = resolve_device(args.device)
    model = checkpoint.load(device=device).float()
    dense = None if args.dense is None else _dense(Checkpoint.open(args.dense), like=checkpoint).to(device)
    counts = counts_of(args.counts, vocab_size=model.config.vocab_size)
    vocabulary = Vocabulary.of(checkpoint.tokenizer(), vocab_size=model.config.vocab_size, counts=counts)
    kept = vocabulary.mask.nonzero()[:, 0]
    token_ids, weights = kept.to(device), counts[kept].float().to(device)
    lists = categories(vocabulary)
    pairs = pair_set(vocabulary, lists, seed=SEED)
    classes = {name: [each[i] for i in kept.tolist()] for name, each in surface_classes(vocabulary).items()}
    of_token = {token: name for name, members in lists.items() for token in members}
    classes["category"] = [of_token.get(token, "") for token in kept.tolist()]
    results: dict[str, Any] = {
        "model": checkpoint.path.name,
        "fingerprint": checkpoint.fingerprint,
        "provenance": provenance(),
        "device": device.type,
        "mask_rule": vocabulary.mask_rule,
        "tokens": len(kept),
        "counted_tokens": int(counts.sum()),
        "keys": model.config.intermediate_size,
        "clusters": CLUSTERS,
        "top_keys": TOP_KEYS,
        "permutations": args.permutations,
        "resamples": args.resamples,
        "seed": SEED,
        "categories": {name: len(members) for name, members in lists.items()},
        "pairs": {
            "all": len(pairs.first),
            "same category": int(pairs.same.sum()),
            "same category, strings not alike": int((pairs.same & pairs.dissimilar).sum()),
        },
        "outliers": measure_outliers(TokenMemory(model), token_ids=token_ids, weights=weights),
        "coherence": {},
        "sharing": {},
    }

    def save() -> None:
        results["seconds"] = time.perf_counter() - started
        write_json(args.out or RESULTS / f"findings_{checkpoint.path.name}.json", results)

    spaces = spaces_of(model, token_ids=token_ids, dense=dense)
    for name, make in tqdm(spaces.items(), desc=f"{checkpoint.path.name}, sharing"):
        space = make()
        scaled = robust_scale(space.points)
        results["sharing"][name] = measure_sharing(
            space, scaled=scaled, token_ids=token_ids, pairs=pairs, classes=classes, resamples=args.resamples
        )
        if name == "layer 0":
            results["example_clusters"] = example_clusters(scaled, shown=[vocabulary.shown[i] for i in kept.tolist()])
    save()
    for name, make in tqdm(spaces.items(), desc=f"{checkpoint.path.name}, coherence"):
        points = make().points
        results["coherence"][name] = measure_coherence(points, scaled=robust_scale(points), weights=weights, args=args)
        save()
    return results


def counts_of(source: Path, *, vocab_size: int) -> Tensor:
    """Occurrences of every token in a prepared folder, or as an .npy file has them."""
    if source.suffix == ".npy":
        return torch.from_numpy(np.load(source, allow_pickle=False)).long()
    return token_counts(TokenDataset.open(source).train, vocab_size=vocab_size)


def _dense(dense: Checkpoint, *, like: Checkpoint) -> Transformer:
    if dense.tokenizer_fingerprint != like.tokenizer_fingerprint:
        raise ValueError(f"{dense.path} has another tokenizer than {like.path}: their tokens cannot be compared")
    return dense.load().float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--counts", type=Path, required=True, help="prepared folder whose tokens are counted, or .npy")
    parser.add_argument("--dense", type=Path, help="checkpoint of a dense model with the same tokenizer")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--permutations", type=int, default=5)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--other-clusters", type=int, nargs="*", default=[], help="also this many clusters")
    parser.add_argument("--out", type=Path, help="the file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    measure(Checkpoint.open(args.checkpoint), args)


if __name__ == "__main__":
    main()
