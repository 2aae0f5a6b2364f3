"""The page: claims with verdicts, answers with numbers, tables, plots and what limits them, all from the results."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from flexmemory.evaluate.tasks import Metric
from flexmemory.reproduce import figures
from flexmemory.reproduce.claims import PAPER_COST, claims
from flexmemory.reproduce.found import Entry, Found, accuracy, metric_of
from flexmemory.reproduce.recall import ALPHA, CHANCE, SURE, contrast, falls, graded_pairs
from flexmemory.reproduce.study import RECALL, TASKS

CAPTIONS = {
    "quality": "Perplexity by active parameters and by tokens (Fig. 9, 10)",
    "alpha": "FFNs scaled by alpha; in flex-3 FFN-M alone (Fig. 7)",
    "layers": "One layer's FFN left out (Fig. 4, 12)",
    "pruning": "Against the pruned base (Fig. 11)",
    "compression": "Rank cut by SVD (Table 8) and spectra (Fig. 13)",
    "cells": "Clustering and outliers by layer (Fig. 6)",
}
COMMAND = "flexmemory reproduce --corpus FILES --held-out FILE --wikitext FILE --tasks FOLDER --work DIR --at-once 7"
Lines = Iterator[str]


def write(results: Path, page: Path) -> Path:
    """Write the page and its plots, in `images` beside it.

    Raises:
        FileNotFoundError: no run was judged.
    """
    found = Found(results)
    images = figures.draw(found, page.parent / "images")
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text(found, {name: os.path.relpath(path, page.parent) for name, path in images.items()}))
    return page


def text(found: Found, images: dict[str, str]) -> str:
    """The page as Markdown; `images` by their paths from it."""
    parts = (
        _head(found), _claims(found), _answers(found), _runs(found), _tasks(found), _cost(found), _plots(images),
        _limits(found),
    )  # fmt: skip
    return "\n".join(line for part in parts for line in part) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> Lines:
    yield f"| {' | '.join(header)} |"
    yield "|" + "---|" * left + "---:|" * (len(header) - left)
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def _head(found: Found) -> Lines:
    yield "# The study: the paper's claims, at a size that can be trained here\n"
    yield (
        "Written by `flexmemory reproduce` from its results. Each claim has the paper's number, ours, and a verdict by "
        "the rule beside it. The paper trains 250M to 1.2B parameters on 25 to 150 billion tokens of C4; here it is "
        f"{_scale(found)}. **A verdict says what holds at this scale, not whether the paper is right.**\n"
    )
    yield f"    {COMMAND}\n"
    yield f"Models were trained and judged on: {_places(found, 'quality')}.\n"


def _places(found: Found, part: str) -> str:
    """Machines and commits that a part's entries come from."""
    return "; ".join(
        f"{where['gpu'] if where['gpu'] != 'none' else where['cpu']}, torch {where['torch']}, commit {where['commit']}"
        for where in found.provenance[part]
    )


def _claims(found: Found) -> Lines:
    yield "## Claims\n"
    rows = [
        (claim.source, claim.claim, claim.paper, claim.ours or "not measured", f"**{claim.verdict}**", claim.rule)
        for claim in claims(found)
    ]
    yield from _table(("where", "claim", "paper", "here", "verdict", "rule"), rows, left=6)
    deviation = found.seed_deviation()
    if deviation is not None:
        yield f"Between seeds nats a token differ by {deviation:.4f} (standard deviation, pooled).\n"


def _change(found: Found, one: Entry | None, other: Entry | None) -> str:
    return "" if one is None or other is None else f"{100 * (found.ppl(one) / found.ppl(other) - 1):+.1f} %"


