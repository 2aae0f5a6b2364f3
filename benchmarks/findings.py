"""The paper's findings about keys, measured on a model: clusters, coherence, outliers, shared keys, meaning; as JSON.

    python benchmarks/findings.py models/mini-memory --counts DATA [--device cuda] [--dense CHECKPOINT] \\
        [--text DATA] [--wordnet /usr/share/wordnet]

DATA is a prepared folder (`flexmemory prepare`) of text like that of training, or for counts an .npy file with the
occurrences of every id in one: tokens that it lacks are left out. A dense model is one more control; of a text the
judge of clusters is made; WordNet's database gives more categories.
Everything is exact over the other tokens of the vocabulary. Writes benchmarks/results/findings_NAME.json, and of a file
that is there of the same settings measures only what it lacks. Pictures are made of it by
benchmarks/findings_figures.py, and tables by benchmarks/findings_report.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from findings_measures import (
    CLUSTERS,
    KEY_CATEGORY,
    LEAST_SEEN,
    SEED,
    Judge,
    Space,
    cluster_labels,
    example_clusters,
    example_keys,
    measure_coherence,
    measure_intruders,
    measure_keys,
    measure_outliers,
    measure_sharing,
)
from torch import Tensor
from tqdm import tqdm

from flexmemory.device import resolve_device
from flexmemory.interpret.clusters import robust_scale
from flexmemory.interpret.cooccurrence import cooccurrence_vectors
from flexmemory.interpret.labels import categories, surface_classes
from flexmemory.interpret.pairs import PairSet, pair_set
from flexmemory.interpret.sharing import random_keys, top_keys
from flexmemory.interpret.tkv import TokenMemory
from flexmemory.interpret.vocabulary import Vocabulary
from flexmemory.interpret.wordnet import wordnet_categories
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.model.init import new_model
from flexmemory.model.transformer import Transformer
from flexmemory.provenance import provenance
from flexmemory.storage import read_json, write_json
from flexmemory.train.data import TokenDataset
from flexmemory.train.frequency import token_counts

RESULTS = Path(__file__).parent / "results"
TOP_KEYS = 32
JUDGE = {"window": 5, "contexts": 4096, "dimensions": 200}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """The tokens that statements are about."""

    vocabulary: Vocabulary
    token_ids: Tensor
    """(N,) ascending, on the device."""
    weights: Tensor
    """(N,) occurrences, on the device."""
    kinds: list[str]
    """Of the N tokens."""
    categories: dict[str, dict[str, list[int]]]
    """Token ids of the categories of each source."""
    pairs: PairSet

    @classmethod
    def of(cls, checkpoint: Checkpoint, *, args: argparse.Namespace, device: torch.device) -> Subject:
        size = checkpoint.config.vocab_size
        counts = counts_of(args.counts, vocab_size=size)
        vocabulary = Vocabulary.of(checkpoint.tokenizer(), vocab_size=size, counts=counts)
        kept = vocabulary.mask.nonzero()[:, 0]
        lists = {"word lists": categories(vocabulary)}
        if args.wordnet is not None:
            lists["WordNet"] = wordnet_categories(vocabulary, args.wordnet, least=KEY_CATEGORY)
        return cls(
            vocabulary=vocabulary,
            token_ids=kept.to(device),
            weights=counts[kept].float().to(device),
            kinds=[vocabulary.kind[i] for i in kept.tolist()],
            categories=lists,
            pairs=pair_set(vocabulary, lists["word lists"], seed=SEED),
        )

    @property
    def shown(self) -> list[str]:
        """The N tokens, for reading."""
        return [self.vocabulary.shown[i] for i in self.token_ids.tolist()]

    def classes(self) -> dict[str, list[str]]:
        """Classes of the N tokens, "" for none."""
        found = {
            name: [each[i] for i in self.token_ids.tolist()] for name, each in surface_classes(self.vocabulary).items()
        }
        of_token = {token: name for name, members in self.categories["word lists"].items() for token in members}
        return found | {"category": [of_token.get(token, "") for token in self.token_ids.tolist()]}

    def places(self, source: str, *, least: int = 0) -> dict[str, Tensor]:
        """Places among the N tokens of those of each category that has so many."""
        ids = self.token_ids.cpu()
        return {
            name: torch.searchsorted(ids, torch.tensor(each))
            for name, each in self.categories[source].items()
            if len(each) >= least
        }


def spaces_of(
    model: Transformer, *, token_ids: Tensor, dense: Transformer | None, judge: Tensor | None
) -> dict[str, Callable[[], Space]]:
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

    def of_judge(vectors: Tensor) -> Space:
        share = TOP_KEYS / memory.num_keys
        return Space(points=vectors, keys=top_keys(vectors, count=round(share * vectors.shape[1])))

    made: dict[str, Callable[[], Space]] = {name: partial(of_layer, *each) for name, each in sources.items()}
    made |= {name: partial(of_embedding, each) for name, each in embeddings.items()}
    return made if judge is None else made | {"co-occurrence": partial(of_judge, judge)}


Part = Callable[[Space, Tensor], dict[str, Any]]
"""Figures of a space and its points with columns scaled."""


def parts_of(subject: Subject, judge: Judge | None, *, args: argparse.Namespace) -> dict[str, Part]:
    """What is measured of every space."""
    classes = subject.classes()

    def of_pairs(space: Space, scaled: Tensor) -> dict[str, Any]:
        ids, pairs = subject.token_ids, subject.pairs
        return measure_sharing(
            space, scaled=scaled, token_ids=ids, pairs=pairs, classes=classes, resamples=args.resamples
        )

    def of_coherence(space: Space, scaled: Tensor) -> dict[str, Any]:
        others, permutations = args.other_clusters, args.permutations
        return measure_coherence(
            space.points, scaled=scaled, weights=subject.weights, other_clusters=others, permutations=permutations
        )

    def of_keys(source: str, space: Space, _: Tensor) -> dict[str, Any]:
        members = list(subject.places(source, least=KEY_CATEGORY).values())
        kinds, weights = subject.kinds, subject.weights
        return measure_keys(space.points, members=members, kinds=kinds, weights=weights, resamples=args.resamples)

    parts: dict[str, Part] = {"sharing": of_pairs, "coherence": of_coherence}
    parts |= {f"keys, {source}": partial(of_keys, source) for source in subject.categories}
    if judge is not None:
        parts["intruders"] = lambda _, scaled: measure_intruders(
            cluster_labels(scaled), judge=judge, resamples=args.resamples
        )
    return parts


def judge_of(subject: Subject, *, text: Path, tokens: int, boundary_id: int) -> Judge:
    """The judge, by the first tokens of a text."""
    stream = TokenDataset.open(text).train
    token_ids = torch.from_numpy(stream.read(0, min(tokens, len(stream))))
    size = len(subject.vocabulary)
    kept = subject.token_ids.cpu()
    vectors = cooccurrence_vectors(token_ids, vocab_size=size, boundary_id=boundary_id, seed=SEED, **JUDGE)
    return Judge(vectors=vectors[kept], seen=token_ids.bincount(minlength=size)[kept], kinds=subject.kinds)


def settings_of(checkpoint: Checkpoint, subject: Subject, *, args: argparse.Namespace) -> dict[str, Any]:
    """What figures of one file have in common."""
    pairs = subject.pairs
    settings: dict[str, Any] = {
        "model": checkpoint.path.name,
        "fingerprint": checkpoint.fingerprint,
        "mask_rule": subject.vocabulary.mask_rule,
        "tokens": len(subject.token_ids),
        "counted_tokens": int(counts_of(args.counts, vocab_size=checkpoint.config.vocab_size).sum()),
        "keys": checkpoint.config.intermediate_size,
        "clusters": CLUSTERS,
        "top_keys": TOP_KEYS,
        "permutations": args.permutations,
        "resamples": args.resamples,
        "seed": SEED,
        "categories": {name: len(members) for name, members in subject.categories["word lists"].items()},
        "pairs": {
            "all": len(pairs.first),
            "same category": int(pairs.same.sum()),
            "same category, strings not alike": int((pairs.same & pairs.dissimilar).sum()),
        },
    }
    settings["key_categories"] = list(subject.places("word lists", least=KEY_CATEGORY))
    if "WordNet" in subject.categories:
        settings["wordnet"] = {name: len(members) for name, members in subject.categories["WordNet"].items()}
    if args.text is not None:
        settings["judge"] = {"tokens": args.judge_tokens, "least_seen": LEAST_SEEN, **JUDGE}
    if args.dense is not None:
        dense = Checkpoint.open(args.dense)
        settings["dense"] = {"model": dense.path.name, "fingerprint": dense.fingerprint}
    return settings


def results_of(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The results in `file`, if it is there, with these settings.

    Raises:
        ValueError: they are of others.
    """
    earlier = read_json(file) if file.exists() else {}
    differing = [name for name in settings if name in earlier and earlier[name] != settings[name]]
    if differing:
        raise ValueError(f"{file} holds results of another {', '.join(differing)}: give another --out, or move it away")
    return {"runs": [], **earlier, **settings}


