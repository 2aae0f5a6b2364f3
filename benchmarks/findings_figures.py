"""Pictures of benchmarks/results/findings_*.json, and maps of a model's tokens.

    python benchmarks/findings_figures.py                                        # all but maps, of all results
    python benchmarks/findings_figures.py --map models/mini-memory --counts DATA # t-SNE of layer 0 and the embedding

Colours are those of Okabe and Ito, which colour-blind readers tell apart.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from flexmemory.interpret.clusters import cluster_facts, kmeans, robust_scale
from flexmemory.interpret.projection import tsne
from flexmemory.interpret.tkv import TokenMemory
from flexmemory.interpret.vocabulary import Vocabulary
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.train.data import TokenDataset
from flexmemory.train.frequency import token_counts

Panel = Callable[[Axes, dict[str, Any]], None]
"""Draws a model's results."""
ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#999999",
)  # fmt: skip
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
GROUPS = {
    "word (space before it)": (("word",), BLUE),
    "capitalised word": (("capitalised word",), ORANGE),
    "piece of a word": (("piece",), GREEN),
    "capitalised piece": (("capitalised piece",), PURPLE),
    "capitals": (("capitals",), RED),
    "digits, punctuation, space": (("digits", "punctuation", "space", "mixed"), "black"),
    "bytes, other scripts": (("bytes", "other script", "special"), GREY),
}
MEASURES = {
    "cos_gap": "cosine gap",
    "silhouette": "silhouette",
    "evr": "share of variance between clusters",
    "graph": "graph clustering coefficient",
    "stability": "agreement of seeds (ARI)",
}


def save(figure: Figure, name: str, *, dpi: int = 140) -> None:
    image = IMAGES / name
    partial = image.with_name(f".{image.name}")
    figure.savefig(partial, dpi=dpi)
    partial.replace(image)
    print(image)


def layers_of(figures: dict[str, Any]) -> list[str]:
    return sorted((name for name in figures if name.startswith("layer ")), key=lambda name: int(name.split()[1]))


def draw_coherence(results: list[dict[str, Any]]) -> None:
    """Every measure by layer beside its null (Fig. 6a)."""
    with rc_context(STYLE):
        figure = Figure(figsize=(12, 2.6 * len(results)), layout="constrained")
        rows = figure.subplots(len(results), len(MEASURES), squeeze=False, sharex=True, sharey="col")
        for row, each in zip(rows, results, strict=True):
            for axes, measure in zip(row, MEASURES, strict=True):
                coherence_panel(axes, each["coherence"], measure)
            row[0].set_ylabel(each["model"])
        for first, last, title in zip(rows[0], rows[-1], MEASURES.values(), strict=True):
            first.set_title(title, fontsize=9)
            last.set_xlabel("layer")
        handles, labels = rows[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        save(figure, "findings-coherence.png")


def coherence_panel(axes: Axes, coherence: dict[str, Any], measure: str) -> None:
    layers = layers_of(coherence)
    places = range(len(layers))
    for variant, colour, marker, name in (("scaled", BLUE, "o", "columns scaled"), ("raw", ORANGE, "s", "raw")):
        found = [coherence[layer][variant][measure] for layer in layers]
        axes.plot(places, [each["value"] for each in found], color=colour, marker=marker, markersize=4, label=name)
        low = [each["null"] - 2 * each["null_deviation"] for each in found]
        high = [each["null"] + 2 * each["null_deviation"] for each in found]
        axes.fill_between(places, low, high, color=colour, alpha=0.25, linewidth=0)
        axes.plot(
            places, [each["null"] for each in found], color=colour, linestyle=":", label=f"{name}: columns permuted"
        )
    for name, style in (("embedding", "--"), ("random keys", "-.")):
        value = coherence[name]["scaled"][measure]["value"]
        axes.axhline(value, color=GREY, linestyle=style, linewidth=1, label=f"{name}, scaled")
    axes.set_xticks(list(places))


def draw_outliers(results: list[dict[str, Any]]) -> None:
    """Coefficients that stand out, by layer (Fig. 6b)."""
    panels = {
        "beyond_all": "keys beyond mean + 6 deviations of |c|,\nof all layers together; a token",
        "beyond_layer": "the same, of the layer",
        "half_energy": "keys that hold half of $\\sum c^2$, a token",
    }
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 3), layout="constrained")
        row = figure.subplots(1, len(panels))
        for axes, (name, title) in zip(row, panels.items(), strict=True):
            for each, colour in zip(results, (BLUE, RED), strict=False):
                for how, style, label in (("mean", "-", "tokens alike"), ("weighted_mean", ":", "by occurrence")):
                    values = [layer[name][how] for layer in each["outliers"]]
                    axes.plot(values, style, color=colour, marker="o", markersize=3, label=f"{each['model']}, {label}")
            axes.set_ylim(bottom=0)
            axes.set_xticks(range(len(results[0]["outliers"])))
            axes.set_xlabel("layer")
            axes.set_title(title, fontsize=9)
        handles, labels = row[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        save(figure, "findings-outliers.png")


def draw_pair(results: list[dict[str, Any]], name: str, panels: Sequence[tuple[Panel, str]]) -> None:
    """Two panels beside each other for each model, legends below; titles take entries of a model's results."""
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 3.4 * len(results) + 0.6), layout="constrained")
        rows = figure.subplots(len(results), 2, squeeze=False, sharey="col")
        for row, each in zip(rows, results, strict=True):
            for axes, (panel, title) in zip(row, panels, strict=True):
                panel(axes, each)
                axes.set_title(title.format(**each), fontsize=9)
        for axes in rows[-1]:
            axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.45), ncols=2)
        save(figure, name)