def _answers(found: Found) -> Lines:
    yield "## Questions\n"
    yield "**Is a lead or lag at equal tokens real, and does it last?** Beside the base with as many tokens:\n"
    rows = []
    for size in found.sizes:
        for variant in ("memory", "flex3"):
            other = {run["tokens"]: run for run in found.budgets(size, "base")}
            for run in found.budgets(size, variant):
                if run["tokens"] in other:
                    base = other[run["tokens"]]
                    cells = (f"{run['tokens'] / 1e6:.3g}M", f"{found.ppl(base):.2f}", f"{found.ppl(run):.2f}")
                    rows.append((f"{size} {variant}", *cells, _change(found, run, base)))
    yield from _table(("", "tokens", "base", "perplexity", "to the base"), rows)
    yield "**At equal active parameters?** Dense models of the same depth, narrower:\n"
    rows = []
    for size in found.sizes:
        for variant in ("memory", "flex3"):
            run, narrow = found.run(size, variant), found.run(size, f"base-as-{variant}")
            if run is not None and narrow is not None:
                active = f"{run['parameters']['active'] / 1e6:.2f}", f"{narrow['parameters']['active'] / 1e6:.2f}"
                rows.append((f"{size} {variant}", *active, f"{found.ppl(run):.2f}", f"{found.ppl(narrow):.2f}"))
    yield from _table(("", "active, M", "of the base, M", "perplexity", "of the base"), rows)
    yield from _equal_time(found)
    yield from _beyond_perplexity(found)
    yield "**FFN-C linear or SwiGLU; FFN-M or a free table or both?** At equal tokens:\n"
    rows = []
    for size in found.sizes:
        names = ("attention", "memory", "table", "ffn+table", "flex1", "flex1-square")
        for variant in names:
            run = found.run(size, variant)
            if run is not None and found.run(size, "table") is not None:
                counts = run["parameters"]
                rows.append(
                    (
                        f"{size} {variant}",
                        f"{counts['active'] / 1e6:.2f}",
                        f"{counts['backbone'] / 1e6:.2f}",
                        f"{found.ppl(run):.2f}",
                    )
                )
    yield from _table(("", "active, M", "total, M", "perplexity"), rows)
    yield (
        "`flex1-square` has one linear map for FFN-C, `table` a free row for each token and layer in place of "
        "FFN-M, `attention` an "
        "FFN of a single cell.\n"
    )


def _equal_time(found: Found) -> Lines:
    yield "**At equal training time?**\n"
    speed = found.parts["speed"]
    if not speed:
        yield "Not measured at these sizes in this run; the README has the rates at the paper's shapes.\n"
        return
    rows = []
    for entry in speed.values():
        size, variant = entry["size"], entry["variant"]
        ratio = entry["tokens_per_s"] / speed[f"{size}-base"]["tokens_per_s"]
        cells = (f"{size} {variant}", f"{entry['tokens_per_s']:,.0f}", f"{ratio:.2f}")
        pair = None if variant == "base" else found.equal_time(size, variant)
        if pair is None:
            rows.append((*cells, "", "", "", "", ""))
        else:
            base, run = pair
            ppl = (f"{found.ppl(base):.2f}", f"{found.ppl(run):.2f}", _change(found, run, base))
            rows.append((*cells, f"{run['lr']:g}", f"{run['tokens'] / 1e6:.3g}M", *ppl))
    yield "Each trained alone on the device; then in the time of the base's run, both at one learning rate:\n"
    header = ("", "tokens/s", "to the base", "learning rate", "tokens", "base", "perplexity", "to the base's")
    yield from _table(header, rows)
    yield (
        "At the paper's 1B shape memory and flex-3 train faster than the base (README): there FFN-M saves products of "
        "large matrices, in models of this size hardly anything.\n"
    )


def _beyond_perplexity(found: Found) -> Lines:
    if not found.has_tasks:
        return
    yield "**Do tasks fall with alpha beyond what perplexity predicts?** Beside whole models of like perplexity:\n"
    tasks, rows = ("lambada_openai", "sciq", "arc_easy", "hellaswag"), []
    whole = list(found.parts["quality"].values())
    for size in found.sizes:
        for variant in ("base", "memory", "flex3"):
            for alpha in (1.0, 0.6, 0.5, 0.4):
                scaled = found.probe(size, variant, alpha=alpha)
                if scaled is not None:
                    nats = found.nats(scaled)
                    nearest = min(whole, key=lambda run: abs(found.nats(run) - nats))
                    cells = [
                        f"{100 * accuracy(scaled, task)[0]:.1f} / {100 * accuracy(nearest, task)[0]:.1f}"
                        for task in tasks
                    ]
                    ppl = f"{found.ppl(scaled):.1f} / {found.ppl(nearest):.1f}"
                    rows.append((f"{size} {variant}, alpha {alpha:g}", ppl, *cells))
    yield from _table(("scaled / whole", "perplexity", *tasks), rows)
    yield "Standard errors are those of the table of tasks below.\n"
    yield from _beyond_by_gain(found)


