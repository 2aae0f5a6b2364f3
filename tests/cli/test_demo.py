"""`flexmemory demo`, at the nano size."""

import json
import re

from flexmemory.cli import main
from tests.cli.conftest import run


def test_demo_trains_builds_and_generates_and_goes_on_where_it_was(walkthrough, tmp_path):
    options = ("--out", tmp_path / "demo", "--data", walkthrough / "docs", "--size", "nano", "--total-tokens", "2048")
    shown = run("demo", *options)
    results = json.loads((tmp_path / "demo/demo.json").read_text())
    models = results["models"]
    assert list(models) == ["base", "memory", "flex3"]
    assert models["memory"]["parameters, resident (M)"] < 0.6 * models["base"]["parameters, resident (M)"]
    for variant in ("memory", "flex3"):
        figures = models[variant]
        assert figures["largest logit difference, fp32 rows"] < 1e-4
        assert figures["largest logit difference, bf16 rows"] < 5e-2
        assert figures["ToL in fp32 (MB)"] == 2 * figures["ToL in bf16 (MB)"]
    for label in models["memory"]:
        assert label in shown
    assert "rows on disk:" in shown
    nearest = shown.partition("nearest tokens by memory coefficients")[2].splitlines()[1:]
    assert [len(re.findall(r" -?[01]\.\d\d\b", line)) for line in nearest] == [5] * 5
    assert (tmp_path / "demo/losses.png").read_bytes().startswith(b"\x89PNG")
    assert results["provenance"]["torch"]

    weights = sorted((tmp_path / "demo").glob("*/checkpoints/*/model.safetensors"))
    before = {path: path.stat().st_mtime_ns for path in weights}
    again = run("demo", *options)
    assert {path: path.stat().st_mtime_ns for path in weights} == before
    perplexities = r"validation perplexity.*"
    assert re.findall(perplexities, again) == re.findall(perplexities, shown)


def test_one_document_cannot_be_held_out(tmp_path, refused):
    (tmp_path / "only.txt").write_text("a single document, long enough for one short sequence. " * 60)
    options = ("--out", tmp_path / "demo", "--data", tmp_path / "only.txt", "--size", "nano", "--total-tokens", "512")
    assert "so that one can be held out" in refused("demo", *options)
    assert main(["demo", "--size", "nanno"]) == 2
