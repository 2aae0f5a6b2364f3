"""`flexmemory train` as a user runs it: options, exit codes, signals, kills and full disks of real processes."""

import contextlib
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from flexmemory.cli import main
from flexmemory.cli import train as cli
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.storage import read_json
from flexmemory.train import loop
from flexmemory.train.checkpoint import list_checkpoints, newest_whole
from flexmemory.train.loop import TrainResult
from flexmemory.train.metrics import read_lines
from tests.train.conftest import assert_same_state

SMALL = shlex.split(
    "--batch-tokens 128 --seq-len 32 --micro-batch-size 2 --log-every 1 --eval-every 100 --eval-tokens 64 "
    "--save-every 10 --warmup-steps 2"
)


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    monkeypatch.setattr(loop, "can_plot", lambda: False)


def arguments(prepared, out, *options, steps=12, preset="nano-memory"):
    return ["train", preset, "--data", str(prepared), "--out", str(out), "--total-tokens", str(steps * 128), *SMALL,
            *options]  # fmt: skip


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_trains_and_says_how_it_went(prepared, tmp_path, capsys):
    options = shlex.split("--lr 2e-3 --model.memory-kind table --model.intermediate-size 0 --model.num-layers 2")
    assert main(arguments(prepared, tmp_path / "run", *options, steps=2)) == 0
    output = capsys.readouterr()
    assert output.out.startswith("2 steps, 256 tokens: loss 5.7")
    assert f"; {tmp_path / 'run' / 'checkpoints' / 'step-00000002'}\n" in output.out
    described = read_json(tmp_path / "run" / "config.json")
    assert described["train"]["lr"] == 2e-3
    assert described["argv"] == arguments(prepared, tmp_path / "run", *options, steps=2)[1:]
    config = Checkpoint.open(tmp_path / "run").config
    assert (config.memory_kind, config.num_layers, config.hidden_size) == ("table", 2, 48)


def test_vocabulary_follows_the_data_unless_asked_for(prepared, tmp_path, caplog):
    with caplog.at_level("INFO"):
        assert main(arguments(prepared, tmp_path / "a", steps=1)) == 0
    assert "vocab_size is 320, that of the data, instead of 512" in caplog.text
    assert Checkpoint.open(tmp_path / "a").config.vocab_size == 320
    assert main(arguments(prepared, tmp_path / "b", "--model.vocab-size", "384", steps=1)) == 0
    assert main(arguments(prepared, tmp_path / "b", "--resume", steps=2)) == 0
    assert Checkpoint.open(tmp_path / "b").config.vocab_size == 384


