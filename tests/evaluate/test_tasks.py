"""Files to requests, answers to figures; `test_harness.py` compares both with the harness itself."""

import contextlib
import dataclasses
import gzip
import json
import lzma
import math
import re

import numpy as np
import pytest
import torch

from flexmemory.evaluate.likelihood import Likelihoods, Request, encode_requests
from flexmemory.evaluate.probes import scaled_ffn
from flexmemory.evaluate.tasks import (
    TASKS,
    Document,
    EncodedTasks,
    Task,
    TaskScore,
    load_task,
    paired_difference,
    score_tasks,
    task_score,
)
from tests.cli.conftest import REPOSITORY
from tests.conftest import VARIED, random_model
from tests.evaluate.task_records import RECORDS, write_records
from tests.evaluate.test_likelihood import naive


@pytest.fixture
def folder(tmp_path):
    return write_records(tmp_path / "tasks")


def test_every_task_is_tested():
    assert set(RECORDS) == set(TASKS)


def test_the_options_of_winogrande_are_in_the_contexts(folder):
    first, second = load_task("winogrande", folder).documents
    start = "The cup did not fit in the box because "
    assert first.requests == (
        Request(f"{start}the cup", " was too large."),
        Request(f"{start}the box", " was too large."),
    )
    assert second.requests[1] == Request("Ann paid Bea since Ann", " owed money.")
    assert (first.gold, second.gold) == (0, 1)


def test_original_schemas_are_read_too(folder, tmp_path):
    cleaned = load_task("hellaswag", folder).documents
    originals = {
        "hellaswag_val_1000": [
            {"ind": 0, "query": document.requests[0].context, "label": document.gold,
             "endings": [request.continuation[1:] for request in document.requests]}
            for document in cleaned
        ],
        "arc_easy_test": [
            {"id": record["id"], "answerKey": record["answerKey"], "question": {
                "stem": record["question"],
                "choices": [{"text": text, "label": label} for text, label in zip(
                    record["choices"]["text"], record["choices"]["label"], strict=True)]}}
            for record in RECORDS["arc_easy"]
        ],
        "boolq_dev": [
            {"question": record["question"], "passage": record["passage"], "answer": bool(record["label"])}
            for record in RECORDS["boolq"]
        ],
    }  # fmt: skip
    other = write_records(tmp_path / "originals", originals)
    for name in ("hellaswag", "arc_easy", "boolq"):
        assert load_task(name, other) == load_task(name, folder)


@pytest.mark.parametrize(("suffix", "opener"), [(".xz", lzma.open), (".gz", gzip.open)])
def test_compressed_files(folder, tmp_path, suffix, opener):
    with opener(tmp_path / f"piqa_valid.jsonl{suffix}", "wt", encoding="utf-8") as file:
        file.write((folder / "piqa.jsonl").read_text())
    assert load_task("piqa", tmp_path) == load_task("piqa", folder)
    assert len(load_task("piqa", tmp_path, limit=1).documents) == 1


