"""Beside EleutherAI's lm-evaluation-harness: its tasks, its figures, its own model class on our exported model."""

import dataclasses
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import stderr_for_metric
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml

from flexmemory.evaluate.harness import FlexMemoryLM
from flexmemory.evaluate.likelihood import Likelihoods, Request
from flexmemory.evaluate.tasks import TASKS, Document, EncodedTasks, Task, load_task, score_tasks, task_score
from flexmemory.hf.export import export_code
from flexmemory.model.checkpoint import Checkpoint, save_checkpoint
from flexmemory.tokenizer import Tokenizer
from flexmemory.tol.build import build_store
from tests.conftest import VARIED, random_model
from tests.evaluate.task_records import write_records

OFFICIAL = {
    "lambada_openai": "lambada/lambada_openai.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "piqa": "piqa/piqa.yaml",
    "social_iqa": "siqa/siqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "sciq": "sciq/sciq.yaml",
}
"""The harness's own definitions."""


def definition(name: str) -> Path:
    return Path(lm_eval.__file__).parent / "tasks" / OFFICIAL[name]


def local_data(name: str, folder: Path) -> dict[str, Any]:
    """What of a definition changes so that it reads `folder`/NAME.jsonl."""
    config = load_yaml(definition(name), resolve_func=False)
    kind = "test_split" if config.get("test_split") else "validation_split"
    files = {"data_files": {config[kind]: str(folder / f"{name}.jsonl")}, "cache_dir": str(folder / "cache")}
    splits = dict.fromkeys(("training_split", "validation_split", "test_split")) | {kind: config[kind]}
    return {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": files, **splits}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_records(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def official(folder) -> Callable[[str], ConfigurableTask]:
    """`official(name)`: the harness's task on the records, with its requests built."""

    def build(name: str) -> ConfigurableTask:
        task = ConfigurableTask(config=load_yaml(definition(name)) | local_data(name, folder))
        task.build_all_requests()
        return task

    return build


@pytest.mark.parametrize("name", TASKS)
def test_requests_and_figures_are_those_of_the_harness(name, folder, official):
    theirs, ours = official(name), load_task(name, folder)
    requests = [request for document in ours.documents for request in document.requests]
    assert [instance.args for instance in theirs.instances] == requests
    assert list(theirs.aggregation()) == list(ours.metrics)

    rng = np.random.default_rng(0)
    for scale in (3.0, 30.0):
        log_probs = -scale * rng.random(len(requests)).round(1) - 0.1  # among them ties
        greedy = rng.random(len(requests)) < 0.5
        score = task_score(ours, Likelihoods(log_probs, greedy))
        answers = iter(zip(log_probs.tolist(), greedy.tolist(), strict=True))
        found = [
            theirs.process_results(doc, [next(answers) for _ in document.requests])
            for doc, document in zip(theirs.eval_docs, ours.documents, strict=True)
        ]
        for metric, aggregate in theirs.aggregation().items():
            values = [each[metric] for each in found]
            assert score.documents[metric].tolist() == pytest.approx(values)
            figure = score.metrics[metric]
            assert figure.value == pytest.approx(aggregate(values))
            if metric != "perplexity":
                stderr = stderr_for_metric(aggregate, 1000)
                assert stderr is not None
                assert figure.stderr == pytest.approx(stderr(values))


def test_the_error_of_perplexity_is_that_of_the_bootstrap(official, monkeypatch):
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    log_probs = np.random.default_rng(0).normal(-4, 2, 400)
    aggregate = official("lambada_openai").aggregation()["perplexity"]
    bootstrap = stderr_for_metric(aggregate, 2000)
    assert bootstrap is not None
    task = Task("x", ("perplexity", "acc"), (Document((Request("a", " b"),)),) * len(log_probs))
    ours = task_score(task, Likelihoods(log_probs, np.zeros(len(log_probs), dtype=bool))).metrics["perplexity"]
    assert ours.value == pytest.approx(aggregate(log_probs.tolist()))
    assert ours.stderr == pytest.approx(bootstrap(log_probs.tolist()), rel=0.05)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, names_tokenizer: Tokenizer) -> Path:
    """A random model as the package's checkpoint, with the files for `trust_remote_code`."""
    folder = tmp_path_factory.mktemp("model") / "exported"
    folder.mkdir()
    config = dataclasses.replace(VARIED["nano-flex2"], vocab_size=names_tokenizer.vocab_size)
    save_checkpoint(folder, random_model(config, dtype=torch.float32), names_tokenizer)
    export_code(folder)
    return folder


@pytest.fixture(scope="module")
def ours(exported) -> FlexMemoryLM:
    return FlexMemoryLM(str(exported), device="cpu", batch_tokens=200, batch_size=3)


def hflm(folder: Path, **options: Any) -> Any:
    untyped: Any = HFLM  # its registration hides what it is
    return untyped(
        pretrained=str(folder), trust_remote_code=True, device="cpu", dtype="float32", batch_size=3, **options
    )


def asked(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]


def test_every_request_as_hflm_answers_it(ours, exported, folder, official):
    theirs = hflm(exported, add_bos_token=True)
    assert theirs.max_length == ours.max_length == 64
    requests = [instance for name in TASKS for instance in official(name).instances]
    requests += asked("loglikelihood", ("", "Once upon a time"), ("spaces  ", " and more"), ("word " * 90, "word"))
    found, expected = ours.loglikelihood(requests), theirs.loglikelihood(requests)
    assert max(len(ours.tok_encode("".join(request.args))) for request in requests) > 65  # some are cut
    np.testing.assert_allclose([answer[0] for answer in found], [answer[0] for answer in expected], rtol=2e-5)
    assert [answer[1] for answer in found] == [answer[1] for answer in expected]


