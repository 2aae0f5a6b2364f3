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


def render(text: str) -> str:
    """`text` with every generated section made anew."""
    sections = {"demo": demo_table(json.loads((RESULTS / "demo.json").read_text()))}
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