def test_mistakes(folder, tmp_path):
    for name, message in (("hellaswg", "did you mean 'hellaswag'"), ("?", "expected lambada_openai, hellaswag, arc")):
        with pytest.raises(ValueError, match=message):
            load_task(name, folder)
    with pytest.raises(FileNotFoundError, match=r"piqa needs one of piqa.jsonl, .* piqa_valid.jsonl.gz in "):
        load_task("piqa", tmp_path)
    with pytest.raises(ValueError, match="expected 1 or more"):
        load_task("piqa", folder, limit=0)
    path = folder / "piqa.jsonl"
    good = json.dumps(RECORDS["piqa"][0])
    for content, message in (
        ("\n", "is empty; expected one JSON object a line"),
        ("{", "is damaged or not JSON lines"),
        ("[1]", "line 1 should be a JSON object, got list"),
        (good + '\n{"goal": "x", "sol1": "y"}', "line 2 is no document of piqa .*'sol2'.; it has goal, sol1"),
        (good.replace('"label": 0', '"label": 2'), "line 1: its label names none of its 2 choices"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_task("piqa", folder)
    path.unlink()
    whole = lzma.compress(good.encode() * 50)
    (folder / "piqa.jsonl.xz").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="is damaged"):
        load_task("piqa", folder)


def test_metrics_of_given_answers():
    document = Document((Request("c", " long one"), Request("c", " b"), Request("c", " cc")), 1, (8, 1, 2))
    task = Task("x", ("acc", "acc_norm"), (document,) * 3)
    log_probs = np.array([-9.0, -1.0, -8.0, -3.0, -2.0, -6.0, -1.0, -1.0, -9.0])  # right, right but long, a tie
    score = task_score(task, Likelihoods(log_probs, np.zeros(9, dtype=bool)))
    assert {name: values.tolist() for name, values in score.documents.items()} == {
        "acc": [1, 1, 0],
        "acc_norm": [1, 0, 0],
    }
    assert score.metrics["acc"] == pytest.approx((2 / 3, math.sqrt(2 / 9 * 3 / 2 / 3)))
    assert score.to_json()["metrics"]["acc_norm"]["value"] == pytest.approx(1 / 3)


def test_perplexity_of_given_answers():
    task = Task("lambada_openai", ("perplexity", "acc"), (Document((Request("a", " b"),)),) * 2)
    score = task_score(task, Likelihoods(np.array([-1.0, -3.0]), np.array([True, False])))
    assert score.metrics["perplexity"] == pytest.approx((math.exp(2), math.exp(2) * 1.0))
    assert score.metrics["acc"] == pytest.approx((0.5, 0.5))
    single = TaskScore({"acc": np.ones(1)})
    assert math.isnan(single.metrics["acc"].stderr)
    assert single.to_json()["metrics"] == {"acc": {"value": 1.0, "stderr": None}}


def test_differences_are_paired():
    first, second = TaskScore({"acc": np.array([0.0, 1, 1, 0])}), TaskScore({"acc": np.array([1.0, 1, 1, 0])})
    assert paired_difference(first, second, "acc") == pytest.approx((0.25, 0.25))
    with pytest.raises(ValueError, match="of 4 and 1 documents cannot be paired"):
        paired_difference(first, TaskScore({"acc": np.ones(1)}), "acc")


@pytest.mark.parametrize("name", ["nano-base", "nano-flex3"])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_scores_equal_the_slow_reference(folder, names_tokenizer, name, alpha):
    """One request at a time, scaled in the weights; sequences are cut, as the model takes 16 tokens."""
    config = dataclasses.replace(VARIED[name], vocab_size=names_tokenizer.vocab_size, max_seq_len=16)
    model, scaled = random_model(config), random_model(config)
    for block in scaled.blocks:
        ffn = block.get_submodule("ffn" if name == "nano-base" else "memory.ffn")
        with torch.no_grad():
            ffn.get_parameter("down.weight").mul_(alpha)
    tasks = [load_task(task, folder) for task in TASKS]
    encoded = EncodedTasks.of(tasks, names_tokenizer, max_len=16, batch_tokens=300)
    with scaled_ffn(model, (alpha,) * config.num_layers) as source:
        scores = score_tasks(model, encoded, row_source=source)
    assert list(scores) == list(TASKS)
    for task in tasks:
        pairs = [encode_requests([request], names_tokenizer)[0] for each in task.documents for request in each.requests]
        answers = [naive(scaled, pair) for pair in pairs]
        log_probs, greedy = (np.array(column) for column in zip(*answers, strict=True))
        expected = task_score(task, Likelihoods(log_probs, greedy))
        assert scores[task.name].num_documents == len(task.documents)
        for metric, values in expected.documents.items():
            np.testing.assert_allclose(scores[task.name].documents[metric], values, rtol=1e-10)


def test_the_document_names_every_task_and_its_metrics(folder):
    text = (REPOSITORY / "docs" / "evaluating.md").read_text(encoding="utf-8")
    rows = {name: (metrics, files) for name, *_, metrics, files in re.findall(
        r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", text, flags=re.MULTILINE)}  # fmt: skip
    assert list(rows) == list(TASKS)
    for name, (metrics, files) in rows.items():
        task = load_task(name, folder)
        assert metrics == ", ".join(task.metrics)
        (source,) = folder.glob(f"{name}.jsonl")
        for stem in re.findall(r"`(\w+)`", files):
            moved = source.rename(folder / f"{stem}.jsonl")
            assert load_task(name, folder) == task
            source = moved


def test_the_block_of_the_document_runs(tmp_path, capsys):
    text = (REPOSITORY / "docs" / "evaluating.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    write_records(tmp_path / "tasks")
    (tmp_path / "models").symlink_to(REPOSITORY / "models")
    with contextlib.chdir(tmp_path):
        exec(compile(block, "evaluating.md", "exec"), {})
    assert capsys.readouterr().out.count("Metric(value=") == 2