def draw_sharing(results: list[dict[str, Any]]) -> None:
    """Keys in common, and pairs told apart by cosine, with their controls."""
    jaccard = (jaccard_panel, "{model}: share of the top {top_keys} keys in common")
    auroc = (auroc_panel, "{model}: pairs of a category told from others (AUROC)")
    draw_pair(results, "findings-sharing.png", (jaccard, auroc))


def sharing_names(sharing: dict[str, Any]) -> tuple[list[str], list[str]]:
    others = [
        name
        for name in ("embedding", "random keys", "untrained", "dense layer 0", "dense embedding", "co-occurrence")
        if name in sharing
    ]
    layers = layers_of(sharing)
    return [*layers, *others], [*(name.removeprefix("layer ") for name in layers), *others]


def jaccard_panel(axes: Axes, results: dict[str, Any]) -> None:
    sharing = results["sharing"]
    names, shown = sharing_names(sharing)
    series = {
        "one category": (BLUE, lambda each: each["jaccard"]),
        "one category, strings not alike": (SKY, lambda each: each["jaccard_dissimilar"]),
        "same frequency and kind": (ORANGE, lambda each: each["jaccard_matched"]["frequency and kind"]),
        "same frequency": (YELLOW, lambda each: each["jaccard_matched"]["frequency"]),
    }
    for i, (label, (colour, of)) in enumerate(series.items()):
        bars(
            axes,
            [of(sharing[name]["scaled"]) for name in names],
            offset=i,
            count=len(series),
            colour=colour,
            label=label,
        )
    name_places(axes, shown)


def auroc_panel(axes: Axes, results: dict[str, Any]) -> None:
    sharing = results["sharing"]
    names, shown = sharing_names(sharing)
    series = {
        "all pairs": (BLUE, "scaled", "auroc"),
        "strings not alike": (SKY, "scaled", "auroc_dissimilar"),
        "one kind (case)": (GREEN, "scaled", "auroc_same_kind"),
        "all pairs, raw": (ORANGE, "raw", "auroc"),
    }
    for i, (label, (colour, variant, measure)) in enumerate(series.items()):
        found = [sharing[name][variant][measure] for name in names]
        bars(axes, found, offset=i, count=len(series), colour=colour, label=label)
    axes.axhline(0.5, color="black", linestyle=":", linewidth=1, label="categories permuted")
    axes.set_ylim(0.45, 1.0)
    name_places(axes, shown)


def draw_meaning(results: list[dict[str, Any]]) -> None:
    """Intruders found in clusters, and keys that stand for categories, with their controls and nulls."""
    intruders = (intruder_panel, "{model}: intruders found by co-occurrence")
    keys = (key_panel, "{model}: score of categories, each by its best key")
    draw_pair(results, "findings-meaning.png", (intruders, keys))


def intruder_panel(axes: Axes, results: dict[str, Any]) -> None:
    intruders = results["intruders"]
    names, shown = sharing_names(intruders)
    names, shown = [*names, "word lists"], [*shown, "word lists"]
    series = {
        "clusters": (BLUE, "clusters", "accuracy"),
        "clusters by their tokens": (SKY, "clusters", "by_token"),
        "labels permuted": (GREY, "permuted", "accuracy"),
    }
    for i, (label, (colour, which, how)) in enumerate(series.items()):
        found = [intruders[name][which][how] for name in names]
        bars(axes, found, offset=i, count=len(series), colour=colour, label=label)
    axes.axhline(1 / 6, color="black", linestyle=":", linewidth=1, label="chance")
    axes.set_ylim(0, 1)
    name_places(axes, shown)


def key_panel(axes: Axes, results: dict[str, Any]) -> None:
    names, shown = sharing_names(results["keys, word lists"])
    for i, (source, colour) in enumerate((("word lists", BLUE), ("WordNet", ORANGE))):
        found = [results[f"keys, {source}"][name]["1"] for name in names]
        bars(axes, [each["categories"] for each in found], offset=i, count=2, colour=colour, label=f"of {source}")
        places = [place + (i - 0.5) * 0.4 for place in range(len(names))]
        label = "tokens permuted" if i else None
        axes.plot(places, [each["categories_null"] for each in found], "_", color="black", markersize=7, label=label)
    name_places(axes, shown)


