"""docs/scaling.md holds what train/cost.py and the committed results give."""

import json
import shutil
from types import ModuleType

import pytest

from tests.cli.conftest import REPOSITORY, load_script

SAMPLE = {
    "entries": [
        {
            "size": "1b",
            "variant": variant,
            "batch_tokens": 131_072,
            "tokens_per_s": tokens_per_s,
            "flops_per_token": 1.0,
            "matmul_flops_per_s": 8e14,
            "peak_memory_bytes": 60_000_000_000,
            "unique_share": share,
        }
        for variant, tokens_per_s, share in (("dense", 60_000, None), ("memory", 90_000, 0.12), ("flex3", 75_000, 0.12))
    ],
    "provenance": {"gpu": "NVIDIA H200", "torch": "2.11.0", "commit": "abc"},
}
PAGE = (REPOSITORY / "docs" / "scaling.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    return load_script("benchmarks/scaling.py")


def test_the_page_is_that_of_its_sources(scaling):
    assert scaling.render(PAGE, scaling.Figures()) == PAGE
    assert scaling.render(PAGE.replace("| 8 | 0.5M |", "| 8 | 5M |"), scaling.Figures()) == PAGE


def test_measurements_are_rendered_once_they_are_there(scaling, tmp_path):
    for name in ("train_prototype.json", "unique_ids.json"):
        shutil.copy(scaling.RESULTS / name, tmp_path)
    (tmp_path / "train.json").write_text(json.dumps(SAMPLE))
    figures = scaling.Figures(tmp_path)
    assert figures.rates.matmul_flops_per_s == 60_000 * scaling.train_flops_per_token(
        scaling.model("dense"), unique_share=0.0
    )
    page = scaling.render(PAGE, figures)
    section = page.partition("## Checked against measurement")[2]
    dense, memory, flex = (line.split(" | ") for line in section.splitlines() if line.startswith("| 1b |"))
    assert dense[4:8] == ["60,000", "566 (71%)", "1.00", ""]
    assert memory[3:5] == ["12.0%", "90,000"]
    assert memory[6] == "1.50"
    assert 1.6 < float(memory[7]) < 1.83 < 1.9  # below the bound by operations alone
    predicted = float(memory[7]) * 60_000
    assert float(memory[8].rstrip("%")) == pytest.approx(100 * (predicted / 90_000 - 1), abs=0.5)
    assert float(flex[7]) < float(memory[7])
    assert memory[9] == "60.0"
    assert "NVIDIA H200" in section
    assert scaling.render(page, scaling.Figures(tmp_path)) == page


def test_the_law_finds_a_curve_of_its_own_kind():
    unique_ids = load_script("benchmarks/unique_ids.py")
    tokens = 2.0 ** unique_ids.np.arange(11, 25)
    unique = unique_ids.law_at([0.3, 0.8, 11.0, -0.4], tokens, vocab_size=10**6)
    points = [{"tokens": n, "unique": u} for n, u in zip(tokens, unique, strict=True)]
    law = unique_ids.law(points, vocab_size=10**6)
    assert list(law["parameters"].values()) == pytest.approx([0.3, 0.8, 11.0, -0.4], abs=0.02)
    assert law["largest_error"] < 1e-3
    assert max(map(abs, law["fitted_to_1M_error_by_tokens"].values())) < 0.02
    assert unique_ids.law_at([0.3, 0.8, 11.0, -0.4], tokens, vocab_size=1000).max() == 1000


def test_curves_count_distinct_ids():
    unique_ids = load_script("benchmarks/unique_ids.py")
    windows = unique_ids.np.array([[1, 1, 2], [2, 3, 3], [0, 0, 0], [4, 4, 4], [5, 6, 7]])
    points = unique_ids.curve(windows, vocab_size=8)
    assert [point["unique"] for point in points] == [9 / 5, 2.5, 5]
    assert [point["draws"] for point in points] == [5, 2, 1]