def _beyond_by_gain(found: Found) -> Lines:
    """Falls of the gain at one alpha, whole and beyond the curve of all whole models."""
    if not found.graded:
        return
    yield (
        "By **gain** (how much oftener than half the context raises the right answer more than a wrong one; 0 for a "
        "model that does not look at it: [evaluating](evaluating.md#gain)): its change at alpha "
        f"{ALPHA:g}, in percent of the whole model's, then what is left of it without the fall that perplexity "
        f"predicts. Only where the whole model's gain is above 0 by more than {SURE:g} errors; where a task has none, "
        "the model is on it as one that does not look at the context:\n"
    )
    rows = []
    for each in falls(found):
        for what, changes in (("", each.fall), (", beyond perplexity", each.beyond)):
            cells = [_points(changes.get(task)) for task in TASKS]
            rows.append((each.model + what, *cells, _points(contrast(changes))))
    names = (f"{task} ({'recall' if task in RECALL else 'reasoning'})" for task in TASKS)
    yield from _table(("", *names, "recall less reasoning"), rows)
    yield (
        "Perplexity's prediction is a parabola in held-out nats through all whole models. Errors are over documents, "
        "paired, and beyond perplexity also of the models' scatter around that curve; "
        "empty where too few models were judged on the same documents."
    )
    most = {max(score["documents"] for score in entry["tasks"].values()) for entry in found.graded}
    for model, whole, _ in graded_pairs(found):
        if (count := max(score["documents"] for score in whole["tasks"].values())) < max(most):
            yield f"{model}: the first {count:,} documents of each task."
    yield ""


def _points(metric: Metric | None) -> str:
    return "" if metric is None else f"{100 * metric.value:+.0f} ± {100 * metric.stderr:.0f}"


def _runs(found: Found) -> Lines:
    yield "## Runs\n"
    for size in found.sizes:
        for variant in ("base", "memory"):
            for tokens, runs in found.swept(size, variant).items():
                if len(runs) > 1:
                    rates = ", ".join(f"{found.ppl(run):.1f} at {run['lr']:g}" for run in runs)
                    yield f"- {size} {variant}, {tokens / 1e6:.3g}M tokens, by learning rate: {rates}"
        yield f"- {size}: all other runs at {found.lr(size):g}"
    yield ""
    texts = list(next(iter(found.parts["quality"].values()))["texts"])
    rows = []
    for size in found.sizes:
        runs = [run for run in found.parts["quality"].values() if run["size"] == size and run["lr"] == found.lr(size)]
        for run in sorted(runs, key=lambda run: (run["tokens"], found.ppl(run))):
            ppl = [
                f"{run['texts'][name]['perplexity']:.2f} ± {run['texts'][name]['perplexity_stderr']:.2f}"
                for name in texts
            ]
            counts = run["parameters"]
            parameters = (f"{counts['active'] / 1e6:.2f}", f"{counts['backbone'] / 1e6:.2f}")
            name = f"{size} {run['variant']}" + (f", seed {run['seed']}" if run["seed"] else "")
            rows.append((name, f"{run['tokens'] / 1e6:.3g}", *parameters, *ppl))
    yield from _table(("", "tokens, M", "active, M", "total, M", *texts), rows)
    yield "Parameters beside embedding and head. Standard errors are over windows, which all models share.\n"


def _tasks(found: Found) -> Lines:
    if not found.has_tasks:
        return
    yield "## Zero-shot tasks\n"
    rows = []
    for size in found.sizes:
        for variant in ("base", "memory", "flex1", "flex2", "flex3"):
            for run in found.budgets(size, variant)[-1:]:
                cells = [accuracy(run, task) for task in TASKS]
                shown = [f"{100 * value:.1f} ± {100 * stderr:.1f}" for value, stderr in cells]
                rows.append((f"{size} {variant}, {run['tokens'] / 1e6:.3g}M", *shown))
    rows.append(("guessing", *(f"{100 * CHANCE[task]:.1f}" for task in TASKS)))
    yield from _table(("", *(f"{task} ({metric_of(task)})" for task in TASKS)), rows)
    yield (
        "Accuracy in percent, no example in the prompt, prompts and metrics of lm-evaluation-harness "
        "([evaluating](evaluating.md)). Where "
        "a model does not beat guessing by more than its error, the task says nothing.\n"
    )
    if not found.graded:
        return
    rows = []
    for model, whole, _ in graded_pairs(found):
        gains = [whole["tasks"][task]["gain"] for task in TASKS]
        rows.append((model, *(f"{100 * gain['value']:.1f} ± {100 * gain['stderr']:.1f}" for gain in gains)))
    yield from _table(("gain, points", *TASKS), rows)