def name_places(axes: Axes, shown: list[str]) -> None:
    axes.set_xticks(range(len(shown)), shown, fontsize=8)
    for label, name in zip(axes.get_xticklabels(), shown, strict=True):
        if not name.isdigit():
            label.set(rotation=35, ha="right", rotation_mode="anchor")
    axes.set_xlabel("layer, then controls")


def bars(axes: Axes, found: list[dict[str, float]], *, offset: int, count: int, colour: str, label: str) -> None:
    width = 0.8 / count
    places = [i + (offset - (count - 1) / 2) * width for i in range(len(found))]
    values = [each["value"] for each in found]
    spread = [[each["value"] - each["low"] for each in found], [each["high"] - each["value"] for each in found]]
    spread = [[max(0.0, reach) for reach in side] for side in spread]
    axes.bar(places, values, width, color=colour, label=label, yerr=spread, error_kw={"linewidth": 0.6})


def draw_map(checkpoint: Checkpoint, *, counts_of: Path) -> None:
    """Tokens by the keys of layer 0, and by the embedding (Fig. 5): their kinds, and the most coherent clusters."""
    model = checkpoint.load().float()
    size = model.config.vocab_size
    counts = token_counts(TokenDataset.open(counts_of).train, vocab_size=size)
    vocabulary = Vocabulary.of(checkpoint.tokenizer(), vocab_size=size, counts=counts)
    kept = vocabulary.mask.nonzero()[:, 0]
    spaces = {
        "keys of layer 0": TokenMemory(model).coefficients(kept, layer=0),
        "embedding": model.embed(kept).detach(),
    }
    with rc_context({**STYLE, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure = Figure(figsize=(13, 13.4), layout="constrained")
        rows = figure.subplots(2, 2)
        for row, (name, points) in zip(rows, spaces.items(), strict=True):
            scaled = robust_scale(points)
            plane = tsne(scaled)
            draw_kinds(row[0], plane, kinds=[vocabulary.kind[i] for i in kept.tolist()])
            draw_clusters(row[1], plane, scaled=scaled, shown=[vocabulary.shown[i] for i in kept.tolist()])
            row[0].set_title(f"{checkpoint.path.name}, {name}: kinds of tokens")
            row[1].set_title(f"{checkpoint.path.name}, {name}: the 24 most coherent clusters")
        figure.legend(
            *rows[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, markerscale=6
        )
        save(figure, f"findings-map-{checkpoint.path.name}.png", dpi=100)


def draw_kinds(axes: Axes, plane: Tensor, *, kinds: list[str]) -> None:
    for label, (members, colour) in GROUPS.items():
        chosen = torch.tensor([kind in members for kind in kinds])
        axes.scatter(*plane[chosen].T.numpy(), s=3, color=colour, linewidths=0, label=label, rasterized=True)
    axes.set_xticks([])
    axes.set_yticks([])


def draw_clusters(axes: Axes, plane: Tensor, *, scaled: Tensor, shown: list[str], named: int = 24) -> None:
    found = kmeans(scaled, count=100, spherical=False, restarts=3)
    facts = cluster_facts(scaled, found)
    order = [i for i in facts.cohesion.argsort(descending=True).tolist() if facts.size[i] > 10][:named]
    rest = ~torch.isin(found.labels, torch.tensor(order))
    axes.scatter(*plane[rest].T.numpy(), s=2, color="#dddddd", linewidths=0, rasterized=True)
    palette = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)
    taken: list[Tensor] = []
    room = (plane.amax(dim=0) - plane.amin(dim=0)) * torch.tensor([0.16, 0.02])
    for i, cluster in enumerate(order):
        members = plane[found.labels == cluster]
        axes.scatter(*members.T.numpy(), s=5, color=palette[i % len(palette)], linewidths=0, rasterized=True)
        middle = plane[facts.medoids[cluster]].median(dim=0).values
        if any(bool(((middle - other).abs() < room).all()) for other in taken):
            continue
        taken.append(middle)
        text = " ".join(shown[place].replace("\N{OPEN BOX}", "") for place in facts.medoids[cluster][:3]).replace(
            "$", "\\$"
        )
        axes.annotate(
            text,
            middle.tolist(),
            fontsize=7,
            ha="center",
            bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75},
        )
    axes.set_xticks([])
    axes.set_yticks([])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--map", type=Path, help="checkpoint whose tokens are drawn")
    parser.add_argument("--counts", type=Path, help="prepared folder whose tokens are counted, for the map")
    parser.add_argument("--results", type=Path, nargs="+", help="by default all that are committed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.map:
        if not args.counts:
            parser.error("--map needs --counts")
        draw_map(Checkpoint.open(args.map), counts_of=args.counts)
        return
    files = args.results or sorted((ROOT / "benchmarks" / "results").glob("findings_*.json"), reverse=True)
    results = [json.loads(file.read_text()) for file in files]
    draw_coherence(results)
    draw_outliers(results)
    draw_sharing(results)
    draw_meaning(results)


if __name__ == "__main__":
    main()
