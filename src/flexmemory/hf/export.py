"""Modeling files beside the weights, for `trust_remote_code`: the package's own sources, joined, with no need of it.

    configuration_flex_memory.py    config.py and hf/configuration_flex_memory.py
    modeling_flex_memory.py         the core model and hf/modeling_flex_memory.py

They import PyTorch, transformers and what that needs. Shapes in signatures stay as strings, which nothing evaluates.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

from flexmemory import __version__
from flexmemory.storage import read_json, sha256_file, write_json

CONFIGURATION = "flexmemory.hf.configuration_flex_memory"
MODELING = "flexmemory.hf.modeling_flex_memory"
AUTO_MAP = {
    "AutoConfig": "configuration_flex_memory.FlexMemoryConfig",
    "AutoModel": "modeling_flex_memory.FlexMemoryModel",
    "AutoModelForCausalLM": "modeling_flex_memory.FlexMemoryForCausalLM",
}


def export_code(folder: str | Path) -> None:
    """Write the modeling files into a folder with a model, and name them in its config.json.

    A checkpoint of this package stays one.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it is damaged, or of another kind of model.
    """
    folder = Path(folder)
    values = read_json(folder / "config.json")
    if values.get("model_type") != "flex_memory":
        raise ValueError(f"{folder}/config.json is of model_type {values.get('model_type')!r}, expected 'flex_memory'")
    configuration = _with_needed(CONFIGURATION, known=[])
    modeling = _with_needed(MODELING, known=configuration)
    for name, modules in ((CONFIGURATION, configuration), (MODELING, modeling)):
        (folder / f"{name.rpartition('.')[2]}.py").write_text(_joined(modules, beside=configuration), encoding="utf-8")
    write_json(folder / "config.json", {**values, "auto_map": AUTO_MAP})
    manifest = folder / "manifest.json"
    if manifest.is_file():
        sealed, config = read_json(manifest), folder / "config.json"
        sealed["files"]["config.json"] = {"bytes": config.stat().st_size, "sha256": sha256_file(config)}
        write_json(manifest, sealed)


def _with_needed(module: str, *, known: list[str]) -> list[str]:
    """`module` and the modules of this package that it imports, but for those that are `known`, in order of need."""
    found: list[str] = []
    for node in _parsed(module).body:
        if isinstance(node, ast.ImportFrom) and _is_ours(node):
            assert node.module is not None
            found += [name for name in _with_needed(node.module, known=known) if name not in found]
    return found if module in known else [*found, module]


def _joined(modules: list[str], *, beside: list[str]) -> str:
    """One source of several modules; what they import of those `beside` comes from the configuration's file."""
    imports: set[str] = set()
    borrowed: set[str] = set()
    bodies = []
    for module in modules:
        tree = _parsed(module)
        lines = _path(module).read_text(encoding="utf-8").splitlines()
        first = tree.body[0]
        assert isinstance(first, ast.Expr), f"{module} has no docstring"
        _blank(lines, first)
        for node in tree.body:
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            _blank(lines, node)
            source = node.module if isinstance(node, ast.ImportFrom) else None
            if isinstance(node, ast.ImportFrom) and _is_ours(node):
                borrowed |= {alias.name for alias in node.names if source in beside and source not in modules}
            elif source not in ("__future__", "jaxtyping"):
                imports.add(ast.unparse(node))
        bodies.append("\n".join(lines).strip())
    if borrowed:
        imports.add(f"from .{CONFIGURATION.rpartition('.')[2]} import {', '.join(sorted(borrowed))}")
    title = f'"""Joined from the sources of flexmemory {__version__} (Apache-2.0); change those, not this."""'
    return "\n\n".join([title, "from __future__ import annotations", "\n".join(sorted(imports)), *bodies]) + "\n"


def _is_ours(node: ast.ImportFrom) -> bool:
    return node.module is not None and node.module.split(".")[0] == "flexmemory"


def _blank(lines: list[str], node: ast.stmt) -> None:
    assert node.end_lineno is not None
    for number in range(node.lineno - 1, node.end_lineno):
        lines[number] = ""


def _path(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)


def _parsed(module: str) -> ast.Module:
    return ast.parse(_path(module).read_text(encoding="utf-8"))
