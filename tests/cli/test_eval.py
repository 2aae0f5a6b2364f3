"""`flexmemory eval`: perplexity of text or prepared data, and tasks; from either source of rows."""

import json
import re

import pytest

from flexmemory.evaluate.tasks import TASKS
from tests.cli.conftest import run
from tests.evaluate.task_records import write_records


def figure(output: str, label: str) -> float:
    found = re.search(rf"^{label} +([\d.,]+)", output, flags=re.MULTILINE)
    assert found is not None, output
    return float(found[1].replace(",", ""))


@pytest.fixture
def ppl(walkthrough):
    def output(*options, data="runs/data"):
        return run("eval", "ppl", walkthrough / "runs/flex3", "--data", walkthrough / data, *options)

    return output


def test_lookups_score_as_computing_does(ppl, walkthrough, exact_store):
    computed = ppl()
    for place in ("device", "host", "disk"):
        looked_up = ppl("--tol", exact_store, "--rows", place)
        assert figure(looked_up, "nats per token") == pytest.approx(figure(computed, "nats per token"), abs=2e-5)
    bf16 = ppl("--tol", walkthrough / "runs/tol")
    assert figure(bf16, "nats per token") == pytest.approx(figure(computed, "nats per token"), abs=5e-3)


def test_probes_change_the_score(ppl):
    whole = figure(ppl(), "perplexity")
    assert figure(ppl("--alpha", "1.0"), "perplexity") == whole
    assert figure(ppl("--alpha", "0.0"), "perplexity") == figure(ppl("--drop-layers", "0", "1", "2"), "perplexity")
    assert figure(ppl("--drop-layers", "0"), "perplexity") != whole


def test_int8_scores_almost_the_same_with_fewer_bytes(ppl, caplog):
    caplog.set_level("INFO")
    whole, head, every = (
        figure(ppl(*options), "nats per token") for options in ((), ("--int8", "head"), ("--int8", "all"))
    )
    assert (head, every) == pytest.approx((whole, whole), abs=0.02)
    exact, _, smallest = (float(size) for size in re.findall(r"([\d.]+) MB of weights", caplog.text))
    assert smallest < exact


def test_text_has_words_and_bytes(ppl, walkthrough):
    text = (walkthrough / "README.md").read_text(encoding="utf-8")
    output = ppl(data="README.md")
    assert f"({len(text.encode()):,} bytes)" in output
    assert f"({len(text.split()):,} words)" in output
    nats = figure(output, "nats per token") * figure(output, "tokens")
    assert figure(output, "bits per byte") == pytest.approx(nats / 0.693147 / len(text.encode()), rel=1e-3)


def test_prepared_data_knows_its_bytes_unless_cut(ppl):
    assert "bytes)" in ppl("--split", "train", "--max-tokens", "10000000")
    cut = ppl("--split", "train", "--max-tokens", "300")
    assert figure(cut, "tokens") == 299
    assert "bits per byte" not in cut


def test_mistakes(walkthrough, tmp_path, refused):
    run_folder = walkthrough / "runs/flex3"

    def refusal(*options, data=walkthrough / "runs/data"):
        return refused("eval", "ppl", run_folder, "--data", data, *options)

    for layer in ("3", "-1"):
        message = f"layer {layer} cannot be dropped: the model has layers 0 to 2"
        assert refusal("--drop-layers", layer) == message
    assert "sequences of 65 tokens do not fit the model" in refusal("--seq-len", "65")
    assert "no such file or folder" in refusal(data=tmp_path / "none.txt")
    (tmp_path / "binary.txt").write_bytes(b"\x00\x01\x02")
    assert "binary.txt" in refusal(data=tmp_path / "binary.txt")
    run("prepare", walkthrough / "docs", "--out", tmp_path / "other", "--vocab-size", "300")
    assert "was prepared with another tokenizer" in refusal(data=tmp_path / "other")
    tokenizer = ("--tokenizer", walkthrough / "runs/data")
    run("prepare", walkthrough / "README.md", "--out", tmp_path / "single", *tokenizer)
    assert "has no validation split" in refusal(data=tmp_path / "single")


@pytest.fixture
def tasks(walkthrough, tmp_path):
    folder = write_records(tmp_path / "tasks")

    def output(*options):
        return run("eval", "tasks", walkthrough / "runs/flex3", "--data", folder, *options)

    return output


def test_tasks(tasks, tmp_path, exact_store):
    shown = tasks("--out", tmp_path / "new" / "scores.json")
    saved = json.loads((tmp_path / "new" / "scores.json").read_text())
    assert list(saved["tasks"]) == list(TASKS)
    assert [line.split()[:3:2] for line in shown.splitlines()[1:]] == [
        [name, metric] for name in TASKS for metric in saved["tasks"][name]["metrics"]
    ]
    perplexity = saved["tasks"]["lambada_openai"]["metrics"]["perplexity"]
    assert f"{perplexity['value']:.4f}" in shown
    assert f"{perplexity['stderr']:.4f}" in shown
    assert saved["settings"]["rows"] == "compute"
    looked_up = tasks("--tol", exact_store, "--rows", "disk", "--batch-tokens", "64", "--out", tmp_path / "disk.json")
    assert looked_up.splitlines()[0] == shown.splitlines()[0]
    found = json.loads((tmp_path / "disk.json").read_text())["tasks"]["lambada_openai"]["results"]["perplexity"]
    assert found == pytest.approx(saved["tasks"]["lambada_openai"]["results"]["perplexity"], abs=1e-3)


def test_some_tasks_with_probes(tasks):
    chosen = ("--tasks", "boolq", "lambada_openai")
    whole = tasks(*chosen)
    assert [line.split()[:2] for line in whole.splitlines()[1:]] == [
        ["boolq", "2"], ["lambada_openai", "2"], ["lambada_openai", "2"],
    ]  # fmt: skip
    assert tasks(*chosen, "--alpha", "1.0") == whole
    assert tasks(*chosen, "--alpha", "0.5") != whole
    assert "nan" in tasks(*chosen, "--limit", "1")


def test_mistakes_with_tasks(walkthrough, tmp_path, refused):
    start = ("eval", "tasks", walkthrough / "runs/flex3", "--data", tmp_path)
    assert "unknown task 'piq'; did you mean 'piqa'?" in refused(*start, "--tasks", "piq")
    assert "task lambada_openai needs one of" in refused(*start)
    assert "layer 3 cannot be dropped" in refused(*start, "--drop-layers", "3")
