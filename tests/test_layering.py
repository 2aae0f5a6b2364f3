"""Imports run one way: config <- model <- {train, tol}; tol <- engine <- evaluate; interpret <- serve; engine <- hf."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "flexmemory"
BASE = {"config", "presets", "storage", "tokenizer", "device", "provenance", "__init__"}
ALLOWED = {
    "config": set(),
    "storage": set(),
    "device": set(),
    "provenance": {"__init__"},
    "__init__": set(),
    "presets": {"config"},
    "schema": {"config"},
    "tokenizer": {"storage"},
    "model": BASE,
    "train": BASE | {"model"},
    "tol": BASE | {"model"},
    "export": BASE | {"model"},
    "hub": BASE | {"model", "tol"},
    "convert": BASE | {"model"},
    "engine": BASE | {"model", "tol"},
    "interpret": BASE | {"model", "tol"},
    "serve": BASE | {"model", "tol", "engine", "interpret", "evaluate"},
    "evaluate": BASE | {"model", "tol", "engine", "interpret"},
    "hf": BASE | {"model", "tol", "engine"},
    "reproduce": BASE | {"model", "train", "tol", "engine", "interpret", "evaluate"},
}
EVERYTHING = {"cli", "__main__"}


def imported(path: Path) -> set[str]:
    """First components under `flexmemory` of all that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [
                f"{node.module}.{alias.name}" if node.module == "flexmemory" else node.module for alias in node.names
            ]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        parts = [name.split(".") for name in names if name and name.split(".")[0] == "flexmemory"]
        found |= {part[1] if len(part) > 1 else "__init__" for part in parts}
    return {"__init__" if name == "__version__" else name for name in found}


def test_imports_run_one_way():
    for path in SOURCE.rglob("*.py"):
        package = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if package in EVERYTHING:
            continue
        assert package in ALLOWED, f"{path}: say in this test what {package} may import"
        extra = imported(path) - ALLOWED[package] - {package}
        assert not extra, f"{path} imports {extra}"


def test_no_vague_names_and_no_long_files():
    for path in SOURCE.rglob("*.py"):
        assert path.stem not in {"utils", "util", "common", "helpers", "misc"}, path
        assert len(path.read_text().splitlines()) <= 400, f"{path} is longer than 400 lines"


def test_nothing_unpickles():
    for path in SOURCE.rglob("*.py"):
        text = path.read_text()
        assert "pickle" not in text.replace("allow_pickle=False", ""), path
        assert "torch.load(" not in text, path
