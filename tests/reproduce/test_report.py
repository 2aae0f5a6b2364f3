"""The page that is committed is that of the committed results; verdicts follow from numbers."""

import json
from pathlib import Path

import pytest

from flexmemory.reproduce import report
from flexmemory.reproduce.claims import claims
from flexmemory.reproduce.found import Found

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "study", ROOT / "docs" / "study.md"


def test_the_page_is_that_of_the_results():
    images = {name: f"images/study-{name}.png" for name in report.CAPTIONS}
    assert report.text(Found(RESULTS), images) == PAGE.read_text(), (
        "run `flexmemory reproduce --parts page --results benchmarks/results/study --page docs/study.md`"
    )
    assert all((PAGE.parent / image).exists() for image in images.values())


SPEED = {"base": 1000.0, "memory": 800.0}


def run(variant, ppl_nats, *, tokens=100, seed=0, active=1000, lr=1e-3):
    text = {"nats": ppl_nats, "stderr": 0.01, "perplexity": 1.0, "perplexity_stderr": 0.1}
    return {
        "size": "nano", "variant": variant, "seed": seed, "lr": lr, "tokens": tokens,
        "parameters": {"active": active, "backbone": 2000, "embedding": 64},
        "model": {"hidden_size": 8}, "texts": {"held-out": text}, "tasks": {},
    }  # fmt: skip


def verdict(folder, runs, claim):
    entries = {str(number): each for number, each in enumerate(runs)}
    where = {"gpu": "none", "cpu": "a CPU", "torch": "2", "commit": "c"}
    (folder / "quality.json").write_text(json.dumps({"provenance": [where], "entries": entries}))
    found = Found(folder)
    report.text(found, {})
    return next(each.verdict for each in claims(found) if each.claim.startswith(claim))


@pytest.mark.parametrize(
    ("memory", "expected"),
    [(3.2, "holds"), (3.01, "holds in direction"), (2.9, "does not hold here")],
)
def test_behind_the_base_beyond_what_seeds_differ_by(tmp_path, memory, expected):
    runs = [run("base", 3.0), run("base", 3.02, seed=1), run("memory", memory)]
    assert verdict(tmp_path, runs, "MemoryLLM is behind") == expected


@pytest.mark.parametrize(("last", "expected"), [(2.8, "holds"), (3.4, "does not hold here")])
def test_a_gap_closes_or_does_not(tmp_path, last, expected):
    runs = [
        run("base", 3.0), run("memory", 3.3),
        run("base", 2.7, tokens=200), run("memory", last, tokens=200),
    ]  # fmt: skip
    assert verdict(tmp_path, runs, "The gap from the base to memory") == expected


def test_what_was_not_measured_cannot_be_told(tmp_path):
    assert verdict(tmp_path, [run("base", 3.0)], "Rows in 4 bits") == "cannot be told here"


@pytest.mark.parametrize(("flex3", "expected"), [(1.2, "holds"), (2.5, "holds in direction")])
def test_the_order_of_costs(tmp_path, flex3, expected):
    """Of the shape that the paper has; flex-3 above the base is one step of four."""
    times = {"base": 2.0, "memory": 0.5, "flex1": 0.8, "flex2": 1.0, "flex3": flex3}
    entries = {
        f"{family}-{variant}": {
            "variant": variant, "context": 2048, "ms_per_token": time, "peak_bytes": 1e9 * time, "bound_share": 0.5
        }
        for family in ("1b", "nano") for variant, time in times.items()
    }  # fmt: skip
    where = {"gpu": "none", "cpu": "a CPU", "torch": "2", "commit": "c"}
    (tmp_path / "cost.json").write_text(json.dumps({"provenance": [where], "entries": entries}))
    assert verdict(tmp_path, [run("base", 3.0)], "A token of memory") == expected
    page = report.text(Found(tmp_path), {})
    assert page.count("| memory | 0.500 | 14.42 | 0.500 | 6.041 | 50 % |") == 1


def test_the_rate_is_the_best_of_the_base_at_the_tokens_of_all(tmp_path):
    """Not that of a sweep at fewer; at equal time both have the rate of the run that was trained for it."""
    runs = [
        run("base", 3.5, tokens=50), run("base", 3.4, tokens=50, lr=5e-4),
        run("base", 3.0), run("base", 3.1, lr=5e-4), run("memory", 3.2), run("memory", 3.3, tokens=80, lr=5e-4),
    ]  # fmt: skip
    rates = {f"nano-{name}": {"size": "nano", "variant": name, "tokens_per_s": rate} for name, rate in SPEED.items()}
    (tmp_path / "speed.json").write_text(json.dumps({"provenance": [], "entries": rates}))
    assert verdict(tmp_path, runs, "MemoryLLM is behind") == "holds"
    found = Found(tmp_path)
    assert found.lr("nano") == 1e-3
    assert found.equal_time("nano", "memory") == (runs[3], runs[5])
    page = report.text(found, {})
    assert "| nano memory | 800 | 0.80 | 0.0005 | 8e-05M | 22.20 | 27.11 | +22.1 % |" in page
    assert "edge of those tried at 0.0001M tokens (0.0005, 0.001)" in page
    assert "with 5e-05M tokens the base is better at 0.0005 (30.0) than at the rate of all others (33.1)" in page


def test_there_must_be_results(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no quality\.json: run `flexmemory reproduce` first"):
        Found(tmp_path)
