"""For mkdocs: the README as the first page, and links to files of the repository as plain text."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: Any) -> Files:
    """Add `index.md`, made of README.md."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Keep the words of links that lead out of the site's pages; the repository's own tests check those links."""

    def keep(match: re.Match[str]) -> str:
        target = match[3].partition("#")[0]
        inside = not target or "://" in target or files.get_file_from_path(target) is not None
        return match[0] if inside else match[2]

    return re.sub(r"(?<!!)(\[([^\]\[]+)\]\(([^)\s]+)\))", keep, markdown)
