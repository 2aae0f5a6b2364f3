"""The table of docs/serving.md is that of the committed results."""

import importlib.util
import json
import sys

from tests.cli.conftest import REPOSITORY


def test_the_table_is_that_of_the_results(monkeypatch):
    spec = importlib.util.spec_from_file_location("serve_benchmark", REPOSITORY / "benchmarks" / "serve.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # its dataclasses look there
    spec.loader.exec_module(module)
    results = json.loads((REPOSITORY / "benchmarks" / "results" / "serve.json").read_text(encoding="utf-8"))
    text = module.GUIDE.read_text(encoding="utf-8")
    assert module.render(text, results) == text
    assert "0 lost" in module.table(results)
    assert "3 lost" in module.table(results | {"completed": results["completed"] - 3})
