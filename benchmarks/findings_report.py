"""Write the tables of docs/findings.md from benchmarks/results/findings_*.json; `--check` only compares."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "findings.md"
RESULTS = ROOT / "benchmarks" / "results"
MODELS = ("mini-memory", "mini-flex3")
CONTROLS = ("embedding", "random keys", "untrained", "dense layer 0", "dense embedding", "co-occurrence", "word lists")


def spaces(figures: dict[str, Any]) -> list[str]:
    """Layers in order, then controls."""
    layers = sorted((name for name in figures if name.startswith("layer ")), key=lambda name: int(name.split()[1]))
    return [*layers, *(name for name in CONTROLS if name in figures)]


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def source(results: dict[str, Any], part: str) -> str:
    """What was measured, and on what; where spaces were added later, on what those were."""
    runs = [run for run in results["runs"] if part in run["measured"]]
    said = []
    for number, run in enumerate(runs):
        where = run["provenance"]
        machine = where["gpu"] if run["device"] == "cuda" else where["cpu"]
        names = f"{', '.join(run['measured'][part])}: " if number else ""
        said.append(f"{names}{machine}, torch {where['torch']}, commit {where['commit']}")
    return (
        f"{results['model']}: {results['tokens']:,} tokens, without {results['mask_rule']} "
        f"({results['counted_tokens']:,} counted). {'; '.join(said)}."
    )


def interval(figures: dict[str, float], form: str) -> str:
    return f"{figures['value']:{form}} [{figures['low']:{form}}, {figures['high']:{form}}]"


def coherence_table(results: dict[str, Any]) -> str:
    """Each measure with columns scaled, and the first raw and weighted too, as value (null; z)."""
    columns = [
        ("cosine gap", "scaled", "cos_gap"),
        ("gap, raw", "raw", "cos_gap"),
        ("gap, by occurrence", "weighted", "cos_gap"),
        ("silhouette", "scaled", "silhouette"),
        ("variance between", "scaled", "evr"),
        ("graph", "scaled", "graph"),
        ("graph, raw", "raw", "graph"),
        ("seeds agree", "scaled", "stability"),
    ]
    others = [name for name in results["coherence"]["layer 0"] if name.endswith(" clusters")]
    columns += [(f"gap, {name}", name, "cos_gap") for name in others]

    def cell(figures: dict[str, Any]) -> str:
        z = "" if figures["z"] is None else f"; {figures['z']:+,.0f}"
        return f"{figures['value']:.3f} ({figures['null']:.3f}{z})"

    rows = [
        [name, *(cell(results["coherence"][name][variant][measure]) for _, variant, measure in columns)]
        for name in spaces(results["coherence"])
    ]
    note = f"{results['clusters']} clusters; in brackets the mean of {results['permutations']} nulls, and z."
    return f"{table(['', *(title for title, _, _ in columns)], rows)}\n\n{note} {source(results, 'coherence')}"


def outlier_table(results: dict[str, Any]) -> str:
    """Means over tokens; each alike, then by occurrence."""
    columns = {
        "beyond_all": "keys beyond 6 deviations, of all layers",
        "beyond_layer": "of the layer",
        "share_with_any": "tokens with one, of the layer",
        "half_energy": "keys that hold half",
        "participation": "participation ratio",
    }

    def cell(name: str, figures: dict[str, float]) -> str:
        form = ".0%" if name == "share_with_any" else ".2f"
        return f"{figures['mean']:{form}}, {figures['weighted_mean']:{form}}"

    rows = [
        [f"layer {layer}", f"{each['mean_size']:.3f}", *(cell(name, each[name]) for name in columns)]
        for layer, each in enumerate(results["outliers"])
    ]
    return f"{table(['', 'mean abs(c)', *columns.values()], rows)}\n\n{source(results, 'outliers')}"


def sharing_table(results: dict[str, Any]) -> str:
    """Keys in common, then pairs told apart."""

    rows = []
    for name in spaces(results["sharing"]):
        scaled, raw = results["sharing"][name]["scaled"], results["sharing"][name]["raw"]
        rows.append(
            [
                name,
                interval(scaled["jaccard"], ".1%"),
                interval(scaled["jaccard_dissimilar"], ".1%"),
                interval(scaled["jaccard_matched"]["frequency"], ".1%"),
                interval(scaled["jaccard_matched"]["frequency and kind"], ".1%"),
                interval(scaled["auroc"], ".3f"),
                interval(scaled["auroc_dissimilar"], ".3f"),
                interval(scaled["auroc_same_kind"], ".3f"),
                interval(raw["auroc"], ".3f"),
                f"{scaled['auroc_permuted']:.3f}",
            ]
        )
    heads = [
        "", "one category", "strings not alike", "same frequency", "and kind",
        "AUROC", "strings not alike", "one kind", "raw", "categories permuted",
    ]  # fmt: skip
    pairs = results["pairs"]
    unlike = pairs["same category, strings not alike"]
    note = (
        f"Share of the top {results['top_keys']} keys in common (of an embedding, of as large a share of its "
        f"coordinates), then AUROC; {len(results['categories'])} categories, {sum(results['categories'].values())} "
        f"tokens, {pairs['same category']:,} pairs of one category ({unlike:,} of strings not alike) among "
        f"{pairs['all']:,}; intervals of 95 % over categories."
    )
    return f"{table(heads, rows)}\n\n{note} {source(results, 'sharing')}"


def agreement_table(results: dict[str, Any]) -> str:
    """AMI of clusters with each set of classes."""
    first = results["sharing"]["layer 0"]["agreement"]
    heads = [
        "",
        *(f"{name} ({each['classes']} of {each['tokens']:,} tokens)" for name, each in first.items()),
        "permuted",
    ]
    rows = []
    for name in spaces(results["sharing"]):
        found = results["sharing"][name]["agreement"]
        furthest = max((each["permuted_ami"] for each in found.values()), key=abs)
        rows.append([name, *(f"{each['ami']:.3f}" for each in found.values()), f"{furthest:+.3f}"])
    note = "AMI; permuted: the furthest from 0 of the same with classes permuted."
    return f"{table(heads, rows)}\n\n{note} {source(results, 'sharing')}"


def cluster_table(results: dict[str, Any]) -> str:
    """Some clusters of layer 0, from the most coherent to the least."""
    rows = []
    for each in results["example_clusters"]:
        rows.append([quoted(each["medoids"]), f"{each['size']}", f"{each['cohesion']:.2f}"])
    return table(["tokens nearest to the centre", "tokens", "cohesion"], rows)


def intruder_table(results: dict[str, Any]) -> str:
    """How often the intruder is found in the clusters of each space."""
    rows = []
    for name in spaces(results["intruders"]):
        found, permuted = (results["intruders"][name][which] for which in ("clusters", "permuted"))
        shown = [interval(each, ".1%") for each in (found["accuracy"], found["by_token"], permuted["accuracy"])]
        rows.append([name, *shown, f"{found['clusters']}", f"{found['tests']:,}"])
    judge = results["judge"]
    note = (
        f"Chance is 16.7%. The judge: {judge['dimensions']} dimensions, of what stands within {judge['window']} tokens "
        f"in {judge['tokens']:,} tokens of text; it is asked about tokens that occur there {judge['least_seen']} times "
        f"or more. Intervals of 95 % over clusters."
    )
    heads = ["", "intruders found", "clusters by their tokens", "labels permuted", "clusters", "tests"]
    return f"{table(heads, rows)}\n\n{note} {source(results, 'intruders')}"


def key_table(results: dict[str, Any]) -> str:
    """How well categories fit their best keys and keys their best categories, beside permuted tokens."""
    lists = {name: results["categories"][name] for name in results["key_categories"]}
    sources = {"word lists": lists, "WordNet": results["wordnet"]}
    heads = [""]
    for source_name, sizes in sources.items():
        heads += [
            f"{source_name}: of a category",
            f"half, of {len(sizes)}",
            "of a key",
            "beyond 99 %",
            "in 5 n, of a key",
        ]
    rows = []
    for name in spaces(results["keys, word lists"]):
        cells = []
        for source_name in sources:
            first, five = (results[f"keys, {source_name}"][name][reach] for reach in ("1", "5"))
            cells += [
                f"{interval(first['categories'], '.1%')} ({first['categories_null']:.1%})",
                f"{first['categories_half']}",
                f"{first['keys']:.1%} ({first['keys_null']:.1%})",
                f"{first['keys_beyond_99']:.1%}",
                f"{five['keys']:.1%} ({five['keys_null']:.1%})",
            ]
        rows.append([name, *cells])
    sizes = [f"{name}: {len(each)} categories, {sum(each.values())} tokens" for name, each in sources.items()]
    note = (
        "Mean score over categories, each by its best key (of embeddings and co-occurrence: coordinate), with its "
        "interval of 95 % over categories; categories with a key that scores a half or more; mean score over keys, "
        "each by its best category; share of keys beyond 99 % of those of permuted tokens; mean over keys where a "
        f"category of n tokens is sought among 5 n. In brackets: tokens permuted. {'; '.join(sizes)}."
    )
    return f"{table(heads, rows)}\n\n{note} {source(results, 'keys, word lists')}"


def key_example_table(results: dict[str, Any]) -> str:
    """The key of layer 0 that fits each category best."""
    rows = [
        [
            each["category"],
            f"{'+' if each['sign'] > 0 else '-'}L0K{each['key']}",
            f"{each['score']:.0%}",
            quoted(each["tokens"]),
        ]
        for each in results["example_keys"]
    ]
    return table(["category", "key", "score", "its first tokens"], rows)


def quoted(tokens: list[str]) -> str:
    """Tokens as code, for a cell of a table."""
    shown = ", ".join(f"`{token}`" if "`" not in token else "backtick" for token in tokens)
    return shown.replace("|", "\\|")


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "coherence": coherence_table,
    "outliers": outlier_table,
    "sharing": sharing_table,
    "agreement": agreement_table,
    "clusters": cluster_table,
    "intruders": intruder_table,
    "keys": key_table,
    "key_examples": key_example_table,
}


def render(text: str, *, folder: Path = RESULTS) -> str:
    """`text` with every section made anew of the results in `folder`."""

    def section(match: re.Match[str]) -> str:
        path = folder / f"findings_{match[3]}.json"
        content = TABLES[match[2]](json.loads(path.read_text())) if path.exists() else "Not measured yet."
        return f"{match[1]}{content}\n{match[4]}"

    pattern = r"(<!-- (\w+) ([\w-]+): generated[^\n]*-->\n).*?(<!-- /\2 \3 -->)"
    return re.sub(pattern, section, text, flags=re.DOTALL)


def main() -> int:
    before = DOCUMENT.read_text()
    after = render(before)
    if "--check" in sys.argv:
        print("docs/findings.md agrees with its results" if before == after else "docs/findings.md is not up to date")
        return int(before != after)
    DOCUMENT.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
