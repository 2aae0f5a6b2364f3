"""Write the tables of docs/editing-evaluation.md from benchmarks/results/editing.json; `--check` only compares.

With `--draw`, also the picture.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "editing-evaluation.md"
RESULTS = ROOT / "benchmarks" / "results" / "editing.json"
PICTURE = ROOT / "docs" / "images" / "editing-sequence.png"
MODELS = {"memory": "MemoryLLM", "flex3": "Flex-3", "base": "dense"}
KINDS = {"1": "one token", "2": "two tokens"}
STYLES = {
    "memory row, gradient": ("#0072B2", "o"),
    "memory row, protected": ("#009E73", "D"),
    "memory rank one, exact C": ("#D55E00", "s"),
    "memory FT-L": ("#CC79A7", "^"),
    "base ROME": ("#E69F00", "v"),
    "base FT-L": ("#666666", "x"),
}


def percent(summary: dict[str, Any], name: str) -> str:
    """A share and its standard error in percent; nothing where it was not measured."""
    if name not in summary["means"]:
        return ""
    error = summary["stderrs"][name]
    shown = "" if error is None or math.isnan(error) else f" ± {100 * error:.1f}"
    return f"{100 * summary['means'][name]:.1f}{shown}"


def number(summary: dict[str, Any], name: str, form: str = ".3g") -> str:
    return format(summary["means"][name], form) if name in summary["means"] else ""


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def found(results: dict[str, Any], section: str) -> dict[str, Any]:
    """The models' figures of a section, in the order of `MODELS`."""
    return {name: results[section][name]["found"] for name in MODELS if name in results.get(section, {})}


def knowledge(results: dict[str, Any]) -> str:
    """What the models know."""
    names = {
        "known": "prompt",
        "paraphrase_before": "held-out wordings",
        "alias_before": "by alias",
        "inverse_before": "inverse",
        "two_hop_before": "two hops",
    }
    rows = [
        [f"{MODELS[model]}, {KINDS[kind]}", f"{summary['count']:,}", *(percent(summary, name) for name in names)]
        for model, kinds in found(results, "knowledge").items()
        for kind, summary in kinds.items()
    ]
    training = results["training"]
    losses = ", ".join(
        f"{MODELS[name]} {each['parameters'] / 1e6:.2f}M parameters, last training loss {each['loss']:.3f}"
        for name, each in training.items()
    )
    return table(["facts", *names.values()], rows) + f"\n\n{losses}.\n\n{where(results)}"


def _single(results: dict[str, Any], kind: str, columns: dict[str, Callable[[dict[str, Any]], str]]) -> str:
    rows = []
    for model, methods in found(results, "edits").items():
        for name, entry in methods.items():
            if kind in entry["figures"]:
                layers = entry.get("layers")
                label = name if name != "none" else "no edit"
                place = (
                    "" if not layers else f" ({layers[0]} to {layers[-1]})" if len(layers) > 1 else f" ({layers[0]})"
                )
                summary = entry["figures"][kind]
                rows.append([f"{MODELS[model]}: {label}{place}", *(make(summary) for make in columns.values())])
    return table(list(columns), rows)


def _shares(names: dict[str, str]) -> dict[str, Callable[[dict[str, Any]], str]]:
    return {head: (lambda summary, name=name: percent(summary, name)) for name, head in names.items()}


SUCCESS = {
    "ES": "ES",
    "PS": "PS",
    "NS": "NS",
    "score": "score",
    "exact": "exact",
    "paraphrase_right": "paraphrases exact",
    "same_subject_right": "subject's other facts",
}


def edits_one(results: dict[str, Any]) -> str:
    """Single edits of subjects of one token."""
    return _single(results, "1", _shares(SUCCESS))


def edits_two(results: dict[str, Any]) -> str:
    """Single edits of subjects of two tokens."""
    return _single(results, "2", _shares({**SUCCESS, "same_last_token_right": "same last token"}))


def magnitudes(results: dict[str, Any]) -> str:
    """EM, PM and NM of both kinds of subjects, and the time that an edit takes to be made."""
    rows = []
    for model, methods in found(results, "edits").items():
        for name, entry in methods.items():
            cells = [
                number(entry["figures"][kind], which, "+.3f") if kind in entry["figures"] else ""
                for kind in KINDS
                for which in ("EM", "PM", "NM")
            ]
            seconds = f"{1e3 * entry['seconds']:.0f}" if "seconds" in entry else ""
            rows.append([f"{MODELS[model]}: {'no edit' if name == 'none' else name}", *cells, seconds])
    heads = [f"{which}, {kind}" for kind in KINDS.values() for which in ("EM", "PM", "NM")]
    return table([*heads, "ms an edit"], rows)


def portability(results: dict[str, Any]) -> str:
    """What follows from an edit, of subjects of one token."""
    names = {"alias_right": "by alias", "inverse_right": "inverse", "two_hop_right": "two hops"}
    kept = {"alias_before": "old answer by alias", "two_hop_before": "old answer, two hops"}
    return _single(results, "1", _shares({**names, **kept}))


