"""Write the tables of docs/scaling.md from train/cost.py and committed results; `--check` only says if they agree.

Once benchmarks/results/train.json is there, its dense 1B model gives the rate of matrix products that tables assume,
and a section compares predictions with it; until then that rate is train_prototype.json's.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flexmemory.config import ModelConfig
from flexmemory.model.accounting import train_flops_per_token
from flexmemory.presets import PRESETS
from flexmemory.train.cost import (
    Rates,
    RowsChoice,
    StepPlan,
    device_bytes,
    network_bytes,
    rows_job_pays,
    step_flops,
    step_seconds,
)

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "scaling.md"
CURVES = {32_768: "32k own BPE", 128_256: "128k Llama 3", 262_144: "256k own BPE"}
"""Curve of unique_ids.json for each vocabulary."""
LLAMA = 128_256
NVLINK, INTERNODE = 300e9, 50e9
"""Assumed, not measured here: bytes per second and GPU, each way."""
JOBS = [(8, 2**19), (8, 2**22), (64, 2**19), (64, 2**22), (256, 2**19), (256, 2**22), (1024, 2**21), (1024, 2**22)]
"""Ranks and tokens a step: each rank has a sequence of 2048 at least."""
ROWS = ("step", "job")
MODELS = {"dense": "1b-base", "memory": "1b-memory", "flex-3": "1b-flex3"}


class Figures:
    """What the tables are made of."""

    def __init__(self, results: Path = RESULTS) -> None:
        prototype = json.loads((results / "train_prototype.json").read_text())
        train = results / "train.json"
        self.train = json.loads(train.read_text()) if train.exists() else None
        self.prototype = prototype
        self.curves = json.loads((results / "unique_ids.json").read_text())["curves"]
        dense = next(
            entry
            for entry in (self.train or prototype)["entries"]
            if (entry["size"], entry["variant"]) == ("1b", "dense")
        )
        self.rates = Rates(
            matmul_flops_per_s=achieved(dense),
            memory_bytes_per_s=prototype["copy_bytes_per_s"],
            nvlink_bytes_per_s=NVLINK,
            internode_bytes_per_s=INTERNODE,
        )

    def unique(self, tokens: int, *, vocab_size: int) -> int:
        """Distinct ids in `tokens` tokens, as measured."""
        points = self.curves[CURVES[vocab_size]]["points"]
        return round(next(point["unique"] for point in points if point["tokens"] == tokens))

    def plan(self, world: int, tokens: int, *, rows_per: Any = "step", vocab_size: int = LLAMA) -> StepPlan:
        """A step of `tokens` tokens on `world` ranks, with ids as measured."""
        return StepPlan(
            batch_tokens=tokens,
            world_size=world,
            rank_ids=self.unique(tokens // world, vocab_size=vocab_size),
            job_ids=self.unique(tokens, vocab_size=vocab_size),
            rows_per=rows_per,
        )

    def seconds(self, config: ModelConfig, plan: StepPlan) -> float:
        """Of a step."""
        return step_seconds(config, plan, self.rates).total


def achieved(entry: dict) -> float:
    """FLOP/s of a measured run, all that is not matrix products included in its time."""
    config = model_of(entry)
    return entry["tokens_per_s"] * train_flops_per_token(config, unique_share=entry["unique_share"] or 0.0)


def model_of(entry: dict) -> ModelConfig:
    """The model of a measured run."""
    return PRESETS[f"{entry['size']}-{entry['variant'].replace('dense', 'base')}"].model


def model(name: str, *, vocab_size: int = LLAMA) -> ModelConfig:
    """A 1B model with another vocabulary."""
    return dataclasses.replace(PRESETS[MODELS[name]].model, vocab_size=vocab_size)


def table(header: str, rows: Iterable[Iterable[str]]) -> str:
    """Markdown; the first column's names left, numbers right."""
    columns = header.split(" | ")
    lines = [f"| {header} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def tokens_name(tokens: int) -> str:
    """524288 as 0.5M, 16384 as 16k."""
    return f"{tokens / 2**20:g}M" if tokens >= 2**19 else f"{tokens // 2**10}k"


def unique_table(figures: Figures) -> str:
    rows = []
    for tokens in (2**11, 2**13, 2**14, 2**17, 2**19, 2**20, 2**21, 2**22, 2**24):
        counts = [figures.unique(tokens, vocab_size=vocab_size) for vocab_size in CURVES]
        rows.append([tokens_name(tokens), *(f"{count:,} ({count / tokens:.1%})" for count in counts)])
    return table("tokens | " + " | ".join(CURVES.values()), rows)


def law_table(figures: Figures) -> str:
    rows = []
    for name, curve in figures.curves.items():
        law, held_out = curve["law"], curve["law"]["fitted_to_1M_error_by_tokens"]
        values = [f"{value:.3f}" for value in law["parameters"].values()]
        worst = f"{max(held_out.values(), key=abs):+.1%}"
        rows.append([name, *values, f"{law['largest_error']:.1%}", tokens_name(law["to_tokens"]), worst])
    return table("vocabulary | ln k | β | ln c | ln s | largest error | measured to | error beyond 1M", rows)


def speed_table(figures: Figures) -> str:
    rows = []
    for world, tokens in JOBS:
        dense = figures.seconds(model("dense"), figures.plan(world, tokens))
        cells = [f"{world} | {tokens_name(tokens)}", f"{tokens // world:,}", f"{tokens / world / dense:,.0f}"]
        for name in ("memory", "flex-3"):
            for rows_per in ROWS:
                seconds = figures.seconds(model(name), figures.plan(world, tokens, rows_per=rows_per))
                cells.append(f"{dense / seconds:.2f}")
        rows.append(cells)
    header = (
        "GPUs | tokens a step | a GPU | dense, tokens/s a GPU | memory, step | memory, job | flex-3, step | flex-3, job"
    )
    return table(header, rows)


def split_table(figures: Figures) -> str:
    rows = []
    for world, tokens in JOBS:
        for name, rows_per in (("dense", "step"), ("memory", "step"), ("memory", "job")):
            plan, config = figures.plan(world, tokens, rows_per=rows_per), model(name)
            flops, network = step_flops(config, plan), network_bytes(config, plan)
            label = name if name == "dense" else f"{name}, {rows_per}"
            ids = f"{plan.computed_ids:,}" if config.has_memory else ""
            share = f"{flops.ffn_m / flops.total:.1%}" if config.has_memory else ""
            gigabytes = [f"{num_bytes / 1e9:.2f}" for num_bytes in network]
            milliseconds = [f"{1e3 * part:,.1f}" for part in step_seconds(config, plan, figures.rates)]
            rows.append([f"{world} | {tokens_name(tokens)} | {label}", ids, share, *gigabytes, *milliseconds])
    header = (
        "GPUs | tokens a step | model, rows | ids computed | FFN-M of FLOPs | gather GB | scatter GB | exchange GB | "
        "compute ms | rows ms | exchange ms | weights ms"
    )
    return table(header, rows)


def choice(figures: Figures, name: str, *, world: int, tokens: int, vocab_size: int, rate: float) -> RowsChoice:
    """Whether sharing rows pays for one model and job, at an exchange rate."""
    plan = figures.plan(world, tokens, vocab_size=vocab_size)
    return rows_job_pays(
        model(name, vocab_size=vocab_size),
        rank_ids=plan.rank_ids,
        job_ids=plan.job_ids,
        world_size=world,
        matmul_flops_per_s=figures.rates.matmul_flops_per_s,
        exchange_bytes_per_s=rate,
    )


def rows_table(figures: Figures) -> str:
    rows = []
    for world, tokens in JOBS:
        for vocab_size, curve in CURVES.items():
            job: Any = {"world": world, "tokens": tokens, "vocab_size": vocab_size}
            plan = figures.plan(world, tokens, vocab_size=vocab_size)
            cells = [f"{world} | {tokens_name(tokens)} | {curve.split()[0]}", f"{plan.rank_ids:,}", f"{plan.job_ids:,}"]
            choices = [choice(figures, "memory", **job, rate=rate) for rate in (NVLINK, INTERNODE)]
            cells.append(f"{1e3 * choices[0].saved_s:.1f}")
            cells += [f"{1e3 * found.exchange_s:.1f}, {'job' if found.pays else 'step'}" for found in choices]
            for name in ("memory", "flex-3"):
                found = choice(figures, name, **job, rate=NVLINK)
                cells.append(f"{found.exchange_s * NVLINK / found.saved_s / 1e9:.0f}")
            rows.append(cells)
    header = (
        "GPUs | tokens a step | V | ids a GPU | ids in the job | saved ms | NVLink: exchange ms, better | "
        "between nodes | break-even GB/s | flex-3's"
    )
    return table(header, rows)


def vocabulary_table(figures: Figures) -> str:
    rows = []
    for world, tokens in ((8, 2**19), (64, 2**22), (1024, 2**22)):
        for vocab_size, curve in CURVES.items():
            dense = figures.seconds(model("dense", vocab_size=vocab_size), figures.plan(world, tokens))
            cells = [f"{world} | {tokens_name(tokens)} | {curve.split()[0]}"]
            for name in ("memory", "flex-3"):
                config = model(name, vocab_size=vocab_size)
                for rows_per in ROWS:
                    plan = figures.plan(world, tokens, rows_per=rows_per, vocab_size=vocab_size)
                    cells.append(f"{dense / figures.seconds(config, plan):.2f}")
            rows.append(cells)
    header = "GPUs | tokens a step | V | memory, step | memory, job | flex-3, step | flex-3, job"
    return table(header, rows)


def memory_table(figures: Figures) -> str:
    kinds: list[tuple[str, Any]] = [("dense", "step"), *((name, per) for name in ("memory", "flex-3") for per in ROWS)]
    rows = []
    for world, tokens in JOBS:
        parts = [device_bytes(model(name), figures.plan(world, tokens, rows_per=per)) for name, per in kinds]
        cells = [f"{part.total / 1e9:.1f}" + (f" ({part.rows / 1e9:.1f})" if part.rows else "") for part in parts]
        rows.append([f"{world} | {tokens_name(tokens)}", *cells])
    return table("GPUs | tokens a step | dense | memory, step | memory, job | flex-3, step | flex-3, job", rows)


def check_table(figures: Figures, entries: list[dict]) -> str:
    """Measured runs on one GPU against the model, by the rate that the dense model of the size achieved."""
    rows = []
    for entry in entries:
        dense = dense_beside(entry, entries)
        config, share, tokens = model_of(entry), entry["unique_share"], entry["batch_tokens"]
        ids = max(1, round((share or 0) * tokens))
        plan = StepPlan(batch_tokens=tokens, world_size=1, rank_ids=ids, job_ids=ids)
        rates = dataclasses.replace(figures.rates, matmul_flops_per_s=achieved(dense))
        predicted = tokens / step_seconds(config, plan, rates).total
        peak = entry.get("peak_memory_bytes")
        rate = achieved(entry)
        rows.append([
            f"{entry['size']} | {entry['variant']} | {tokens_name(tokens)}",
            "" if not config.has_memory else f"{share:.1%}",
            f"{entry['tokens_per_s']:,.0f}",
            f"{rate / 1e12:.0f} ({rate / entry['matmul_flops_per_s']:.0%})",
            f"{entry['tokens_per_s'] / dense['tokens_per_s']:.2f}",
            "" if entry is dense else f"{predicted / dense['tokens_per_s']:.2f}",
            "" if entry is dense else f"{predicted / entry['tokens_per_s'] - 1:+.1%}",
            "" if peak is None else f"{peak / 1e9:.1f}",
            "" if peak is None else f"{device_bytes(config, plan).total / 1e9:.1f}",
        ])  # fmt: skip
    header = (
        "size | model | tokens a step | unique | tokens/s | TFLOP/s (of a large product's) | to dense | predicted | "
        "error | peak GB | predicted GB"
    )
    return table(header, rows)


def dense_beside(entry: dict, entries: list[dict]) -> dict:
    """The dense run of the same size, and of the same step where there is one."""
    dense = [other for other in entries if (other["size"], other["variant"]) == (entry["size"], "dense")]
    same = [other for other in dense if other["batch_tokens"] == entry["batch_tokens"]]
    return (same or dense)[0]


def measured_section(figures: Figures) -> str:
    """The comparison with train.json under a heading of its own, or nothing before it exists."""
    if figures.train is None:
        return ""
    where = figures.train["provenance"]
    hardware = f"{where['gpu']}, torch {where['torch']}, commit {where['commit']}."
    heading = "## Checked against measurement\n\nbenchmarks/results/train.json: "
    return f"{heading}{hardware}\n\n{check_table(figures, figures.train['entries'])}\n"


def assumptions(figures: Figures) -> str:
    source = "train_prototype.json" if figures.train is None else "train.json"
    rates = figures.rates
    return (
        f"Matrix products at {rates.matmul_flops_per_s / 1e12:.0f} TFLOP/s, what the dense 1B model achieved "
        f"(benchmarks/results/{source}); device memory at {rates.memory_bytes_per_s / 1e12:.2f} TB/s, a measured copy. "
        f"Assumed, not measured: NVLink {NVLINK / 1e9:.0f} GB/s and the network between nodes {INTERNODE / 1e9:.0f} "
        f"GB/s, per GPU and each way; {rates.gpus_per_node} GPUs a node."
    )


def render(text: str, figures: Figures) -> str:
    """`text` with every generated section made anew."""
    sections = {
        "assumptions": assumptions,
        "unique": unique_table,
        "law": law_table,
        "speed": speed_table,
        "split": split_table,
        "rows": rows_table,
        "vocabulary": vocabulary_table,
        "memory": memory_table,
        "prototype": lambda figures: check_table(figures, figures.prototype["entries"]),
        "measured": measured_section,
    }
    for name, make in sections.items():
        pattern, content = rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- /{name} -->)", make(figures)
        content += "\n" if content else ""
        text, count = re.subn(pattern, lambda match, new=content: f"{match[1]}{new}{match[2]}", text, flags=re.DOTALL)
        assert count == 1, f"docs/scaling.md has {count} sections {name!r}"
    return text


def main() -> int:
    before = PAGE.read_text(encoding="utf-8")
    after = render(before, Figures())
    if "--check" in sys.argv:
        print("docs/scaling.md agrees with its sources" if before == after else "docs/scaling.md is not up to date")
        return int(before != after)
    PAGE.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
