"""Training checkpoints are whole, the newest are kept, and damage is named."""

import dataclasses
import shutil

import pytest
import torch

from flexmemory.model.checkpoint import Checkpoint
from flexmemory.model.init import new_model
from flexmemory.train.checkpoint import (
    TrainingState,
    clean_partials,
    list_checkpoints,
    newest_whole,
    read_state,
    restore_optimizer,
    save_training,
)
from flexmemory.train.optimizer import Optimizer
from tests.train.conftest import OPTIMIZER_FILE, nano, recipe

CONFIG = recipe(steps=20, keep_checkpoints=2)


@pytest.fixture
def trained():
    """A model and its optimizer after one step."""
    model = new_model(nano("flex2"), seed=0)
    optimizer = Optimizer(model, config=CONFIG)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(lr=1e-3, clip_norm=1.0)
    return model, optimizer


def state(step):
    meter = {"smoothed": 1.5, "best": 1.25, "values": [[1.0, 2.0, 3.0, 0.1]]}
    return TrainingState(step=step, train_config=CONFIG, data_fingerprint="f" * 64, meter=meter)


def save(run, trained, tokenizer, *, step):
    model, optimizer = trained
    return save_training(run, model=model, optimizer=optimizer, tokenizer=tokenizer, state=state(step))


def test_restores_every_bit(tmp_path, trained, tokenizer):
    folder = save(tmp_path, trained, tokenizer, step=7)
    assert folder == tmp_path / "checkpoints" / "step-00000007"
    checkpoint = newest_whole(tmp_path)
    assert read_state(checkpoint) == state(7)
    assert checkpoint.tokenizer().fingerprint == tokenizer.fingerprint
    model = new_model(nano("flex2"), seed=3)
    optimizer = Optimizer(model, config=CONFIG)
    restore_optimizer(checkpoint, optimizer)
    loaded = checkpoint.load()
    for name, parameter in trained[0].named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    expected = trained[1].tensors()
    for name, tensor in optimizer.tensors().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_training_checkpoint_is_a_model_checkpoint_in_fp32(tmp_path, trained, tokenizer):
    save(tmp_path, trained, tokenizer, step=7)
    model = Checkpoint.open(tmp_path).load()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_only_the_newest_are_kept(tmp_path, trained, tokenizer):
    folders = [save(tmp_path, trained, tokenizer, step=step) for step in (9, 10, 11, 100)]
    assert list_checkpoints(tmp_path) == folders[2:]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")] == []


def test_weights_that_are_not_finite_are_not_saved(tmp_path, trained, tokenizer):
    save(tmp_path, trained, tokenizer, step=1)
    with torch.no_grad():
        trained[0].blocks[1].attention.qkv.weight[3, 4] = torch.nan
    with pytest.raises(FloatingPointError, match=r"blocks.1.attention.qkv.weight are not finite after step 2"):
        save(tmp_path, trained, tokenizer, step=2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_partials_are_ignored_and_cleaned(tmp_path, trained, tokenizer):
    folder = save(tmp_path, trained, tokenizer, step=1)
    partial = folder.with_name(".step-00000002.partial")
    shutil.copytree(folder, partial)
    (partial / "manifest.json").unlink()
    assert newest_whole(tmp_path).path == folder
    clean_partials(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("name", ["model.safetensors", OPTIMIZER_FILE, "training.json", "config.json", "manifest.json"])
def test_damage_names_the_last_good_checkpoint(tmp_path, trained, tokenizer, name):
    good, bad = (save(tmp_path, trained, tokenizer, step=step) for step in (1, 2))
    content = bytearray((bad / name).read_bytes())
    content[-20] ^= 1
    (bad / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{bad}.*the last good one is {good}: remove"):
        newest_whole(tmp_path)
    (bad / name).unlink()
    with pytest.raises(ValueError, match=rf"{bad}.*the last good one is {good}: remove"):
        newest_whole(tmp_path)
    shutil.rmtree(bad)
    assert newest_whole(tmp_path).path == good


def test_no_good_checkpoint(tmp_path, trained, tokenizer):
    with pytest.raises(FileNotFoundError, match="has no checkpoint to resume from; leave out --resume"):
        newest_whole(tmp_path)
    for step in (1, 2):
        (save(tmp_path, trained, tokenizer, step=step) / OPTIMIZER_FILE).write_bytes(b"short")
    with pytest.raises(ValueError, match=r"step-00000002 is incomplete.*no earlier checkpoint is whole"):
        newest_whole(tmp_path)


def test_a_failed_save_leaves_earlier_checkpoints(tmp_path, trained, tokenizer, monkeypatch):
    good = save(tmp_path, trained, tokenizer, step=1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tokenizer), "save", full)
    with pytest.raises(
        OSError, match=rf"No space left on device; the last checkpoint is {good}, free space and resume"
    ):
        save(tmp_path, trained, tokenizer, step=2)
    assert list((tmp_path / "checkpoints").iterdir()) == [good]
    assert newest_whole(tmp_path).path == good


def test_keeping_one_is_enough(tmp_path, trained, tokenizer):
    model, optimizer = trained
    for step in (1, 2):
        only = dataclasses.replace(state(step), train_config=recipe(steps=20, keep_checkpoints=1))
        folder = save_training(tmp_path, model=model, optimizer=optimizer, tokenizer=tokenizer, state=only)
        assert list_checkpoints(tmp_path) == [folder]
