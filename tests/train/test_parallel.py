"""Several processes on CPUs are one process: gradients, runs, resuming, and what happens when one is lost."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flexmemory.cli import main
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.train import loop
from flexmemory.train.checkpoint import list_checkpoints
from flexmemory.train.metrics import read_lines
from flexmemory.train.parallel import World
from tests.train.spread_gradients import gradients

ROOT = Path(__file__).parents[2]
RECIPE = shlex.split(
    "--batch-tokens 256 --seq-len 32 --micro-batch-size 1 --log-every 1 --eval-every 8 --eval-tokens 224 "
    "--save-every 4 --warmup-steps 2 --device cpu"
)


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    monkeypatch.setattr(loop, "can_plot", lambda: False)


def torchrun(*command: str, processes: int) -> subprocess.Popen[str]:
    """Start a module or program in several processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*launcher, *command], env=environment, cwd=ROOT, **pipes)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code, and all that was said."""
    out, err = process.communicate(timeout=240)
    return process.returncode, out + err


def arguments(data: Path, out: Path, *options: str, preset: str = "nano-memory") -> list[str]:
    return ["train", preset, "--data", str(data), "--out", str(out), *RECIPE, *options]


def run_on(processes: int, *command: str) -> str:
    code, said = ended(torchrun("-m", "flexmemory", *command, processes=processes))
    assert code == 0, said
    return said


TWO_GPUS = (pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"))


@pytest.mark.parametrize(
    ("processes", "device"), [(2, "cpu"), (4, "cpu"), pytest.param(2, "cuda", marks=TWO_GPUS, id="nccl")]
)
def test_gradients_of_a_step_are_those_of_one_process(processes, device, prepared, tmp_path):
    out = tmp_path / "gradients.safetensors"
    program = str(ROOT / "tests" / "train" / "spread_gradients.py")
    code, said = ended(torchrun(program, str(prepared), str(out), device, processes=processes))
    assert code == 0, said
    expected = gradients(World(device=torch.device(device)), data=prepared)
    found = load_file(out)
    assert found.keys() == expected.keys()
    exact = 1e-9 if device == "cpu" else 2e-6  # kernels add in fp32
    for name, tensor in found.items():
        tolerance = 2e-6 if name.endswith((".loss", ".norms")) else exact  # those two are kept in fp32
        torch.testing.assert_close(
            tensor, expected[name], rtol=tolerance, atol=exact * 1e-3, msg=lambda said, name=name: f"{name}: {said}"
        )


def test_a_run_goes_on_with_other_numbers_of_processes(prepared, tmp_path):
    """4 steps on two, 4 more on four, 4 more on one: the losses of one process throughout."""
    assert main(arguments(prepared, tmp_path / "one", "--total-tokens", "3072")) == 0
    many = tmp_path / "many"
    job = ("--rows-per", "job")
    run_on(
        2, *arguments(prepared, many, "--total-tokens", "3072", "--eval-every", "4", *job), "--keep-checkpoints", "9"
    )
    for folder in list_checkpoints(many)[1:]:
        folder.rename(tmp_path / folder.name)
    run_on(4, "train", "nano-memory", "--data", str(prepared), "--out", str(many), "--device", "cpu", "--resume")
    for folder in list_checkpoints(many)[2:]:
        folder.rename(tmp_path / f"second-{folder.name}")
    assert (
        main(["train", "nano-memory", "--data", str(prepared), "--out", str(many), "--device", "cpu", "--resume"]) == 0
    )
    lines, expected = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("many", "one"))
    losses, expected_losses = ([line["loss"] for line in each if "loss" in line] for each in (lines, expected))
    assert losses == pytest.approx(expected_losses, rel=0, abs=2e-6)
    assert lines[-1]["val_loss"] == pytest.approx(expected[-1]["val_loss"], abs=2e-6)
    weights, expected_weights = (
        dict(Checkpoint.open(tmp_path / name).load().named_parameters()) for name in ("many", "one")
    )
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], rtol=0, atol=1e-4, msg=name)


def test_a_number_of_processes_that_does_not_divide_is_refused(prepared, tmp_path):
    code, said = ended(torchrun("-m", "flexmemory", *arguments(prepared, tmp_path / "run"), processes=3))
    assert code != 0
    assert "batch_tokens (256) must be a multiple of seq_len * micro_batch_size * processes (32 * 1 * 3 = 96)" in said
    assert not (tmp_path / "run").exists()


def wait_for(condition, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def workers(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of the ranks, in their order."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {}
    for child in children:
        values = dict(
            entry.split("=", 1) for entry in Path(f"/proc/{child}/environ").read_text().split("\0") if "=" in entry
        )
        if "RANK" in values:
            ranks[int(values["RANK"])] = int(child)
    return [ranks[rank] for rank in sorted(ranks)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=TWO_GPUS, id="nccl")])
def test_a_killed_process_ends_the_run_which_goes_on_from_its_checkpoint(device, prepared, tmp_path):
    out = tmp_path / "run"
    place = ("--device", device, "--compile", "off")
    process = torchrun("-m", "flexmemory", *arguments(prepared, out, "--total-tokens", "2560000", *place), processes=2)
    wait_for(lambda: list_checkpoints(out), process)
    os.kill(workers(process)[1], signal.SIGKILL)
    code, said = ended(process)
    assert code != 0
    assert "process 0 of 2 lost another process of the run, which ended; run the same command with --resume" in said
    kept = list_checkpoints(out)[-1]
    steps = int(kept.name[5:]) + 2
    more = ("--resume", "--total-tokens", str(256 * steps), "--rows-per", "auto", *place)
    said = run_on(2, *arguments(prepared, out, *more))
    assert "unique ids in all processes" in said
    assert f"resuming after step {steps - 2} of {steps}" in said
    assert list_checkpoints(out)[-1].name == f"step-{steps:08d}"


def test_a_signal_to_all_ends_all_after_one_checkpoint(prepared, tmp_path):
    out = tmp_path / "run"
    process = torchrun("-m", "flexmemory", *arguments(prepared, out, "--total-tokens", "2560000"), processes=2)
    wait_for(lambda: list_checkpoints(out), process)
    for worker in workers(process)[1:]:  # one is enough: they agree
        os.kill(worker, signal.SIGTERM)
    code, said = ended(process)
    assert code != 0
    command = "torchrun --nproc-per-node=2 -m flexmemory train nano-memory"
    assert f"stopped by SIGTERM; saved {list_checkpoints(out)[-1]}; to go on: {command}" in said


def test_a_loss_that_is_not_finite_in_one_process_ends_all(prepared, tmp_path):
    program = tmp_path / "poisoned.py"
    program.write_text(
        "import os, sys, torch\n"
        "from flexmemory.cli import main\n"
        "from flexmemory.train import step\n"
        "head_loss, calls = step.head_loss, []\n"
        "def poisoned(hidden, *arguments, **options):\n"
        "    calls.append(1)\n"
        "    bad = os.environ['RANK'] == '1' and len(calls) == 4 * 5 + 2\n"
        "    return head_loss(hidden * (torch.nan if bad else 1.0), *arguments, **options)\n"
        "step.head_loss = poisoned\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    out = tmp_path / "run"
    command = arguments(prepared, out, "--total-tokens", "2560", "--eval-every", "100", "--rows-per", "step")
    code, said = ended(torchrun(str(program), *command, processes=2))
    assert code != 0
    assert (
        f"step 6 is not finite: loss nan, gradient norm nan; the last good checkpoint is {list_checkpoints(out)[-1]}"
        in said
    )
    assert [folder.name for folder in list_checkpoints(out)] == ["step-00000004"]
