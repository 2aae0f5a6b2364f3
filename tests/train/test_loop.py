"""Runs learn, resume exactly, stop on signals and refuse what does not fit."""

import collections
import dataclasses
import json
import logging
import math
import shutil
import signal

import numpy as np
import pytest

from flexmemory.model.accounting import train_flops_per_token
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.storage import read_json
from flexmemory.train import loop
from flexmemory.train.loop import train
from flexmemory.train.metrics import read_lines
from tests.train.conftest import assert_same_state, encode, nano, recipe, structured_text, write_prepared

MODELS = {
    "base": nano("base"),
    "memory": nano("memory"),
    "flex3": nano("flex3"),
    "table": nano("memory", memory_kind="table", intermediate_size=0),
    "ffn+table": nano("flex1", memory_kind="ffn+table"),
}
TWENTY = recipe(steps=20)


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch, request):
    """Plots cost a second each; one test asks for them."""
    if "plots" not in request.fixturenames:
        monkeypatch.setattr(loop, "can_plot", lambda: False)


@pytest.fixture
def plots():
    """Leave plots on."""


def metrics(run):
    """Metric lines without what depends on the clock."""
    lines = read_lines(run / "metrics.jsonl")
    timed = ("tokens_per_s", "mfu", "memory_peak_gb")
    return [{k: v for k, v in line.items() if not k.endswith("_s") and k not in timed} for line in lines]


def assert_same_run(run, expected):
    """Weights, optimizer state, training state, metrics and samples are equal bit for bit."""
    assert metrics(run) == metrics(expected)
    assert (run / "samples.jsonl").read_bytes() == (expected / "samples.jsonl").read_bytes()
    ends = [folder / "checkpoints" / "step-00000020" for folder in (run, expected)]
    assert_same_state(*ends)
    states = [read_json(end / "training.json") for end in ends]
    for state in states:
        del state["train_s"], state["logged_s"]
    assert states[0] == states[1]


