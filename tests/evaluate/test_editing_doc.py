"""The tables of docs/editing-evaluation.md are those of the committed results, and say what must hold anywhere."""

import json
from types import ModuleType

import pytest

from tests.cli.conftest import REPOSITORY, load_script


@pytest.fixture(scope="module")
def report() -> ModuleType:
    return load_script("benchmarks/editing_report.py")


@pytest.fixture(scope="module")
def results(report) -> dict:
    return json.loads(report.RESULTS.read_text())


def test_tables_are_those_of_the_results(report, results):
    text = report.DOCUMENT.read_text()
    assert report.render(text, results) == text
    assert (
        report.render(
            text.replace("| MemoryLLM, one token | 1,000 | 95.8", "| MemoryLLM, one token | 1,000 | 11.1"), results
        )
        == text
    )


def test_editing_rows_changed_no_bit_of_text_without_the_token(results):
    found = json.dumps(results)
    assert '"lacking_identical"' in found
    rows = [line for line in (REPOSITORY / "docs/editing-evaluation.md").read_text().splitlines() if ": row" in line]
    locality = [line for line in rows if line.count("|") == 9 and "| 0 | 0.00 |" in line]
    assert len(locality) == 12  # six methods of two models
    assert all(line.endswith("| 0 | 0.0 ± 0.0 | 100.0 ± 0.0 |") for line in locality)
