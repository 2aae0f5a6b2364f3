"""Trackers, with stand-ins for their packages: what each is told, at the beginning, when resumed and at the end."""

import importlib.machinery
import sys
from types import ModuleType, SimpleNamespace

import pytest

from flexmemory.storage import write_json
from flexmemory.train.track import tracking

LINES = [{"step": 4, "tokens": 512, "loss": 3.5}, {"step": 5, "tokens": 640, "val_loss": 3.25}]


@pytest.fixture
def folder(tmp_path):
    run = tmp_path / "flex3"
    run.mkdir()
    write_json(run / "config.json", {"train": {"lr": 1e-3}})
    return run


@pytest.fixture
def installed(monkeypatch):
    """`installed(name, **contents)`: a stand-in for the module `name`."""

    def install(name, **contents):
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        for key, value in contents.items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, name, module)

    return install


@pytest.fixture
def tensorboard(installed):
    """What a `SummaryWriter` was told, by the folder it writes to."""
    told = []

    class SummaryWriter:
        def __init__(self, log_dir, *, purge_step):
            told.append(("open", log_dir, purge_step))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            told.append("close")

        def add_scalar(self, tag, value, step):
            told.append((tag, value, step))

        def flush(self):
            told.append("flush")

    installed("tensorboard")
    installed("torch.utils.tensorboard", SummaryWriter=SummaryWriter)
    return told


class WandbError(Exception):
    pass


@pytest.fixture
def wandb(installed):
    """What Weights & Biases was told; `refusal` is what it says to `init`."""
    told = SimpleNamespace(inits=[], lines=[], exit_codes=[], refusal=None)

    def init(**options):
        if told.refusal:
            raise WandbError(told.refusal)
        told.inits.append(options)
        return SimpleNamespace(
            log=lambda values, *, step: told.lines.append((values, step)),
            finish=lambda exit_code=0: told.exit_codes.append(exit_code),
        )

    installed("wandb", init=init, Error=WandbError)
    return told


def follow(name, folder, *, step=0, lines=LINES):
    with tracking(name, run=folder, step=step) as track:
        for line in lines:
            track(line)


def test_none_takes_lines_and_writes_nothing(folder):
    follow("none", folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_tensorboard_gets_every_field_at_its_step(folder, tensorboard):
    follow("tensorboard", folder)
    assert tensorboard == [
        ("open", str(folder / "tensorboard"), 1),
        ("tokens", 512, 4), ("loss", 3.5, 4), "flush",
        ("tokens", 640, 5), ("val_loss", 3.25, 5), "flush",
        "close",
    ]  # fmt: skip


def test_tensorboard_forgets_the_steps_that_a_resumed_run_takes_again(folder, tensorboard):
    follow("tensorboard", folder, step=3)
    assert tensorboard[0] == ("open", str(folder / "tensorboard"), 4)


def test_wandb_gets_every_line_at_its_step(folder, wandb):
    follow("wandb", folder)
    (options,) = wandb.inits
    assert options.pop("id")
    assert options == {
        "project": "flexmemory", "name": "flex3", "dir": str(folder), "resume": "allow",
        "config": {"train": {"lr": 1e-3}},
    }  # fmt: skip
    assert wandb.lines == [(line, line["step"]) for line in LINES]
    assert wandb.exit_codes == [0]


def test_wandb_goes_on_with_a_resumed_run_and_not_with_one_that_begins_anew(folder, wandb):
    for step in (0, 3, 5, 0):
        follow("wandb", folder, step=step)
    first, second, third, anew = (options["id"] for options in wandb.inits)
    assert first == second == third != anew


def test_wandb_can_begin_at_a_resume(folder, wandb):
    for _ in range(2):
        follow("wandb", folder, step=3)
    assert len({options["id"] for options in wandb.inits}) == 1


def test_wandb_hears_of_a_failure(folder, wandb):
    with pytest.raises(FloatingPointError, match="diverged"), tracking("wandb", run=folder, step=0):
        raise FloatingPointError("diverged")
    assert wandb.exit_codes == [1]


def test_wandb_that_refuses_is_one_sentence(folder, wandb):
    wandb.refusal = "No API key configured"
    with pytest.raises(ValueError, match="Weights & Biases did not start: No API key configured"):
        follow("wandb", folder)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_says_how_to_get_it(folder, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"--track {name} needs a package .* pip install {name}"):
        follow(name, folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