def test_resume_takes_the_options_of_the_run(prepared, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(arguments(prepared, out, "--lr", "2e-3", "--model.num-layers", "1", steps=2)) == 0
    first = read_json(out / "config.json")
    short = ["train", "nano-memory", "--data", str(prepared), "--out", str(out), "--resume"]
    assert main([*short, "--total-tokens", str(3 * 128)]) == 0
    second = read_json(out / "config.json")
    assert second["model"] == first["model"]
    assert second["train"] == {**first["train"], "total_tokens": 3 * 128}
    assert capsys.readouterr().out.splitlines()[1].startswith("3 steps, 384 tokens")
    assert main(["train", "nano-base", *short[2:]]) == 2
    assert "was started as nano-memory, not nano-base" in capsys.readouterr().err
    assert main(["train", "nano-memory", "--data", str(prepared), "--out", str(tmp_path / "new"), "--resume"]) == 2
    assert "holds no run to resume; leave out --resume to start one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["train", "nano-memry"], "unknown preset 'nano-memry'; did you mean 'nano-memory'?"),
        (["train"], "name a preset first: flexmemory train PRESET --data DIR --out RUN"),
        (["train", "--data", "x"], "name a preset first"),
        (["train", "nano-base", "--data", "nowhere", "--out", "run"], "no prepared data in nowhere"),
        (["train", "nano-base", "--out", "run"], "no data: name at least one folder"),
        (["train", "nano-base", "--data", "a=x", "b=1", "--out", "run"], "the weight of a must be a number, got 'x'"),
        (["train", "nano-base", "--data", "d", "--out", "r", "--seq-len", "63"], "must be a multiple of seq_len"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(change, message, capsys):
    assert main(change) == 2
    error = capsys.readouterr().err
    assert error.startswith("flexmemory: error: ")
    assert message in error


def test_other_mistakes(prepared, tmp_path, capsys):
    assert main(arguments(prepared, tmp_path / "run", "--device", "cuda:99")) == 2
    assert "there is no device 'cuda:99' here" in capsys.readouterr().err
    assert main(arguments(prepared, tmp_path / "run", "--seq-len", "128", "--micro-batch-size", "1")) == 2
    assert "seq_len is 128, but the model's max_seq_len is 64" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(arguments(prepared, tmp_path / "run", "--warmup-step", "3"))
    assert stopped.value.code == 2
    assert "--warmup-steps" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--data", "--resume", "--lr ", "--model.memory-kind", "small-memory"))


def test_divergence_is_exit_code_1(prepared, tmp_path, capsys):
    options = shlex.split("--lr 30 --warmup-steps 0 --divergence-margin 0.5")
    assert main(arguments(prepared, tmp_path / "run", *options)) == 1
    assert "training diverged at step" in capsys.readouterr().err


def test_a_terminated_process_saves_and_says_how_to_go_on(prepared, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "flexmemory", *arguments(prepared, out, "--save-every", "100000", steps=100_000)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment()) as running:
        while running.poll() is None and not (out / "metrics.jsonl").exists():
            time.sleep(0.02)
        running.send_signal(signal.SIGTERM)
        _, error = running.communicate()
    assert running.returncode == 128 + signal.SIGTERM
    (folder,) = list_checkpoints(out)
    step = int(folder.name[-8:])
    sentence = error.splitlines()[-1]
    start = f"stopped by SIGTERM; saved {folder}; to go on: flexmemory "
    assert sentence.startswith(start)
    resume = shlex.split(sentence.removeprefix(start))
    assert main([*resume, "--total-tokens", str((step + 2) * 128)]) == 0
    steps = [line["step"] for line in read_lines(out / "metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, step + 3))


def test_data_may_be_many_folders_and_the_command_to_go_on_names_them_all(prepared, tmp_path, capsys, monkeypatch):
    def stopped(*_, data, **__):
        seen.append(data)
        return TrainResult(step=1, loss=5.0, val_loss=None, checkpoint=tmp_path / "c", signal=signal.SIGTERM)

    seen = []
    monkeypatch.setattr(cli, "train", stopped)
    data = [str(shutil.copytree(prepared, tmp_path / name)) for name in ("a", "with space", "c")]
    weighted = tuple(f"{folder}={weight}" for folder, weight in zip(data, ("0.5", "1", "2"), strict=True))
    for options in (["--data", *weighted], ["--data", *weighted[:2], "--data", weighted[2]]):
        assert main(["train", "nano-memory", *options, "--out", str(tmp_path / "run"), *SMALL]) == 128 + signal.SIGTERM
        command = shlex.split(capsys.readouterr().err.splitlines()[-1].split("to go on: ")[1])
        assert command[1:] == ["train", "nano-memory", "--data", *weighted, "--out", str(tmp_path / "run"), "--resume"]
    assert seen == [weighted, weighted]


def test_a_run_on_two_folders_goes_on(prepared, tmp_path, capsys):
    copy = shutil.copytree(prepared, tmp_path / "copy")
    options = ["train", "nano-memory", "--data", f"{prepared}=3", f"{copy}=1", "--out", str(tmp_path / "run")]
    assert main([*options, *SMALL, "--total-tokens", "256"]) == 0
    assert main([*options, "--resume", "--total-tokens", "384"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("3 steps, 384 tokens")
    options[4] = f"{copy}=2"
    assert main([*options, "--resume"]) == 2
    assert "the mixture (its folders, their order or weights) is not the data" in capsys.readouterr().err


def test_a_process_killed_while_saving_loses_nothing_saved(prepared, tmp_path):
    program = (
        "import os, signal, sys\n"
        "import flexmemory.model.checkpoint as checkpoint\n"
        "from flexmemory.cli import main\n"
        "from flexmemory.train import loop\n"
        "seal = checkpoint.seal\n"
        "def killed(folder, tokenizer):\n"
        "    if '12' in folder.name: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    seal(folder, tokenizer)\n"
        "checkpoint.seal = killed\n"
        "loop.can_plot = lambda: False\n"
        "main(sys.argv[1:])"
    )
    out = tmp_path / "run"
    killed = subprocess.run([sys.executable, "-c", program, *arguments(prepared, out)], env=environment())
    assert killed.returncode == -signal.SIGKILL
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"step-00000010", ".step-00000012.partial"}
    assert main(arguments(prepared, out, "--resume")) == 0
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"step-00000010", "step-00000012"}
    assert main(arguments(prepared, tmp_path / "whole")) == 0
    assert_same_state(*(run / "checkpoints" / "step-00000012" for run in (out, tmp_path / "whole")))


@pytest.fixture
def file_limit():
    """A function that limits the bytes of a file, as a full disk would; lifted after the test."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_a_sentence_and_loses_nothing_saved(prepared, tmp_path, capsys, file_limit):
    out = tmp_path / "run"
    assert main(arguments(prepared, out, steps=10)) == 0
    file_limit(200_000)
    assert main(arguments(prepared, out, "--resume")) == 2
    file_limit(resource.RLIM_INFINITY)
    sentence = capsys.readouterr().err.splitlines()[-1]
    good = out / "checkpoints" / "step-00000010"
    assert sentence.startswith("flexmemory: error: could not save checkpoint")
    assert sentence.endswith(f"the last checkpoint is {good}, free space and resume")
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000010"]
    assert newest_whole(out).path == good
    assert main(arguments(prepared, out, "--resume")) == 0
    assert newest_whole(out).path.name == "step-00000012"


def test_a_tracker_gets_the_lines_of_the_metrics(prepared, tmp_path, monkeypatch):
    tracked = []

    @contextlib.contextmanager
    def tracking(name, *, run, step):
        tracked.append((name, run, step))
        yield tracked.append

    monkeypatch.setattr(loop, "check_tracker", lambda _name: None)
    monkeypatch.setattr(loop, "tracking", tracking)
    for steps, options in ((10, ()), (12, ("--resume",))):
        out = tmp_path / "run"
        assert main(arguments(prepared, out, "--track", "wandb", "--eval-every", "5", *options, steps=steps)) == 0
    begun = [entry for entry in tracked if isinstance(entry, tuple)]
    assert begun == [("wandb", tmp_path / "run", 0), ("wandb", tmp_path / "run", 10)]
    assert [entry for entry in tracked if not isinstance(entry, tuple)] == read_lines(tmp_path / "run/metrics.jsonl")


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_stops_the_run_before_it_begins(
    prepared, tmp_path, monkeypatch, capsys, tracker
):
    monkeypatch.setitem(sys.modules, tracker, None)
    assert main(arguments(prepared, tmp_path / "run", "--track", tracker)) == 2
    assert f"pip install {tracker}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
