"""Training goes on from the converted weights, from the text or from the dense model."""

import dataclasses
import shlex
from pathlib import Path

import pytest
import torch

from flexmemory.convert.flex import convert
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.train.loop import train
from flexmemory.train.metrics import read_lines
from tests.cli.conftest import run
from tests.train.conftest import nano, recipe

STEPS = 12


@pytest.fixture(scope="module")
def dense(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    out = tmp_path_factory.mktemp("dense") / "run"
    train(nano("base"), train_config=recipe(steps=60), data=prepared, out=out, device="cpu")
    return Checkpoint.open(out)


def first_loss(folder: Path) -> float:
    return next(line["ce"] for line in read_lines(folder / "metrics.jsonl") if "ce" in line)


def test_a_run_begins_with_the_weights_that_it_is_given(dense, prepared, tmp_path):
    given = dense.load()
    config = dataclasses.replace(recipe(steps=1), lr=1e-12, lr_final=1e-12, warmup_steps=0, weight_decay=0.0)
    result = train(given.config, train_config=config, data=prepared, out=tmp_path / "run", start=given, device="cpu")
    after = Checkpoint.open(result.checkpoint).load()
    for name, parameter in given.named_parameters():
        torch.testing.assert_close(after.get_parameter(name), parameter, rtol=0, atol=1e-9)


def test_the_teacher_is_learnt_and_the_text_validated(dense, prepared, tmp_path):
    """With the teacher's own weights the divergence is 0; validation is its loss on the text all the same."""
    config = dataclasses.replace(recipe(steps=2), lr=1e-12, lr_final=1e-12, log_every=1, z_loss=0.0)
    given = dense.load()
    train(
        given.config,
        train_config=config,
        data=prepared,
        out=tmp_path / "same",
        start=given,
        teacher=dense,
        device="cpu",
    )
    lines = read_lines(tmp_path / "same" / "metrics.jsonl")
    assert max(abs(line["ce"]) for line in lines if "ce" in line) < 1e-5
    assert min(line["val_loss"] for line in lines if "val_loss" in line) > 0.5


def test_converted_and_distilled(dense, prepared, tmp_path, capsys):
    """It comes nearer to the dense model than weights that were drawn, at the same number of steps."""
    settings = {"train_config": recipe(steps=STEPS), "data": prepared, "teacher": dense, "device": "cpu"}
    converted, _ = convert(dense.load(), torch.randint(dense.config.vocab_size, (8, 32)), flex_ratio=3)
    drawn = train(converted.config, out=tmp_path / "drawn", **settings)
    begun = train(converted.config, out=tmp_path / "converted", start=converted, **settings)
    assert begun.val_loss is not None
    assert drawn.val_loss is not None
    assert begun.val_loss < drawn.val_loss - 0.05
    options = shlex.split("--device cpu --seq-len 32 --calibration-tokens 2048 --total-tokens 1280 --batch-tokens 128")
    small = shlex.split("--micro-batch-size 2 --warmup-steps 1")
    said = run("convert", "flex", dense.path, "--data", prepared, "--out", tmp_path / "cli", *options, *small)
    assert said.startswith("10 steps: loss ")
    made = Checkpoint.open(tmp_path / "cli").config
    assert (made.architecture, made.flex_ratio, made.max_seq_len) == ("flex", 3, dense.config.max_seq_len)


def test_a_teacher_with_another_tokenizer_is_refused(prepared, tmp_path):
    from tests.conftest import random_model
    from tests.tol.conftest import write_checkpoint

    other = write_checkpoint(tmp_path / "other", random_model(nano("base")), text="another text")
    with pytest.raises(ValueError, match="prepared with another tokenizer"):
        train(
            nano("base"), train_config=recipe(steps=1), data=prepared, out=tmp_path / "run", teacher=other, device="cpu"
        )
    assert not (tmp_path / "run").exists()