def test_the_offline_tasks_say_the_same(ours, exported, folder, official):
    encoded = EncodedTasks.of([load_task(name, folder) for name in TASKS], ours.flex_tokenizer, max_len=64)
    scores = score_tasks(ours.loaded.model, encoded)
    for name in TASKS:
        theirs = official(name)
        answers = iter(ours.loglikelihood(theirs.instances))
        per_document = len(theirs.instances) // len(theirs.eval_docs) if name != "arc_easy" else None
        for number, doc in enumerate(theirs.eval_docs):
            count = per_document or len(doc["choices"]["text"])
            figures = theirs.process_results(doc, [next(answers) for _ in range(count)])
            for metric, value in figures.items():
                assert scores[name].documents[metric][number] == pytest.approx(value, rel=1e-5)


def test_whole_texts_as_hflm_scores_them(ours, exported):
    texts = [("a few words",), ("works with iron and lead " * 40,), ("x",)]
    found = ours.loglikelihood_rolling(asked("loglikelihood_rolling", *texts))
    expected = hflm(exported).loglikelihood_rolling(asked("loglikelihood_rolling", *texts))
    np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_continuations_as_hflm_generates_them(ours, exported):
    settings = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    contexts = ["The animal that", "Once", "The country where Bado was born is " * 20, "A", "word"]
    theirs = hflm(exported, add_bos_token=True)
    plain = theirs.generate_until(asked("generate_until", *((context, settings) for context in contexts)))
    assert all(plain)
    found = ours.generate_until(asked("generate_until", *((context, settings) for context in contexts)))
    assert found == plain
    stops = [plain[0][3:6], plain[1][1:3]]
    cut = [(context, settings | {"until": stops}) for context in contexts]
    assert ours.generate_until(asked("generate_until", *cut)) == theirs.generate_until(asked("generate_until", *cut))


def test_sampled_continuations(ours):
    settings = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.5, "top_k": 50, "top_p": 0.9}
    several = ours.generate_until(asked("generate_until", *[("Once", settings)] * 4))
    assert len(set(several)) > 1
    assert several == ours.generate_until(asked("generate_until", *[("Once", settings)] * 4))


def test_settings_that_cannot_be(ours):
    for settings, message in (
        ({"max_gen_toks": 64}, "leave no room for a prompt: the model takes 64 tokens"),
        ({"max_gen_toks": 4, "num_beams": 2}, "generation settings num_beams are not known"),
    ):
        with pytest.raises(ValueError, match=message):
            ours.generate_until(asked("generate_until", ("Once", {"until": ["."], **settings})))


def test_rows_that_are_looked_up(ours, exported, tmp_path, official):
    build_store(Checkpoint.open(exported), tmp_path / "tol", codec="fp32")
    looked_up = FlexMemoryLM(str(exported), tol=str(tmp_path / "tol"), rows="disk", device="cuda:0")
    requests = official("sciq").instances
    found, expected = looked_up.loglikelihood(requests), ours.loglikelihood(requests)
    np.testing.assert_allclose([answer[0] for answer in found], [answer[0] for answer in expected], rtol=2e-5)


def test_without_the_harness_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    monkeypatch.delitem(sys.modules, FlexMemoryLM.__module__)
    with pytest.raises(ImportError, match=r"pip install 'flexmemory\[eval\]'"):
        importlib.import_module(FlexMemoryLM.__module__)


@pytest.mark.parametrize("model", ["hf", "flexmemory"])
def test_the_command(model, exported, folder, ours, tmp_path):
    """`lm_eval` itself on the exported model, or with our model beside its own; its definitions on local files."""
    names = ("lambada_openai", "hellaswag")
    (tmp_path / "yaml").mkdir()
    for name in names:
        config = {"include": str(definition(name)), "task": f"local_{name}", "tag": None} | local_data(name, folder)
        (tmp_path / "yaml" / f"{name}.yaml").write_text(yaml.safe_dump(config))
    if model == "hf":
        module, arguments = "lm_eval", f"pretrained={exported},trust_remote_code=True,add_bos_token=True,dtype=float32"
    else:
        build_store(Checkpoint.open(exported), tmp_path / "tol", codec="fp32")
        module, arguments = "flexmemory.evaluate.harness", f"checkpoint={exported},tol={tmp_path / 'tol'},rows=disk"
    done = subprocess.run(
        [sys.executable, "-m", module, "run", "--model", model, "--model_args", arguments, "--device", "cpu",
         "--tasks", ",".join(f"local_{name}" for name in names), "--include_path", str(tmp_path / "yaml"),
         "--output_path", str(tmp_path / "results.json")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = tmp_path.glob("**/results*.json")
    found = json.loads(written.read_text())["results"]
    tasks = [load_task(name, folder) for name in names]
    scores = score_tasks(ours.loaded.model, EncodedTasks.of(tasks, ours.flex_tokenizer, max_len=64))
    for name, score in scores.items():
        for metric, (value, _) in score.metrics.items():
            assert found[f"local_{name}"][f"{metric},none"] == pytest.approx(value, rel=1e-4)
