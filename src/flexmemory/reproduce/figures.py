"""The study's plots, one for each table or figure of the paper that has one; matplotlib is imported where it draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexmemory.reproduce.found import Entry, Found
from flexmemory.reproduce.probes import ALPHAS
from flexmemory.train.plot import COLOURS, MARKERS

VARIANTS = ("base", "memory", "flex1", "flex2", "flex3", "base-as-memory", "base-as-flex3")
STYLES = dict(zip(VARIANTS, zip(COLOURS, "os^Dvp*", strict=True), strict=True))
"""Colour and marker, the same in every plot."""


def draw(found: Found, folder: Path) -> dict[str, Path]:
    """Write all that there are results for; the images by name."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    makers: dict[str, tuple[Callable[[Found, Any], None], str]] = {
        "quality": (_quality, "quality"),
        "alpha": (_alpha, "probes"),
        "layers": (_layers, "probes"),
        "pruning": (_pruning, "pruning"),
        "compression": (_compression, "compression"),
        "cells": (_cells, "cells"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    images = {}
    for name, (make, part) in makers.items():
        if found.parts[part]:
            with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
                figure = Figure(figsize=(9.0, 3.6), layout="constrained")
                axes = figure.subplots(1, 2)
                make(found, axes)
                for each in axes:
                    each.grid(visible=True, color="0.9", linewidth=0.7)
                    each.set_axisbelow(True)
                images[name] = folder / f"study-{name}.png"
                figure.savefig(images[name], dpi=130)
    return images


def _legend(axes: Any, fontsize: int = 9) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=fontsize)


def _million(entry: Entry) -> float:
    return entry["parameters"]["active"] / 1e6


def _quality(found: Found, axes: Any) -> None:
    left, right = axes
    for variant, (colour, marker) in STYLES.items():
        runs = [run for size in found.sizes if (run := found.run(size, variant)) is not None]
        if runs:
            x, y = [_million(run) for run in runs], [found.ppl(run) for run in runs]
            left.plot(x, y, color=colour, marker=marker, linestyle=":", linewidth=0.8, label=variant)
    tokens = " and ".join(sorted({f"{found.tokens(size) / 1e6:.3g}M" for size in found.sizes}))
    left.set(xscale="log", yscale="log", xlabel="active parameters, millions", ylabel="held-out perplexity")
    left.set_title(f"{tokens} tokens")
    _legend(left, fontsize=7)
    for number, size in enumerate(found.sizes):
        for variant in ("base", "memory", "flex3"):
            runs = found.budgets(size, variant)
            if len(runs) > 1:
                colour, marker = STYLES[variant]
                x, y = [run["tokens"] / 1e6 for run in runs], [found.ppl(run) for run in runs]
                right.plot(x, y, color=colour, marker=marker, linestyle="-:"[number % 2], label=f"{size} {variant}")
    right.set(xscale="log", yscale="log", xlabel="training tokens, millions", ylabel="held-out perplexity")
    _legend(right, fontsize=7)
    _plain_ticks(left, right)


def _plain_ticks(*axes: Any) -> None:
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    for each in axes:
        for axis in (each.xaxis, each.yaxis):
            axis.set_major_formatter(ScalarFormatter())
            axis.set_minor_formatter(NullFormatter())
        x, y = each.get_xlim(), each.get_ylim()
        each.set_xticks(_ticks(*x))
        each.set_yticks(_ticks(*y))
        each.set_xlim(x)
        each.set_ylim(y)


def _ticks(low: float, high: float) -> list[float]:
    steps = (1, 1.5, 2, 3, 4, 5, 6, 7, 8)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [
        float(round(step * 10**decade, 6)) for decade in decades for step in steps if low <= step * 10**decade <= high
    ]


def _alpha(found: Found, axes: Any) -> None:
    for each, size in zip(axes, (found.sizes * 2)[:2], strict=True):
        for variant in ("base", "memory", "flex3"):
            whole = found.probe(size, variant)
            probes = [(alpha, found.probe(size, variant, alpha=alpha)) for alpha in ALPHAS]
            points = [(alpha, found.ppl(entry)) for alpha, entry in probes if entry is not None]
            if whole is not None and len(points) > 1:
                colour, marker = STYLES[variant]
                ratios = [ppl / found.ppl(whole) for _, ppl in points]
                each.plot([alpha for alpha, _ in points], ratios, color=colour, marker=marker, label=variant)
        each.set(yscale="log", xlabel="alpha", ylabel="perplexity, to alpha 1", title=size)
        each.invert_xaxis()
        _legend(each)