def _cost(found: Found) -> Lines:
    cost = found.cost
    if not cost:
        return
    yield "## Time and memory of a token (Table 6)\n"
    rows = [
        (
            entry["variant"],
            f"{entry['ms_per_token']:.3f}",
            f"{PAPER_COST[entry['variant']]['ms_per_token']:.2f}",
            f"{entry['peak_bytes'] / 1e9:.3f}",
            f"{PAPER_COST[entry['variant']]['peak_bytes']:.3f}",
            f"{100 * entry['bound_share']:.0f} %",
        )
        for entry in cost
    ]
    header = ("", "ms a token", "the paper's", "peak memory, GB", "the paper's", "of its bound")
    yield from _table(header, rows)
    yield (
        f"The engine at the paper's 1B shape, random weights, batch 1, {cost[0]['context']:,} tokens of context, rows "
        f"in host memory; {_places(found, 'cost')}. The paper's are of one A100.\n"
    )


def _plots(images: dict[str, str]) -> Lines:
    yield "## Plots\n"
    for name, path in images.items():
        yield f"![{CAPTIONS[name]}]({path})\n\n{CAPTIONS[name]}.\n"


def _scale(found: Found) -> str:
    """What was trained, said: parameters, vocabulary, tokens."""
    runs = list(found.parts["quality"].values())
    bases = [run for size in found.sizes if (run := found.run(size, "base")) is not None]
    sizes = " and ".join(f"{run['parameters']['backbone'] / 1e6:.3g}M" for run in bases)
    vocab = max(run["parameters"]["embedding"] // run["model"]["hidden_size"] for run in runs)
    fewest, most = (choose(run["tokens"] for run in runs) for choose in (min, max))
    return (
        f"{sizes} parameters beside embedding and head, a vocabulary of {vocab:,}, "
        f"{fewest / 1e6:.3g}M to {most / 1e6:.3g}M training tokens"
    )


def _limits(found: Found) -> Lines:
    yield "## What limits this\n"
    yield (
        f"- Scale: {_scale(found)}. Where the first table of Questions changes order or sign with tokens, a verdict is "
        "one of these tokens alone."
    )
    for size in found.sizes:
        swept = found.swept(size, "base")
        tokens = max((tokens for tokens, runs in swept.items() if len(runs) > 1), default=found.tokens(size))
        rates = [run["lr"] for run in swept[tokens]]
        if len(rates) > 1 and found.lr(size) in (rates[0], rates[-1]):
            yield (
                f"- {size}: the base's best learning rate lies at the edge of those tried at {tokens / 1e6:.3g}M "
                f"tokens ({', '.join(f'{rate:g}' for rate in rates)}), so the base may do better at another."
            )
        for tokens, runs in swept.items():
            own, best = (next((run for run in runs if run["lr"] == found.lr(size)), None), min(runs, key=found.nats))
            if own is not None and own is not best:
                yield (
                    f"- {size}: with {tokens / 1e6:.3g}M tokens the base is better at {best['lr']:g} "
                    f"({found.ppl(best):.1f}) than at the rate of all others ({found.ppl(own):.1f}), so a lead there "
                    "is partly the rate's."
                )
    yield "- One recipe, chosen on the base; memory and flex models were not given their own best learning rate."
    yield "- One seed but where another is named."
    if found.has_tasks:
        scored = next(run["tasks"] for run in found.parts["quality"].values() if run["tasks"])
        documents = ", ".join(f"{task} {score['documents']:,}" for task, score in scored.items())
        yield (
            "- Tasks that are at chance decide nothing about recall and reasoning. Documents of each: "
            f"{documents}. Texts are judged in fp32, tasks in bf16 on a GPU."
        )
    elsewhere = "figure 5: the map of the [explorer](explorer.md) and of the [findings](findings.md)."
    if not found.cost:
        elsewhere = f"Table 6 (time and memory of a token) at the 1B shape is in the README, by the engine; {elsewhere}"
    yield f"- {elsewhere[0].upper()}{elsewhere[1:]}"
    missing = [part for part in ("speed", "probes", "pruning", "compression", "cells", "cost") if not found.parts[part]]
    if missing:
        yield f"- Not measured in this run: {', '.join(missing)}."
    for size in found.sizes:
        for variant in ("base", "memory", "flex3"):
            if found.parts["probes"] and not found.layers(size, variant):
                yield f"- Probes of {size}-{variant} are not complete."
