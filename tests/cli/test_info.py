"""`flexmemory info` prints the counts of the paper."""

import re

import pytest

from flexmemory.model.checkpoint import Checkpoint
from tests.cli.conftest import run


def figures(text: str) -> dict[str, str]:
    """First figure of each labelled line."""
    return dict(re.findall(r"^  ([A-Za-z][A-Za-z0-9-]*(?: \S+)?) +([\d,.]+)", text, flags=re.MULTILINE))


def test_flex3_at_1b():
    shown = figures(run("info", "1b-flex3"))
    assert (shown["attention"], shown["FFN-C"], shown["memory"]) == ("402.653", "301.990", "504.054")
    assert (shown["total"], shown["resident"], shown["embedding"]) == ("1,208.797", "704.743", "262.668")
    assert (shown["bf16"], shown["fp32"]) == ("12.608", "25.216")
    assert shown["all"] == "2,136.25"


def test_operations_depend_on_the_unique_share():
    memory, dense = run("info", "1b-memory"), run("info", "1b-base")
    assert "unique 100%        9.430 G" in memory
    assert "9.430 G" in dense
    shares = [float(value) for value in re.findall(r"unique +\d+% +([\d.]+) G", memory)]
    assert shares == sorted(shares, reverse=True)
    assert len(shares) == 5


def test_context_counts_the_cache():
    short, long = (run("info", "250m-base", "--context", context) for context in ("100", "1000"))
    assert re.search(r"KV cache +9.22 MB", short)  # 2 * 24 * 960 * 100 * 2
    assert re.search(r"KV cache +92.16 MB", long)


def test_a_checkpoint_is_its_preset(walkthrough):
    checkpoint = run("info", walkthrough / "runs/flex3").splitlines()
    preset = run("info", "nano-flex3").splitlines()
    assert checkpoint[1:] == preset[1:]


@pytest.mark.parametrize(("target", "message"), [("1b-flx3", "did you mean '1b-flex3'"), ("nowhere", "unknown preset")])
def test_unknown_targets(target, message, refused):
    assert message in refused("info", target)


def test_a_folder_that_is_no_checkpoint(tmp_path, refused):
    assert "no checkpoint in" in refused("info", tmp_path)


def test_a_budget_is_planned_without_loading(walkthrough, exact_store, monkeypatch, refused):
    monkeypatch.setattr(Checkpoint, "load", None)
    plan = run("info", "1b-memory", "--memory-budget", "8GB", "--host-budget", "16GiB", "--int8", "all").splitlines()
    assert [line.split("  ")[0] for line in plan] == [
        "weights", "embedding", "KV cache", "workspace", "total", "total",
    ]  # fmt: skip
    assert plan[-2].endswith("of 8.00 GB")
    assert plan[-1].endswith("of 17.18 GB")
    folder = walkthrough / "runs/flex3"
    on_cpu = run("info", folder, "--memory-budget", "1GB", "--tol", exact_store)
    assert re.search(r"^rows +disk ", on_cpu, flags=re.MULTILINE)
    assert re.search(r"^rows +device ", run(
        "info", folder, "--memory-budget", "1GB", "--host-budget", "1GB", "--tol", exact_store
    ), flags=re.MULTILINE)  # fmt: skip
    short, long = (run("info", "1b-memory", "--memory-budget", "9GB", "--context", n) for n in ("100", "200"))
    assert re.search(r"KV cache +device +19\.66 MB", short)  # 2 * 2 * 24 * 2048 * 100
    assert re.search(r"KV cache +device +39\.32 MB", long)
    assert "too small" in refused("info", "1b-memory", "--memory-budget", "1GB")
    assert "give --memory-budget too" in refused("info", "1b-memory", "--int8", "all")
    assert "is of one checkpoint" in refused("info", "1b-memory", "--memory-budget", "9GB", "--tol", exact_store)