def raise_at(monkeypatch, step, *signals):
    """Raise `signals` in this process while `step` is being taken, once."""
    waiting = list(signals)

    def learning_rate(number, *, config):
        while number == step and waiting:
            signal.raise_signal(waiting.pop(0))
        return schedule(number, config=config)

    schedule = loop.learning_rate
    monkeypatch.setattr(loop, "learning_rate", learning_rate)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, prepared):
    """20 steps of nano-memory without interruption."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "can_plot", lambda: False)
        result = train(nano(), train_config=TWENTY, data=prepared, out=out)
    return out, result


@pytest.mark.parametrize("name", MODELS)
def test_learns(name, tmp_path, prepared, dataset):
    config = recipe(
        steps=30, batch_tokens=512, total_tokens=30 * 512, micro_batch_size=16, lr=1e-2, lr_final=1e-3, save_every=100
    )
    result = train(MODELS[name], train_config=config, data=prepared, out=tmp_path / "run")
    counts = collections.Counter(dataset.train.read(0, len(dataset.train)).tolist())
    shares = np.array(list(counts.values())) / counts.total()
    unigram_entropy = -float((shares * np.log(shares)).sum())
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert lines[0]["ce"] > unigram_entropy + 0.5
    assert lines[-2]["ce"] < unigram_entropy - 1
    assert result.val_loss is not None
    assert result.val_loss < unigram_entropy - 1


def test_rows_per_step_or_per_micro_batch_train_alike(tmp_path, prepared, monkeypatch):
    monkeypatch.setattr(loop, "can_plot", lambda: False)

    def lines(name, **changes):
        config = recipe(steps=8, micro_batch_size=1, log_every=1, **changes)
        train(nano(), train_config=config, data=prepared, out=tmp_path / name)
        return [line for line in read_lines(tmp_path / name / "metrics.jsonl") if "ce" in line]

    step, micro = lines("step", rows_per="step"), lines("micro", rows_per="micro-batch")
    for one, other in zip(step, micro, strict=True):
        assert one["ce"] == pytest.approx(other["ce"], rel=1e-5)
        assert one["unique_share"] < 0.8 * other["unique_share"]
    shares = [line["unique_share"] for line in step]
    assert [line["unique_share"] for line in lines("auto")] == shares
    monkeypatch.setattr(loop, "free_memory", lambda _device: 1000)
    assert [line["unique_share"] for line in lines("little")] == [line["unique_share"] for line in micro]


def test_run_folder(tmp_path, prepared, dataset, plots):
    result = train(nano(), train_config=recipe(steps=12), data=prepared, out=tmp_path, argv=["nano-memory", "--x"])
    assert result.step == 12
    assert result.signal is None
    assert result.checkpoint == tmp_path / "checkpoints" / "step-00000012"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "samples.jsonl", "loss.png", "checkpoints"}
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000010", "step-00000012"]
    described = read_json(tmp_path / "config.json")
    assert described["data"]["fingerprint"] == dataset.fingerprint
    assert described["model"] == dataclasses.asdict(nano())
    assert described["train"] == dataclasses.asdict(recipe(steps=12))
    assert described["argv"] == ["nano-memory", "--x"]
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [(line["step"], "val_loss" in line) for line in lines] == [
        (4, False), (8, False), (10, True), (12, False), (12, True),
    ]  # fmt: skip
    assert lines[3].keys() == {
        "step", "tokens", "train_s", "flops", "loss", "ce", "lr", "grad_norm", "grad_norm_embedding", "grad_norm_norm",
        "grad_norm_attention", "grad_norm_memory", "unique_share", "tokens_per_s", "mfu", "memory_peak_gb",
        "data_wait_s", "rows_s", "backbone_s", "head_s", "optimizer_s",
    }  # fmt: skip
    seconds = [lines[3][f"{part}_s"] for part in ("rows", "backbone", "head", "optimizer")]
    assert min(seconds) > 0
    assert sum(seconds) == pytest.approx(128 / lines[3]["tokens_per_s"], rel=0.3)  # of a step, with little beside it
    assert lines[3]["train_s"] > lines[0]["train_s"] > 0
    flops = [train_flops_per_token(nano(), unique_share=line["unique_share"], seq_len=32) for line in lines[:2]]
    assert lines[1]["flops"] == pytest.approx(4 * 128 * sum(flops))
    assert lines[3]["tokens"] == 12 * 128
    assert lines[3]["lr"] == recipe(steps=12).lr_final
    assert lines[4]["val_ppl"] == math.exp(lines[4]["val_loss"])
    assert lines[4]["val_loss"] == result.val_loss
    assert 0 < lines[3]["unique_share"] < 1
    samples = read_lines(tmp_path / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [10, 12]
    assert all(sample["text"] for sample in samples)


@pytest.mark.parametrize(("step", "number"), [(10, signal.SIGTERM), (13, signal.SIGINT)])
def test_stopped_and_resumed_is_never_stopped(step, number, tmp_path, prepared, whole, monkeypatch):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        raise_at(patch, step, number)
        result = train(nano(), train_config=TWENTY, data=prepared, out=tmp_path)
    assert (result.step, result.signal) == (step, number)
    assert result.checkpoint.name == f"step-{step:08d}"
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    resumed = train(nano(), train_config=TWENTY, data=prepared, out=tmp_path, resume=True)
    assert resumed.signal is None
    assert resumed.loss == whole[1].loss
    assert resumed.val_loss == whole[1].val_loss
    assert_same_run(tmp_path, whole[0])


def test_resume_drops_what_came_after_the_checkpoint(tmp_path, prepared, whole):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints" / "step-00000020").rename(tmp_path / "checkpoints" / ".step-00000020.partial")
    (tmp_path / "checkpoints" / ".step-00000020.partial" / "manifest.json").unlink()
    train(nano(), train_config=TWENTY, data=prepared, out=tmp_path, resume=True)
    assert_same_run(tmp_path, whole[0])
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.fixture
def _interruptible():
    """SIGINT raises KeyboardInterrupt, also where the tests run in the background and a shell made them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_second_interrupt_stops_at_once(tmp_path, prepared, monkeypatch):
    raise_at(monkeypatch, 12, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(nano(), train_config=TWENTY, data=prepared, out=tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000010"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_in_the_last_step_changes_nothing(tmp_path, prepared, monkeypatch):
    raise_at(monkeypatch, 3, signal.SIGTERM)
    result = train(nano(), train_config=recipe(steps=3), data=prepared, out=tmp_path)
    assert (result.step, result.signal) == (3, None)


def test_resuming_a_finished_run_returns_it(whole, prepared):
    before = (whole[0] / "metrics.jsonl").read_bytes()
    result = train(nano(), train_config=TWENTY, data=prepared, out=whole[0], resume=True)
    assert result == dataclasses.replace(whole[1], val_loss=None)
    assert (whole[0] / "metrics.jsonl").read_bytes() == before


def test_recipe_may_change_on_resume(tmp_path, prepared, whole, caplog):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    longer = recipe(steps=24, micro_batch_size=4)
    with caplog.at_level(logging.WARNING):
        result = train(nano(), train_config=longer, data=prepared, out=tmp_path, resume=True)
    assert "total_tokens 3072, was 2560" in caplog.text
    assert "micro_batch_size 4, was 2" in caplog.text
    assert result.step == 24
    assert read_json(tmp_path / "config.json")["train"]["total_tokens"] == 3072


def test_resume_refuses_another_run(tmp_path, prepared, whole, tokenizer):
    shutil.copytree(whole[0], tmp_path / "run")

    def resume(model=None, *, data=prepared, config=TWENTY):
        train(model or nano(), train_config=config, data=data, out=tmp_path / "run", resume=True)

    with pytest.raises(ValueError, match=r"the model differs .*: rope_theta 500.0, was 10000.0"):
        resume(nano(rope_theta=500.0))
    with pytest.raises(ValueError, match="keeps its batch_tokens, seq_len, seed; got seed 7, was 0"):
        resume(config=recipe(steps=20, seed=7))
    with pytest.raises(ValueError, match="past the run's 10 steps; raise total_tokens above 2560"):
        resume(config=recipe(steps=10))
    ids = encode(tokenizer, structured_text(sentences=80, seed=9))
    other = write_prepared(tmp_path / "other", tokenizer=tokenizer, splits={"train": [ids], "validation": []})
    with pytest.raises(ValueError, match=r"is not the data that .* was trained on"):
        resume(data=other)
    with pytest.raises(FileNotFoundError, match="has no checkpoint to resume from"):
        train(nano(), train_config=TWENTY, data=prepared, out=tmp_path / "new", resume=True)
    assert_same_run(tmp_path / "run", whole[0])


def test_a_run_is_not_overwritten_but_one_without_checkpoints_is(tmp_path, prepared, whole):
    before = (whole[0] / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"already holds a run \(step-00000020\); add --resume to go on"):
        train(nano(), train_config=recipe(steps=2), data=prepared, out=whole[0])
    assert (whole[0] / "config.json").read_bytes() == before
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens": 128, "ce": 9.0}\n')
    train(nano(), train_config=recipe(steps=2), data=prepared, out=tmp_path)
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [2, 2]


def test_divergence_stops_with_the_last_good_checkpoint(tmp_path, prepared):
    config = recipe(steps=20, warmup_steps=0, save_every=1, log_every=1, divergence_margin=0.5, lr=30.0)
    message = (
        r"diverged at step \d+: loss .*; the last good checkpoint is .*step-0000000\d, resume from it with a lower"
    )
    with pytest.raises(FloatingPointError, match=message) as raised:
        train(nano(), train_config=config, data=prepared, out=tmp_path)
    named = str(raised.value).split("last good checkpoint is ")[1].split(",")[0]
    assert named == str(Checkpoint.open(tmp_path).path)
    assert f"diverged at step {int(named[-8:]) + 1}:" in str(raised.value)


def test_a_loss_that_is_not_finite_is_never_saved(tmp_path, prepared, monkeypatch):
    def poisoned(*args, **kwargs):
        values = take_step(*args, **kwargs)
        return values._replace(scalars=values.scalars * math.nan)

    take_step = loop.take_step
    monkeypatch.setattr(loop, "take_step", poisoned)
    message = "step 1 is not finite: loss nan, gradient norm nan; no checkpoint was saved before"
    with pytest.raises(FloatingPointError, match=message):
        train(nano(), train_config=recipe(steps=20, save_every=3), data=prepared, out=tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_bf16_runs_and_masters_stay_fp32(tmp_path, prepared):
    result = train(nano("flex1"), train_config=recipe(steps=3, precision="bf16"), data=prepared, out=tmp_path)
    assert math.isfinite(result.loss)
    weights = Checkpoint.open(tmp_path).load().get_parameter("embedding.weight").detach()
    assert not weights.bfloat16().float().equal(weights)


def test_without_validation_tokens_a_warning_and_no_lines(tmp_path, tokenizer, caplog):
    ids = encode(tokenizer, structured_text(sentences=80, seed=0))
    data = write_prepared(tmp_path / "p", tokenizer=tokenizer, splits={"train": [ids], "validation": [ids[:20]]})
    with caplog.at_level(logging.WARNING):
        result = train(nano(), train_config=recipe(steps=2), data=data, out=tmp_path / "run")
    assert "no validation: that split holds 20 tokens, need seq_len + 1 = 33" in caplog.text
    assert result.val_loss is None
    assert [line["step"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")] == [2]
    assert json.loads((tmp_path / "run" / "samples.jsonl").read_text())["step"] == 2


def test_what_does_not_fit_is_refused(tmp_path, prepared, caplog):
    def start(model=None, **changes):
        train(model or nano(), train_config=recipe(steps=2, **changes), data=prepared, out=tmp_path / "run")

    with pytest.raises(ValueError, match="seq_len is 128, but the model's max_seq_len is 64"):
        start(seq_len=128, micro_batch_size=1)
    with pytest.raises(ValueError, match="the data has 320 token ids, but the model's vocab_size is 300"):
        start(nano(vocab_size=300))
    with pytest.raises(FileNotFoundError, match="no prepared data"):
        train(nano(), train_config=TWENTY, data=tmp_path, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with caplog.at_level(logging.WARNING):
        start(warmup_steps=2)
    assert "warmup_steps is 2, but the run has 2 steps" in caplog.text


@pytest.mark.gpu
@pytest.mark.compile
@pytest.mark.filterwarnings("default")  # of the compiler
def test_a_gpu_trains_like_a_cpu_and_resumes(tmp_path, prepared, monkeypatch):
    def start(out, model, **options):
        config = recipe(steps=20)
        return train(model, train_config=config, data=prepared, out=tmp_path / out, **options)

    for name in ("base", "flex3"):
        expected = start(f"cpu-{name}", nano(name), device="cpu")
        found = start(f"gpu-{name}", nano(name))  # bf16, compiled
        assert found.val_loss == pytest.approx(expected.val_loss, rel=0.005)
    with monkeypatch.context() as patch:
        raise_at(patch, 13, signal.SIGTERM)
        assert start("stopped", nano("flex3")).step == 13
    shutil.copytree(tmp_path / "stopped", tmp_path / "moved")
    for out, device in (("stopped", "cuda"), ("moved", "cpu")):
        resumed = start(out, nano("flex3"), resume=True, device=device)
        assert resumed.val_loss == pytest.approx(found.val_loss, rel=0.005)
