"""The paper's claims, each with its number, ours and a verdict that follows from ours by a stated rule."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator

from flexmemory.reproduce.found import Entry, Found
from flexmemory.reproduce.recall import recall_claims
from flexmemory.reproduce.verdict import Claim, percent, verdict_of

PAPER_COST = {
    "base": {"ms_per_token": 21.50, "peak_bytes": 9.541}, "flex1": {"ms_per_token": 18.75, "peak_bytes": 7.025},
    "flex2": {"ms_per_token": 20.28, "peak_bytes": 7.409}, "flex3": {"ms_per_token": 21.47, "peak_bytes": 7.825},
    "memory": {"ms_per_token": 14.42, "peak_bytes": 6.041},
}  # fmt: skip
"""Table 6: milliseconds and gigabytes, on one A100 in bf16."""


def claims(found: Found) -> list[Claim]:
    """All that the results say something of."""
    makers = (
        _totals_and_active, _more_is_better, _gap_closes, _alpha, recall_claims, _layers, _base_layers,
        _pruning, _bits, _ranks, _spectra, _clusters, _outliers, _cost,
    )  # fmt: skip
    return [claim for make in makers for claim in make(found)]


def _pairs(found: Found, first: str, second: str) -> list[tuple[str, Entry, Entry]]:
    """Both variants at each size at which there are both."""
    pairs = ((size, found.run(size, first), found.run(size, second)) for size in found.sizes)
    return [(size, one, other) for size, one, other in pairs if one is not None and other is not None]


def _compared(found: Found, variant: str, base: str) -> tuple[str, list[float]]:
    """Changes of perplexity from `base` to `variant`, said and as numbers."""
    changes = [found.ppl(one) / found.ppl(other) - 1 for _, one, other in _pairs(found, variant, base)]
    sizes = [size for size, _, _ in _pairs(found, variant, base)]
    said = ", ".join(f"{percent(change)} ({size})" for change, size in zip(changes, sizes, strict=True))
    return said, changes


def _noise(found: Found) -> float:
    """Two standard deviations of a difference between two runs, in nats."""
    return 2 * math.sqrt(2) * (found.seed_deviation() or 0.0)


def _against(found: Found, variant: str, base: str, *, claim: str, paper: str, ahead: bool, source: str) -> Claim:
    """Whether a variant is ahead of a base, or behind, at every size."""
    said, changes = _compared(found, variant, base)
    gains = [-math.log1p(change) if ahead else math.log1p(change) for change in changes]
    return Claim(
        source=source, claim=claim, paper=paper, ours=said,
        verdict=verdict_of([gain > 0 for gain in gains], [gain > _noise(found) for gain in gains]),
        rule=f"{'ahead' if ahead else 'behind'} at every size by more than two deviations between seeds",
    )  # fmt: skip


def _totals_and_active(found: Found) -> Iterator[Claim]:
    where, curves = "perplexity by parameters", "Fig. 9, 10"
    yield _against(
        found, "memory", "base", claim="MemoryLLM is behind the base at equal total parameters and tokens",
        paper="+11.9 % perplexity (737M, C4, 50B tokens)", ahead=False, source=where,
    )  # fmt: skip
    yield _against(
        found, "memory", "base-as-memory", claim="MemoryLLM is ahead of a base with as many active parameters",
        paper="-4.8 % (245M active against a base of 265M)", ahead=True, source=where,
    )  # fmt: skip
    said, changes = _compared(found, "flex3", "base")
    yield Claim(
        source=curves, claim="Flex-3 nearly closes the gap to the base at equal total parameters",
        paper="close to base-1208M", ours=said,
        verdict=verdict_of([c < 0.02 for c in changes], [True]), rule="at most 2 % behind at every size",
    )  # fmt: skip
    yield _against(
        found, "flex3", "base-as-flex3", claim="Flex-3 is ahead of a base with as many active parameters",
        paper="704M active ahead of base-737M", ahead=True, source=curves,
    )  # fmt: skip


def _more_is_better(found: Found) -> Iterator[Claim]:
    said, signs, strong = [], [], []
    for size in found.sizes:
        runs = [found.run(size, variant) for variant in ("memory", "flex1", "flex2", "flex3")]
        ppls = [found.ppl(run) for run in runs if run is not None]
        if len(ppls) == len(runs):
            said.append(" > ".join(f"{ppl:.1f}" for ppl in ppls) + f" ({size})")
            steps = [math.log(a / b) for a, b in itertools.pairwise(ppls)]
            signs += [step > -_noise(found) for step in steps]
            strong += [step > 0 for step in steps]
    yield Claim(
        source="Sec. 4.2, Fig. 9", claim="A larger FFN-C is better: memory, flex-1, flex-2, flex-3",
        paper="in this order", ours="; ".join(said), verdict=verdict_of(signs, strong),
        rule="perplexity falls at each step",
    )  # fmt: skip


def _gap_closes(found: Found) -> Iterator[Claim]:
    for variant in ("memory", "flex3"):
        said, gaps = [], []
        for size in found.sizes:
            base = {run["tokens"]: found.ppl(run) for run in found.budgets(size, "base")}
            other = {run["tokens"]: found.ppl(run) for run in found.budgets(size, variant)}
            both = sorted(base.keys() & other.keys())
            if len(both) > 1:
                gaps.append([other[tokens] / base[tokens] - 1 for tokens in both])
                steps = (f"{percent(gap)} at {t / 1e6:.3g}M" for gap, t in zip(gaps[-1], both, strict=True))
                said.append(", ".join(steps) + f" ({size})")
        yield Claim(
            source="Fig. 9, 10", claim=f"The gap from the base to {variant} closes with tokens",
            paper="closes over 25 to 150B tokens", ours="; ".join(said),
            verdict=verdict_of([gap[-1] < gap[0] for gap in gaps], [gap[-1] < gap[0] - 0.01 for gap in gaps]),
            rule="smaller at the most tokens than at the fewest; below 0 the base is behind",
        )  # fmt: skip


def _rises(found: Found, variant: str, alpha: float, text: str | None = None) -> list[tuple[str, float]]:
    rises = []
    for size in found.sizes:
        whole, scaled = found.probe(size, variant), found.probe(size, variant, alpha=alpha)
        if whole is not None and scaled is not None:
            rises.append((size, found.ppl(scaled, text) / found.ppl(whole, text) - 1))
    return rises


def _alpha(found: Found) -> Iterator[Claim]:
    base, memory = dict(_rises(found, "base", 0.5)), dict(_rises(found, "memory", 0.5))
    few = {variant: dict(_rises(found, variant, 0.2)) for variant in ("base", "memory")}
    sizes = [size for size in base if all(size in rises for rises in (memory, few["base"], few["memory"]))]
    yield Claim(
        source="Table 1, Fig. 7", claim="FFNs scaled by alpha: the base degrades more than MemoryLLM",
        paper="base worse at every alpha",
        ours="; ".join(
            f"at 0.5 base {percent(base[s])}, memory {percent(memory[s])}; at 0.2 {1 + few['base'][s]:.3g} and "
            f"{1 + few['memory'][s]:.3g} times ({s})"
            for s in sizes
        ),
        verdict=verdict_of([base[s] > memory[s] for s in sizes], [base[s] > 1.1 * memory[s] for s in sizes]),
        rule="by the rise of held-out perplexity at 0.5; strong if by a tenth",
    )  # fmt: skip


def _layers(found: Found) -> Iterator[Claim]:
    said, signs, strong = [], [], []
    for size in found.sizes:
        whole, layers = found.probe(size, "memory"), found.layers(size, "memory")
        if whole is not None and len(layers) > 3:
            rises = [found.ppl(entry) / found.ppl(whole) - 1 for entry in layers]
            early, rest = max(rises[: max(2, len(rises) // 4)]), sorted(rises[max(2, len(rises) // 4) :])
            said.append(
                f"first quarter up to {percent(early)}, middle {percent(statistics.median(rest))}, "
                f"last {percent(rises[-1])} ({size})"
            )
            signs.append(early > 2 * statistics.median(rest))
            strong.append(rises[-1] < 2 * statistics.median(rest))
    yield Claim(
        source="Fig. 4, 12", claim="Of MemoryLLM's layers only the first few matter; the middle is redundant",
        paper="a few early layers", ours="; ".join(said), verdict=verdict_of(signs, strong),
        rule="leaving out an early layer costs twice the median of the others; strong if the last one does not",
    )  # fmt: skip


def _base_layers(found: Found) -> Iterator[Claim]:
    said, signs = [], []
    for size in found.sizes:
        whole, layers = found.probe(size, "base"), found.layers(size, "base")
        if whole is not None and len(layers) > 3:
            rises = [found.ppl(entry) / found.ppl(whole) - 1 for entry in layers]
            middle = statistics.median(rises[1:-1])
            said.append(f"first {percent(rises[0])}, middle {percent(middle)}, last {percent(rises[-1])} ({size})")
            signs.append(rises[0] > 2 * middle and rises[-1] > 2 * middle)
    yield Claim(
        source="Fig. 4, 12", claim="The base shows a U: its first and last layers matter", paper="U shape",
        ours="; ".join(said), verdict=verdict_of(signs, signs), rule="both cost twice the median of the middle",
    )  # fmt: skip


def _pruning(found: Found) -> Iterator[Claim]:
    for variants, name in ((("memory",), "MemoryLLM"), (("flex1", "flex2", "flex3"), "Flex-MemoryLLM")):
        said, signs, strong = [], [], []
        for size in found.sizes:
            for variant in variants:
                run = found.run(size, variant)
                pruned = [e for e in found.parts["pruning"].values() if (e["size"], e["target"]) == (size, variant)]
                if run is not None and pruned:
                    best = min(pruned, key=found.ppl)
                    gain = math.log(found.ppl(best) / found.ppl(run))
                    said.append(f"{size}-{variant} {found.ppl(run):.1f}, {best['method']} {found.ppl(best):.1f}")
                    signs.append(gain > 0)
                    strong.append(gain > _noise(found))
        yield Claim(
            source="Fig. 11", claim=f"{name} beats the base pruned to as many active parameters",
            paper="by magnitude, Wanda and SparseGPT", ours="; ".join(said), verdict=verdict_of(signs, strong),
            rule="perplexity below the best of the three methods at every match",
        )  # fmt: skip


def _coded(found: Found, size: str, variant: str, codec: str) -> Entry | None:
    return found.parts["compression"].get(f"{size}-{variant} {codec}")


def _coded_rise(found: Found, codec: str) -> dict[str, float]:
    rises = {}
    for size in found.sizes:
        plain, coded = _coded(found, size, "memory", "bf16"), _coded(found, size, "memory", codec)
        if plain is not None and coded is not None:
            rises[size] = found.ppl(coded) / found.ppl(plain) - 1
    return rises


def _bits(found: Found) -> Iterator[Claim]:
    for codec, paper, most in (("int8", "+0.00 %", 0.0005), ("int4", "+0.4 %", 0.008)):
        rises = _coded_rise(found, codec)
        yield Claim(
            source="Table 7", claim=f"Rows in {codec[3:]} bits cost next to nothing", paper=paper,
            ours=", ".join(f"{100 * rise:+.3f} % ({size})" for size, rise in rises.items()),
            verdict=verdict_of([rise < most for rise in rises.values()], [True]),
            rule=f"a rise below {100 * most:g} % at every size; one scale for a token and layer",
        )  # fmt: skip


def _ranks(found: Found) -> Iterator[Claim]:
    rises: dict[str, float] = {}
    for size in found.sizes:
        ranks = [entry["codec"] for entry in found.parts["compression"].values() if _is_rank(entry, size)]
        if ranks:
            lowest = min(ranks, key=lambda codec: int(codec.removeprefix("svd")))
            rises[size] = _coded_rise(found, lowest)[size]
    yield Claim(
        source="Table 8", claim="Half the rank by SVD halves the bytes for a few percent", paper="+3.5 %",
        ours=", ".join(f"{percent(rise)} ({size})" for size, rise in rises.items()),
        verdict=verdict_of([rise < 0.07 for rise in rises.values()], [True]),
        rule="a rise below twice the paper's at every size",
    )  # fmt: skip


def _is_rank(entry: Entry, size: str) -> bool:
    return entry["size"] == size and entry["variant"] == "memory" and entry.get("codec", "").startswith("svd")


def _spectra(found: Found) -> Iterator[Claim]:
    said, signs, strong = [], [], []
    for size in found.sizes:
        entry = found.parts["compression"].get(f"{size}-memory spectra")
        if entry is not None:
            width = len(entry["singular_values"][0])
            shares = [rank / width for rank in entry["rank_of_90_percent"]]
            middle = statistics.median(shares)
            said.append(f"90 % of the energy in {shares[-1]:.0%} of the rank, median layer {middle:.0%} ({size})")
            signs.append(shares[-1] < middle)
            strong.append(shares[-1] == min(shares))
    yield Claim(
        source="Fig. 13", claim="Singular values of the tables are heavy-tailed, most so in the last layers",
        paper="last layers most", ours="; ".join(said), verdict=verdict_of(signs, strong),
        rule="the last layer needs less rank than the median layer; strong if least of all",
    )  # fmt: skip


def _clusters(found: Found) -> Iterator[Claim]:
    said, signs, strong = [], [], []
    for name, entry in found.parts["cells"].items():
        if entry["variant"] == "memory":
            gaps = [layer["cos_gap"] for layer in entry["layers"]]
            nulls = [layer["null_cos_gap"] for layer in entry["layers"]]
            middle = min(gaps[1:-1])
            said.append(f"first {gaps[0]:.3f}, least {middle:.3f}, last {gaps[-1]:.3f}, null {max(nulls):.3f} ({name})")
            signs.append(all(gap > 2 * null for gap, null in zip(gaps, nulls, strict=True)))
            strong.append(middle > 0.8 * min(gaps[0], gaps[-1]))
    yield Claim(
        source="Fig. 6a", claim="Tokens cluster by the cells they use in all layers, with a slight dip in the middle",
        paper="high throughout", ours="; ".join(said), verdict=verdict_of(signs, strong),
        rule="cosine within less between clusters above twice its null; strong if the dip is below a fifth",
    )  # fmt: skip


def _outliers(found: Found) -> Iterator[Claim]:
    said, signs = [], []
    for name, entry in found.parts["cells"].items():
        if entry["variant"] == "memory":
            counts = [layer["outliers_of_all"] for layer in entry["layers"]]
            own = [layer["outliers_of_layer"] for layer in entry["layers"]]
            third = max(1, len(counts) // 3)
            middle, last = statistics.mean(counts[third:-third]), statistics.mean(counts[-third:])
            said.append(
                f"middle {middle:.2f}, last third {last:.2f}; by each layer's own threshold "
                f"{statistics.mean(own[third:-third]):.2f} and {statistics.mean(own[-third:]):.2f} ({name})"
            )
            signs.append(last > middle)
    yield Claim(
        source="Fig. 6b", claim="Outlier coefficients of a token increase toward the last layers", paper="rise",
        ours="; ".join(said), verdict=verdict_of(signs, [False]),
        rule="more beyond one threshold for all layers in the last third; each layer's own says something else",
    )  # fmt: skip


def _cost(found: Found) -> Iterator[Claim]:
    cost = {entry["variant"]: entry for entry in found.cost}
    if not {"base", "memory"} <= cost.keys():
        return
    order = [variant for variant in ("memory", "flex1", "flex2", "flex3", "base") if variant in cost]
    for key, unit, what in (("ms_per_token", 1.0, "time, ms"), ("peak_bytes", 1e9, "memory, GB")):
        figures = [cost[variant][key] / unit for variant in order]
        steps = [b > a for a, b in itertools.pairwise(figures)]
        yield Claim(
            source="Table 6", claim=f"A token of memory, flex-1 to flex-3 and base costs more in this order: {what}",
            paper=" < ".join(f"{PAPER_COST[variant][key]:g}" for variant in order),
            ours=" < ".join(f"{figure:.3g}" for figure in figures) if all(steps) else ", ".join(
                f"{variant} {figure:.3g}" for variant, figure in zip(order, figures, strict=True)
            ),
            verdict=verdict_of(steps, steps), rule="in this order at the 1B shape, by the engine, rows in host memory",
        )  # fmt: skip
