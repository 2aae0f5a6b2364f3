"""Every part on two tiny models: what it writes, and that it is not made again."""

import dataclasses
import json
import lzma
import math

import pytest
import torch

from flexmemory.cli.reproduce import MEASURED
from flexmemory.evaluate.perplexity import perplexity
from flexmemory.reproduce import compression, cost, probes, quality, report, speed
from flexmemory.reproduce.found import Found
from flexmemory.reproduce.runs import Size, train_runs
from flexmemory.reproduce.study import Results, Study, fill

SIZE = Size(
    family="nano", tokens=2048, lrs=(3e-3,), seq_len=32, batch_tokens=256, micro_batch_size=8, warmup_steps=2,
    lr_final=1e-4, validations=1,
)  # fmt: skip


@pytest.fixture
def study(work):
    """Base and memory, trained."""
    made = Study(work=work, results=work / "results", sizes=(SIZE,), quick=True)
    wanted = [run for run in made.wanted(SIZE) if run.variant in ("base", "memory")]
    train_runs(wanted, work, at_once=1, devices=["cpu"])
    return made


def entries(study, part):
    return json.loads((study.results / f"{part}.json").read_text())["entries"]


def test_all_parts_and_the_page(study, monkeypatch):
    monkeypatch.setattr(probes, "ALPHAS", (1.0, 0.5, 0.2))
    elsewhere = study.work / "runs" / study.run(SIZE, "memory").name
    study = dataclasses.replace(study, models=(elsewhere,))
    speed.measure(study)
    cost.measure(study)
    fill(study, {name: part.jobs(study) for name, part in MEASURED.items()})
    base, memory = (study.run(SIZE, variant) for variant in ("base", "memory"))
    found = entries(study, "quality")
    assert found.keys() == {base.name, memory.name}
    validation = study.train_data.validation
    alone = perplexity(study.load(memory), validation.read(0, len(validation)))
    assert found[memory.name]["texts"]["held-out"]["nats"] == pytest.approx(alone.loss, rel=1e-5)
    assert set(found[memory.name]["texts"]) == {"held-out", "wikitext"}
    probed = entries(study, "probes")
    for run in (base, memory):
        name = f"nano-{run.variant}"
        whole = probed[f"{name} alpha 1"]["texts"]["held-out"]["nats"]
        assert whole == pytest.approx(found[run.name]["texts"]["held-out"]["nats"], rel=1e-6)
        assert probed[f"{name} without 0"]["texts"]["held-out"]["nats"] != whole
        assert f"{name} without 2" in probed
        assert f"{name} without 3" not in probed
    for alpha in ("1", "0.5"):
        texts = entries(study, "models")[f"{elsewhere.name} alpha {alpha}"]["texts"]
        assert texts == probed[f"nano-memory alpha {alpha}"]["texts"]
    pruned = entries(study, "pruning")
    assert len(pruned) == 15
    for entry in pruned.values():
        assert entry["active"] < found[base.name]["parameters"]["active"]
    coded = entries(study, "compression")
    plain = coded["nano-memory bf16"]["texts"]["held-out"]["nats"]
    assert plain == pytest.approx(found[memory.name]["texts"]["held-out"]["nats"], abs=1e-3)
    assert coded["nano-memory svd24"]["bytes"] < coded["nano-memory svd43"]["bytes"]
    table = compression.table_of(study, memory)[:, 1:]
    values = torch.linalg.svdvals(table[:, 1].double()).tolist()
    assert coded["nano-memory spectra"]["singular_values"][1] == pytest.approx(values, abs=1e-4)
    assert len(entries(study, "cells")["nano-memory"]["layers"]) == 3
    assert entries(study, "cost")["nano-memory"]["ms_per_token"] > 0
    assert entries(study, "speed")["nano-base"]["tokens_per_s"] > 0
    page = report.write(study.results, study.work / "page" / "study.md").read_text()
    assert "| nano memory | " in page
    assert (study.work / "page" / "images" / "study-layers.png").exists()
    rates = {entry["variant"]: entry["tokens_per_s"] for entry in entries(study, "speed").values()}
    wanted = {(run.variant, run.tokens) for run in study.wanted(SIZE)}
    for variant in ("memory", "flex3"):
        steps = max(1, round(8 * rates[variant] / rates["base"]))  # the base takes 8
        assert (variant, steps * SIZE.batch_tokens) in wanted


def test_what_is_there_is_not_made_again(study):
    results = Results(study, "some")
    assert results.entry("a", lambda: {"x": 1}) == {"x": 1}
    assert Results(study, "some").entry("a", lambda: pytest.fail("made again")) == {"x": 1}


def test_tasks_are_scored_and_shown(study, tmp_path):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    choices = [{"text": text, "label": name} for name, text in zip("ABCD", "wxyz", strict=True)]
    questions = {
        "lambada_openai_test": {"text": "the red fox follows the old miller"},
        "arc_easy_test": {"question": {"stem": "who?", "choices": choices}, "answerKey": "B"},
        "sciq_valid": {"question": "q", "support": "s", "correct_answer": "a"}
        | {f"distractor{number}": text for number, text in enumerate("bcd", start=1)},
        "socialiqa_dev": {"context": "c", "question": "q", "label": "1"} | {f"answer{name}": name for name in "ABC"},
        "hellaswag_val_1000": {"ind": 0, "query": "the", "endings": ["a", "b", "c", "d"], "label": 0},
        "winogrande_xl_dev": {"sentence": "the _ sits", "option1": "fox", "option2": "crow", "answer": "1"},
        "boolq_dev": {"question": "is it", "passage": "it is", "answer": True},
        "piqa_valid": {"goal": "go", "sol1": "a", "sol2": "b", "label": 0},
    }
    for name, record in questions.items():
        lines = "\n".join([json.dumps(record)] * 3)
        (tasks / f"{name}.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    scored = Study(work=study.work, results=study.results, sizes=(SIZE,), tasks=tasks, quick=True)
    fill(scored, {"quality": quality.jobs(scored), "probes": probes.jobs(scored)})
    found = Found(study.results)
    for run in found.parts["quality"].values():
        assert run["tasks"]["piqa"]["documents"] == 3
        assert 0 <= run["tasks"]["sciq"]["metrics"]["acc_norm"]["value"] <= 1
        assert math.isfinite(run["tasks"]["lambada_openai"]["metrics"]["perplexity"]["value"])
    assert "## Zero-shot tasks" in report.text(found, {})
