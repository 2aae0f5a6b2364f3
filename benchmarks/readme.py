"""Write the README's tables from the committed results; `--check` only says whether they agree."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def demo_table(results: dict) -> str:
    """The demo's figures as Markdown, and where they come from."""
    models = results["models"]
    labels = list(dict.fromkeys(label for figures in models.values() for label in figures))
    lines = [f"| | {' | '.join(models)} |", f"|---|{'---:|' * len(models)}"]
    for label in labels:
        cells = [f"{figures[label]:,.4g}" if label in figures else "" for figures in models.values()]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    where = results["provenance"]
    lines += ["", f"{where['cpu']}, torch {where['torch']}, Python {where['python']}, commit {where['commit']}."]
    return "\n".join(lines)


def train_table(results: dict) -> str:
    """Training speed, its bound and memory as Markdown, each model beside the dense one of its size and step."""
    entries = results["entries"]
    dense = {(entry["size"], entry["batch_tokens"]): entry for entry in entries if entry["variant"] == "dense"}
    lines = [
        "| | tokens a step | tokens/s | to dense | bounds, to dense | of its bound | FLOPs a token, to dense | "
        "of the matrix rate | peak memory, GB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for entry in entries:
        base = dense[entry["size"], entry["batch_tokens"]]
        name = {"flex3": "flex-3"}.get(entry["variant"], entry["variant"])
        cells = [
            f"{entry['size']} {name}",
            f"{entry['batch_tokens']:,}",
            f"{entry['tokens_per_s']:,.0f}",
            f"{entry['tokens_per_s'] / base['tokens_per_s']:.2f}",
            f"{entry['bound_tokens_per_s'] / base['bound_tokens_per_s']:.2f}",
            f"{entry['tokens_per_s'] / entry['bound_tokens_per_s']:.0%}",
            f"1 / {base['flops_per_token'] / entry['flops_per_token']:.2f}",
            f"{entry['mfu']:.0%}",
            f"{entry['peak_memory_bytes'] / 1e9:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    where = results["provenance"]
    lines += ["", f"{where['gpu']}, torch {where['torch']}, Python {where['python']}, commit {where['commit']}."]
    return "\n".join(lines)


def render(text: str) -> str:
    """`text` with every generated section made anew."""
    sections = {
        "demo": demo_table(json.loads((RESULTS / "demo.json").read_text())),
        "train": train_table(json.loads((RESULTS / "train.json").read_text())),
    }
    for name, content in sections.items():
        pattern = rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- /{name} -->)"
        text, count = re.subn(pattern, lambda match, new=content: f"{match[1]}{new}\n{match[2]}", text, flags=re.DOTALL)
        assert count == 1, f"README.md has {count} sections {name!r}"
    return text


def main() -> int:
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = render(before)
    if "--check" in sys.argv:
        print("README.md agrees with benchmarks/results" if before == after else "README.md is not up to date")
        return int(before != after)
    readme.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
