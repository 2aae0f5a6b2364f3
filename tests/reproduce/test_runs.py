"""The reference runs: models of the sizes that they are compared at, one recipe, and what was trained is not again."""

import dataclasses

import pytest

from flexmemory.model.accounting import count_parameters
from flexmemory.presets import VARIANTS, get_preset
from flexmemory.reproduce.runs import (
    ABLATIONS,
    Run,
    Size,
    best_rate,
    outcome,
    reference_runs,
    sweep,
    train_runs,
    trained,
    variant_config,
)
from flexmemory.reproduce.study import FULL, QUICK
from flexmemory.storage import write_json

SIZE = Size(
    family="nano", tokens=4096, lrs=(1e-3, 3e-3), seeds=2, ablations=("table",), budgets=(0.5, 2.0),
    seq_len=32, batch_tokens=256, micro_batch_size=8, warmup_steps=2, lr_final=1e-4,
)  # fmt: skip


@pytest.mark.parametrize("family", ["nano", "mini", "small", "250m", "1b"])
def test_models_are_compared_at_equal_parameters(family):
    counts = {v: count_parameters(variant_config(family, v, 8192)) for v in (*VARIANTS, *ABLATIONS)}
    for variant in ("memory", "flex1", "flex2", "flex3", "flex1-square"):
        assert counts[variant].backbone == pytest.approx(counts["base"].backbone, rel=0.01)
    for variant in ("memory", "flex3"):
        assert counts[f"base-as-{variant}"].active == pytest.approx(counts[variant].active, rel=0.01)
        narrow, base = variant_config(family, f"base-as-{variant}", 8192), variant_config(family, "base", 8192)
        assert (narrow.num_layers, narrow.num_heads) == (base.num_layers, base.num_heads)
        assert 1.8 < narrow.intermediate_size / narrow.hidden_size < 4.2
    assert counts["attention"].ffn < 0.03 * counts["attention"].attention
    assert counts["table"].active == counts["ffn+table"].active == counts["memory"].active


def test_an_unknown_variant_names_those_there_are():
    with pytest.raises(ValueError, match="unknown variant 'flex9'; there are base, memory"):
        variant_config("nano", "flex9", 512)


@pytest.mark.parametrize("size", [*FULL, *QUICK, SIZE])
def test_runs_of_a_size_see_the_same_tokens_in_one_recipe(size):
    runs = reference_runs(size, lr=size.lrs[0], speed={"base": 2.0, "memory": 3.0, "flex3": 2.0})
    assert len({run.name for run in runs}) == len(runs)
    recipes = {dataclasses.replace(run.config, seed=0) for run in runs if run.tokens == size.tokens}
    assert len(recipes) == 1
    assert {run.variant for run in runs} == {*VARIANTS, *size.ablations}
    assert [run.tokens for run in runs] == sorted((run.tokens for run in runs), reverse=True)
    longer = Run(size=size, variant="memory", tokens=round(1.5 * size.tokens), lr=size.lrs[0])
    assert longer.name in {run.name for run in runs}
    for run in runs:
        config = run.model(1000)
        assert (config.vocab_size, config.max_seq_len) == (1000, size.seq_len)
        preset = get_preset(f"{size.family}-{run.variant}").model if run.variant in VARIANTS else None
        if preset is not None:
            shape = {"vocab_size": preset.vocab_size, "max_seq_len": preset.max_seq_len}
            assert dataclasses.replace(config, **shape) == preset


def test_the_rate_is_the_best_of_the_base(tmp_path):
    with pytest.raises(FileNotFoundError):
        best_rate(SIZE, tmp_path)
    losses = {("base", 1e-3): 3.0, ("base", 3e-3): 2.0, ("memory", 1e-3): 1.0, ("memory", 3e-3): 1.5}
    for run in sweep(SIZE):
        write_json(_folder(tmp_path, run) / "outcome.json", {"val_loss": losses[run.variant, run.lr]})
    assert best_rate(SIZE, tmp_path) == 3e-3
    write_json(_folder(tmp_path, sweep(SIZE)[2]) / "outcome.json", {"val_loss": None, "error": "diverged"})
    assert best_rate(SIZE, tmp_path) == 1e-3
    assert len(trained(sweep(SIZE), tmp_path)) == 3
    alone = dataclasses.replace(SIZE, lrs=(2e-3,))
    assert best_rate(alone, tmp_path) == 2e-3
    assert sweep(alone) == []


def test_runs_are_trained_once(work):
    runs = [Run(size=SIZE, variant=variant, tokens=1024, lr=3e-3) for variant in ("base", "table")]
    train_runs(runs, work, at_once=1, devices=["cpu"])
    losses = [outcome(run, work)["val_loss"] for run in runs]
    assert all(0 < loss < 10 for loss in losses)
    written = [(_folder(work, run) / "metrics.jsonl").stat().st_mtime_ns for run in runs]
    train_runs(runs, work, at_once=1, devices=["cpu"])
    assert [(_folder(work, run) / "metrics.jsonl").stat().st_mtime_ns for run in runs] == written


def test_a_run_that_diverges_is_no_failure(work):
    run = Run(size=SIZE, variant="base", tokens=8192, lr=1e4)
    train_runs([run], work, at_once=1, devices=["cpu"])
    assert outcome(run, work)["val_loss"] is None
    assert trained([run], work) == []


def _folder(work, run):
    folder = work / "runs" / run.name
    folder.mkdir(parents=True, exist_ok=True)
    return folder