def measure_missing(
    results: dict[str, Any],
    parts: dict[str, Part],
    spaces: dict[str, Callable[[], Space]],
    *,
    measured: dict[str, list[str]],
    save: Callable[[], None],
) -> None:
    """Each part of each space that `results` lacks, noted in `measured` and saved at once."""
    for part, measure_part in parts.items():
        found = results.setdefault(part, {})
        for name in tqdm([name for name in spaces if name not in found], desc=f"{results['model']}, {part}"):
            space = spaces[name]()
            found[name] = measure_part(space, robust_scale(space.points))
            measured.setdefault(part, []).append(name)
            save()


def measure(checkpoint: Checkpoint, args: argparse.Namespace) -> dict[str, Any]:
    """All findings of one model."""
    started = time.perf_counter()
    device = resolve_device(args.device)
    model = checkpoint.load(device=device).float()
    dense = None if args.dense is None else _dense(Checkpoint.open(args.dense), like=checkpoint).to(device)
    subject = Subject.of(checkpoint, args=args, device=device)
    file = args.out or RESULTS / f"findings_{checkpoint.path.name}.json"
    results = results_of(file, settings_of(checkpoint, subject, args=args))
    measured: dict[str, list[str]] = {}
    run = {"provenance": provenance(), "device": device.type, "measured": measured}

    def save() -> None:
        run["seconds"] = time.perf_counter() - started
        if measured and run not in results["runs"]:
            results["runs"].append(run)
        write_json(file, results)

    judge = None
    if args.text is not None:
        boundary = checkpoint.tokenizer().boundary_id
        judge = judge_of(subject, text=args.text, tokens=args.judge_tokens, boundary_id=boundary)
    vectors = None if judge is None else judge.vectors.to(device)
    spaces = spaces_of(model, token_ids=subject.token_ids, dense=dense, judge=vectors)
    if "outliers" not in results:
        memory = TokenMemory(model)
        results["outliers"] = measure_outliers(memory, token_ids=subject.token_ids, weights=subject.weights)
        measured["outliers"] = [f"layer {layer}" for layer in memory.layers]
    first = spaces["layer 0"]().points
    if "example_clusters" not in results:
        results["example_clusters"] = example_clusters(robust_scale(first), shown=subject.shown)
    if "example_keys" not in results:
        members = subject.places("word lists", least=KEY_CATEGORY)
        results["example_keys"] = example_keys(
            first, members=list(members.values()), names=list(members), shown=subject.shown
        )
    measure_missing(results, parts_of(subject, judge, args=args), spaces, measured=measured, save=save)
    if judge is not None and "word lists" not in results["intruders"]:
        labels = torch.full((len(subject.token_ids),), -1)
        for number, places in enumerate(subject.places("word lists").values()):
            labels[places] = number
        results["intruders"]["word lists"] = measure_intruders(labels, judge=judge, resamples=args.resamples)
        measured.setdefault("intruders", []).append("word lists")
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
    parser.add_argument("--text", type=Path, help="prepared folder whose text makes the judge of clusters")
    parser.add_argument("--judge-tokens", type=int, default=16_000_000, help="of that text, the first")
    parser.add_argument("--wordnet", type=Path, help="folder of WordNet's database")
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
