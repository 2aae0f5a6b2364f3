"""The table of docs/serving.md is that of the committed results."""

import json

from tests.cli.conftest import REPOSITORY, load_script


def test_the_table_is_that_of_the_results():
    module = load_script("benchmarks/serve.py")
    results = json.loads((REPOSITORY / "benchmarks" / "results" / "serve.json").read_text(encoding="utf-8"))
    text = module.GUIDE.read_text(encoding="utf-8")
    assert module.render(text, results) == text
    assert "0 lost" in module.table(results)
    assert "3 lost" in module.table(results | {"completed": results["completed"] - 3})
