"""benchmarks/findings.py measures what a file of results lacks, and refuses one of other settings."""

import json
import sys
from types import ModuleType

import pytest
import torch

from tests.cli.conftest import REPOSITORY, load_script


@pytest.fixture(scope="module")
def findings() -> ModuleType:
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    try:
        return load_script("benchmarks/findings.py")
    finally:
        sys.path.pop(0)


def test_only_what_is_missing_is_measured(findings):
    made, saved = [], []

    def space(name):
        def make():
            made.append(name)
            return findings.Space(points=torch.eye(3), keys=torch.zeros(3, 1, dtype=torch.int64))

        return make

    parts = {"first": lambda *_: {"a": 1}, "second": lambda space, scaled: {"b": scaled.shape[0]}}
    results = {"model": "m", "first": {"layer 0": {"a": 0}}}
    measured: dict[str, list[str]] = {}
    spaces = {name: space(name) for name in ("layer 0", "dense layer 0")}
    findings.measure_missing(results, parts, spaces, measured=measured, save=lambda: saved.append(dict(measured)))
    assert results["first"] == {"layer 0": {"a": 0}, "dense layer 0": {"a": 1}}
    assert results["second"] == {"layer 0": {"b": 3}, "dense layer 0": {"b": 3}}
    assert measured == {"first": ["dense layer 0"], "second": ["layer 0", "dense layer 0"]}
    assert made == ["dense layer 0", "layer 0", "dense layer 0"]
    assert len(saved) == 3


def test_results_of_other_settings_are_refused(findings, tmp_path):
    file = tmp_path / "findings.json"
    assert findings.results_of(file, {"tokens": 8}) == {"runs": [], "tokens": 8}
    file.write_text(json.dumps({"runs": [1], "tokens": 8, "seed": 0, "sharing": {}}))
    assert findings.results_of(file, {"tokens": 8, "judge": {"window": 5}}) == {
        "runs": [1], "tokens": 8, "seed": 0, "sharing": {}, "judge": {"window": 5},
    }  # fmt: skip
    with pytest.raises(ValueError, match="results of another tokens, seed: give another --out"):
        findings.results_of(file, {"tokens": 9, "seed": 1})