def locality(results: dict[str, Any]) -> str:
    """Rows and text, of subjects of one token."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "rows moved by more than 1 %": lambda each: number(each, "spill_moved", ",.0f"),
        "farthest": lambda each: number(each, "spill_max", ".2f"),
        "KL, text with the token": lambda each: number(each, "holding_kl"),
        "argmax changed (%)": lambda each: percent(each, "holding_argmax"),
        "KL, text without": lambda each: number(each, "lacking_kl"),
        "argmax changed, without (%)": lambda each: percent(each, "lacking_argmax"),
        "bit-identical (%)": lambda each: percent(each, "lacking_identical"),
    }
    return _single(results, "1", columns)


def sequence(results: dict[str, Any]) -> str:
    """Edits on top of each other."""
    rows = []
    for model, runs in found(results, "sequence").items():
        for run, lines in runs.items():
            name, _, kind = run.rpartition(", ")
            for line in lines:
                edited = line["edited"]
                rows.append([
                    f"{MODELS[model]}: {name}, {KINDS[kind]}",
                    f"{line['edits']:,}",
                    *(percent(edited, which) for which in ("ES", "PS", "NS", "exact")),
                    percent(line["first_ten"], "exact"),
                    f"{100 * line['untouched_known'][0]:.0f}",
                    f"{math.exp(min(line['held_out_nats'][0], 50)):,.1f}",
                ])  # fmt: skip
    heads = ["edits", "ES", "PS", "NS", "exact", "exact, first ten", "untouched facts", "held-out perplexity"]
    return table(heads, rows)


def suppression(results: dict[str, Any]) -> str:
    """Concepts."""
    rows = []
    for model, concepts in found(results, "suppression").items():
        for concept, entry in concepts.items():
            for name, figures in entry["methods"].items():
                rows.append([
                    f"{MODELS[model]}, {concept}: {name}",
                    _pair(figures["asked_mass"]),
                    _pair(figures["step_mass"], digits=2),
                    _pair(figures["hit"]),
                    f"{math.exp(min(figures['clean_nats'][0], 50)):,.2f}",
                    f"{figures['neighbour_nats'][0]:.3f} ± {figures['neighbour_nats'][1]:.3f}",
                ])  # fmt: skip
    heads = ["asked (%)", "each step (%)", "hit in 25 (%)", "clean perplexity", "loss on neighbours"]
    return table(heads, rows)


def _pair(pair: list[float], *, digits: int = 1) -> str:
    return f"{100 * pair[0]:.{digits}f} ± {100 * pair[1]:.{digits}f}"


def injection(results: dict[str, Any]) -> str:
    """New tokens, and disabled ones."""
    rows = []
    names = ("ES", "PS", "exact", "known", "same_subject_right", "lacking_identical")
    for model, parts in found(results, "injection").items():
        for name, summary in parts["new"].items():
            rows.append([f"{MODELS[model]}, new token: {name}", *(percent(summary, which) for which in names)])
        for kind, summary in parts["disabled"].items():
            label = f"{MODELS[model]}, rows of the last token off, {KINDS[kind]}"
            rows.append([label, *(percent(summary, which) for which in names)])
    return table(["ES", "PS", "exact", "old fact", "subject's other facts", "text without, bit-identical"], rows)


def undo(results: dict[str, Any]) -> str:
    """Hashes."""
    said = [
        f"{MODELS[model]}: {'the same' if each['identical_after'] else 'NOT the same'}"
        for model, each in found(results, "undo").items()
    ]
    return f"SHA-256 of all weights after edits that were taken back: {'; '.join(said)}."


def where(results: dict[str, Any]) -> str:
    """Hardware and versions."""
    each = results["provenance"]
    machine = each["gpu"] if each["gpu"] != "none" else each["cpu"]
    return f"{machine}, torch {each['torch']}, Python {each['python']}, commit {each['commit']}."


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "knowledge": knowledge,
    "edits-one": edits_one,
    "edits-two": edits_two,
    "magnitudes": magnitudes,
    "portability": portability,
    "locality": locality,
    "sequence": sequence,
    "suppression": suppression,
    "injection": injection,
    "undo": undo,
}


def render(text: str, results: dict[str, Any]) -> str:
    """`text` with every table made anew."""
    for name, make in SECTIONS.items():
        pattern = rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- /{name} -->)"
        content = make(results)
        text, count = re.subn(pattern, lambda match, new=content: f"{match[1]}{new}\n{match[2]}", text, flags=re.DOTALL)
        assert count == 1, f"{DOCUMENT.name} has {count} sections {name!r}"
    return text


def draw(results: dict[str, Any], image: Path) -> None:
    """Edits on top of each other: how many hold, and what they cost."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9.6, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for model, runs in found(results, "sequence").items():
            for run, lines in runs.items():
                name, _, kind = run.rpartition(", ")
                colour, marker = STYLES[f"{model} {name}"]
                style = {"color": colour, "marker": marker, "markersize": 4.5, "linestyle": "-" if kind == "1" else ":"}
                edits = [line["edits"] for line in lines]
                label = f"{MODELS[model]}: {name}" if kind == "1" else None
                exact = [100 * line["edited"]["means"]["exact"] for line in lines]
                left.plot(edits, exact, label=label, **style)
                right.plot(edits, [math.exp(min(line["held_out_nats"][0], 12)) for line in lines], **style)
        for axes in (left, right):
            axes.set_xscale("log")
            axes.set_xlabel("edits on top of each other")
            axes.grid(visible=True, color="0.9", linewidth=0.7)
            axes.set_axisbelow(True)
        left.set_ylabel("edited facts, exact (%)")
        left.set_ylim(-2, 102)
        right.set_yscale("log")
        right.set_ylabel("perplexity of held-out text")
        figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", frameon=False)
        figure.suptitle("Solid: subjects of one token. Dotted: of two.", fontsize=9)
        figure.savefig(image, dpi=160)


def main() -> int:
    results = json.loads(RESULTS.read_text())
    before = DOCUMENT.read_text()
    after = render(before, results)
    if "--check" in sys.argv:
        print(f"{DOCUMENT.name} {'agrees with' if before == after else 'is not up to date with'} {RESULTS.name}")
        return int(before != after)
    DOCUMENT.write_text(after)
    if "--draw" in sys.argv:
        draw(results, PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