def _layers(found: Found, axes: Any) -> None:
    for each, size in zip(axes, (found.sizes * 2)[:2], strict=True):
        for variant in ("base", "memory", "flex3"):
            whole, layers = found.probe(size, variant), found.layers(size, variant)
            if whole is not None and layers:
                colour, marker = STYLES[variant]
                rises = [100 * (found.ppl(entry) / found.ppl(whole) - 1) for entry in layers]
                each.plot(range(len(rises)), rises, color=colour, marker=marker, label=variant)
        each.set(yscale="log", xlabel="layer left out", ylabel="rise of perplexity, %", title=size)
        _legend(each)


def _pruning(found: Found, axes: Any) -> None:
    for each, size in zip(axes, (found.sizes * 2)[:2], strict=True):
        pruned = [entry for entry in found.parts["pruning"].values() if entry["size"] == size]
        for method, style in (("magnitude", ":"), ("wanda", "--"), ("sparsegpt", "-")):
            mine = sorted((e for e in pruned if e["method"] == method), key=lambda e: e["active"])
            plain = [e for e in mine if e["target"] != "2:4"]
            if plain:
                x, y = [e["active"] / 1e6 for e in plain], [found.ppl(e) for e in plain]
                each.plot(x, y, color="0.35", linestyle=style, marker=".", label=f"base, {method}")
            patterned = [e for e in mine if e["target"] == "2:4"]
            each.plot(
                [e["active"] / 1e6 for e in patterned], [found.ppl(e) for e in patterned], color="0.35", marker="x",
                linestyle="", label="2:4, same order" if method == "sparsegpt" else None,
            )  # fmt: skip
        for variant in ("base", "memory", "flex1", "flex2", "flex3"):
            run = found.run(size, variant)
            if run is not None:
                colour, marker = STYLES[variant]
                each.plot([_million(run)], [found.ppl(run)], color=colour, marker=marker, linestyle="", label=variant)
        each.set(xlabel="active parameters, millions", ylabel="held-out perplexity", title=size)
        _legend(each, fontsize=7)


def _compression(found: Found, axes: Any) -> None:
    left, right = axes
    number = 0
    for size in found.sizes:
        for variant in ("memory", "flex3"):
            mine = [e for e in found.parts["compression"].values() if (e["size"], e["variant"]) == (size, variant)]
            plain = next((e for e in mine if e.get("codec") == "bf16"), None)
            ranks = [e for e in mine if e.get("codec", "").startswith("svd")]
            spectra = next((e for e in mine if "singular_values" in e), None)
            colour, marker = COLOURS[number], MARKERS[number]
            number += 1
            if plain is not None and ranks:
                x = [e["bf16_bytes"] / e["bytes"] for e in ranks]
                y = [100 * (found.ppl(e) / found.ppl(plain) - 1) for e in ranks]
                left.plot(x, y, color=colour, marker=marker, label=f"{size} {variant}")
            if spectra is not None and variant == "memory":
                width = len(spectra["singular_values"][0])
                shares = [rank / width for rank in spectra["rank_of_90_percent"]]
                x = [layer / (len(shares) - 1) for layer in range(len(shares))]
                right.plot(x, shares, color=colour, marker=marker, label=f"{size} {variant}")
    left.set(xlabel="times smaller than bf16", ylabel="rise of perplexity, %", title="rows of lower rank, by SVD")
    right.set(xlabel="depth", ylabel="share of the rank", title="rank that holds 90 % of the energy", ylim=(0, None))
    _legend(left)
    _legend(right)


def _cells(found: Found, axes: Any) -> None:
    left, right = axes
    for number, (name, entry) in enumerate(found.parts["cells"].items()):
        layers, colour = entry["layers"], COLOURS[number]
        depth = [layer / (len(layers) - 1) for layer in range(len(layers))]
        left.plot(depth, [layer["cos_gap"] for layer in layers], color=colour, marker=MARKERS[number], label=name)
        left.plot(depth, [layer["null_cos_gap"] for layer in layers], color=colour, linestyle=":")
        counts = [layer["outliers_of_all"] for layer in layers]
        right.plot(depth, counts, color=colour, marker=MARKERS[number], label=name)
        right.plot(depth, [layer["outliers_of_layer"] for layer in layers], color=colour, linestyle=":")
    left.set(
        xlabel="depth", ylabel="cosine within less between", title="clusters; dotted: columns permuted", ylim=(0, None)
    )
    right.set(
        xlabel="depth", ylabel="outliers of a token", title="outliers; dotted: each layer's threshold", ylim=(0, None)
    )
    _legend(left)
    _legend(right)
