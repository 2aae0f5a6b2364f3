"""Bytes of a store against what they cost in perplexity: one codec for all rows, plans, and layers left out.

    python benchmarks/tol_frontier.py CHECKPOINT --data DATA --test TEST --out benchmarks/results/tol_frontier_NAME.json

DATA and TEST are folders of `flexmemory prepare`: the training split of DATA calibrates and counts, that of TEST is
measured on. Choose text for TEST that the model was not trained on.
Results that are there are not made again; `runs` says where each comes from. Rises are of the same windows with both
rows; standard errors are over windows. Beside OUT goes a picture, OUT as .png.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flexmemory.cli.tol_plan import draw_windows
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.provenance import provenance
from flexmemory.tol.build import ModelRows
from flexmemory.tol.fit import fit
from flexmemory.tol.plan import make_plan, store_bytes
from flexmemory.tol.rise import coded_rows, compare_rises
from flexmemory.tol.scheme import Scheme
from flexmemory.tol.sensitivity import cached_sensitivity
from flexmemory.train.data import TokenDataset, TokenStream
from flexmemory.train.frequency import token_counts

CODECS = (
    "bf16", "int8", "fp8", "normal6", "trellis4", "normal4", "nf4", "int4", "trellis3", "normal3", "trellis2",
    "normal2", "pq4x8", "trellis1", "normal1", "pq8x8",
)  # fmt: skip
TOGETHER = 4
"""Variants that exist at once."""
SHARES = (2, 4, 8, 14)
"""Budgets of plans: parts of the bytes in bf16."""
STYLES = {
    "one codec": ("#0072B2", "o"),
    "SVD, one rank": ("#D55E00", "s"),
    "layers left out": ("#CC79A7", "v"),
    "planned": ("#009E73", "D"),
    "planned, low rank": ("#E69F00", "^"),
}


Made = tuple[int, torch.Tensor, float | None]
"""Bytes, rows, and the predicted rise of the loss."""


class Bench:
    """A model, and the rows of all of its tokens."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.set_num_threads(args.threads)
        self.device = args.device
        self.checkpoint = Checkpoint.open(args.checkpoint)
        self.config = self.checkpoint.config
        self.model = self.checkpoint.load(dtype=torch.float32, device=args.device).requires_grad_(False)
        self.data = TokenDataset.open(args.data)
        self.counts = token_counts(self.data.train, vocab_size=self.config.vocab_size)
        self.ids = torch.arange(self.config.vocab_size)
        rows = ModelRows(self.checkpoint, device="cpu")
        self.table = torch.cat([rows(part) for part in self.ids.split(1024)]).clone()
        windows = draw_windows(args.data, self.checkpoint, split="train", tokens=args.calibration, seed=0)
        self.sensitivity = cached_sensitivity(
            self.model, windows[:, :-1], folder=args.cache, fingerprint=self.checkpoint.fingerprint
        )
        self.text = self._windows(TokenDataset.open(args.test).train, args.max_windows)
        self.plain_bytes = 2 * self.table[:, 1:].numel()

    def source(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table[ids]

    def _windows(self, stream: TokenStream, most: int | None) -> torch.Tensor:
        length = self.config.max_seq_len
        count = stream.num_windows(length)
        numbers = range(count) if most is None else [count * i // most for i in range(min(most, count))]
        return torch.stack([torch.from_numpy(stream.window(number, seq_len=length)) for number in numbers])

    def rows_of(self, scheme: Scheme) -> torch.Tensor:
        rows = torch.zeros_like(self.table[:, 1:])
        rows[:, list(scheme.layers)] = coded_rows(scheme, self.source, self.ids, device=self.device)
        return rows

    def uniform(self, codec: str) -> Made:
        layers = range(self.config.num_layers)
        scheme = fit(codec, self.source, vocab_size=len(self.ids), hidden_size=self.config.hidden_size, layers=layers)
        return store_bytes(scheme, num_layers=len(layers)).total, self.rows_of(scheme), None

    def planned(self, budget: int, **options: Any) -> Made:
        made = make_plan(
            self.source, self.sensitivity, counts=self.counts, budget_bytes=budget, device=self.device, **options
        )
        return made.size.total, self.rows_of(made.scheme), made.predicted

    def dropped(self, count: int) -> Made:
        rows = self.table[:, 1:]
        share = self.counts / self.counts.sum()
        blocks = self.sensitivity.blocks[:, 0]
        cost = torch.stack([(share * ((rows[:, n] @ blocks[n]) * rows[:, n]).sum(1)).sum() for n in range(len(blocks))])
        left = rows.bfloat16().float().clone()
        left[:, cost.argsort()[:count]] = 0
        return self.plain_bytes * (len(blocks) - count) // len(blocks), left, None


def entries(bench: Bench) -> list[tuple[str, str, Callable[[], Made]]]:
    """Kind, name, and what makes it, the most telling first."""
    half = bench.config.hidden_size // 2
    half_bytes = half * (len(bench.ids) * 2 + bench.config.hidden_size) * bench.config.num_layers

    def low_rank(**options: Any) -> Made:
        return bench.planned(half_bytes, low_rank=True, **options)

    plans = [
        ("planned", f"planned 1/{share}", partial(bench.planned, bench.plain_bytes // share, basis=True))
        for share in SHARES
    ]
    ranks = [("SVD, one rank", f"svd{rank}", partial(bench.uniform, f"svd{rank}")) for rank in (half, half // 2)]
    codecs = [("one codec", codec, partial(bench.uniform, codec)) for codec in CODECS]
    dropped = [("layers left out", f"{count} left out", partial(bench.dropped, count)) for count in (1, 2)]
    return [
        *plans,
        *ranks,
        ("planned, low rank", "planned, low rank", low_rank),
        ("planned, low rank", "planned, low rank, no feedback", partial(low_rank, feedback=False, passes=1)),
        *dropped,
        *codecs,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="where sensitivities are kept")
    parser.add_argument("--calibration", type=int, default=131_072, help="tokens that say what errors cost")
    parser.add_argument("--max-windows", type=int, help="measure on so many windows, evenly spaced, instead of all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="for sensitivities, codes and losses")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    bench = Bench(args)
    report: dict[str, Any] = {"results": [], "runs": []}
    if args.out.exists():
        report = json.loads(args.out.read_text())
        if report["checkpoint_fingerprint"] != bench.checkpoint.fingerprint:
            parser.error(f"{args.out} is of another checkpoint; choose another file or remove it")
    done = {each["name"] for each in report["results"]}
    names = [name for _, name, _ in entries(bench)]
    wanted = [entry for entry in entries(bench) if entry[1] not in done]
    run: dict[str, Any] = {"provenance": provenance(), "calibration_tokens": args.calibration, "measured": []}
    report["runs"] += [run] if wanted else []
    for first in range(0, len(wanted), TOGETHER):
        made = [(kind, name, *make()) for kind, name, make in wanted[first : first + TOGETHER]]
        rises = compare_rises(
            bench.model,
            bench.text,
            {name: (lambda ids, rows=rows: rows[ids]) for _, name, _, rows, _ in made},
            layers=range(bench.config.num_layers),
        )
        for kind, name, size, _, predicted in made:
            found = rises[name]
            report["results"].append(
                {
                    "kind": kind,
                    "name": name,
                    "bytes": size,
                    "times_smaller": bench.plain_bytes / size,
                    "rise_percent": found.percent,
                    "stderr": found.percent_stderr,
                    "predicted_percent": None if predicted is None else 100 * math.expm1(predicted),
                }
            )
            run["measured"].append(name)
            logging.info("%s", report["results"][-1])
            report |= {
                "model": bench.checkpoint.path.name,
                "checkpoint_fingerprint": bench.checkpoint.fingerprint,
                "bf16_bytes": bench.plain_bytes,
                "tokens": found.tokens,
                "loss": found.loss,
                "perplexity": math.exp(found.loss),
            }
        report["results"].sort(key=lambda each: names.index(each["name"]))
        args.out.write_text(json.dumps(report, indent=2) + "\n")
    draw(report, args.out.with_suffix(".png"))


def draw(report: dict[str, Any], image: Path) -> None:
    """Bytes and rises, both logarithmic."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        for kind, (colour, marker) in STYLES.items():
            points = sorted(
                (each for each in report["results"] if each["kind"] == kind), key=lambda each: each["bytes"]
            )
            if kind == "one codec":
                points = [each for each in points if each["name"] != "bf16"]
            if not points:
                continue
            x = [report["bf16_bytes"] / each["bytes"] for each in points]
            y = [max(each["rise_percent"], 0.01) for each in points]
            low = [min(each["stderr"], 0.9 * value) for each, value in zip(points, y, strict=True)]
            axes.errorbar(
                x, y, yerr=[low, [each["stderr"] for each in points]], color=colour, marker=marker, markersize=5,
                linewidth=1.4 if kind == "planned" else 0, elinewidth=0.9, label=kind,
            )  # fmt: skip
            if kind != "planned":
                for each, across, up in zip(points, x, y, strict=True):
                    axes.annotate(each["name"], (across, up), xytext=(5, 3), textcoords="offset points", fontsize=7)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks([1, 2, 4, 8, 14], ["1", "2", "4", "8", "14"])
        axes.set_xlim(0.95, 17)
        axes.minorticks_off()
        axes.set_xlabel("times smaller than bf16, all files of the store")
        axes.set_ylabel("rise of the perplexity (%); 0.01 or less at the foot")
        axes.grid(visible=True, color="0.9", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.legend(frameon=False)
        axes.set_title(f"{report['model']}, {report['tokens']:,} tokens of unseen text")
        figure.savefig(image, dpi=160)


if __name__ == "__main__":
    main()
