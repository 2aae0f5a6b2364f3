"""The example scripts, run as they are, on little."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from flexmemory.model.checkpoint import Checkpoint
from flexmemory.tol.build import build_store
from tests.hf.conftest import MINI

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """`run(name, *arguments)`: what the script says."""

    def script(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return script


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks by the old name
@pytest.mark.parametrize("lora", [False, True])
def test_fine_tune(run, tmp_path, lora):
    pytest.importorskip("accelerate")
    if lora:
        pytest.importorskip("peft")
    text = tmp_path / "text.md"
    text.write_text("A token's row depends on the token alone. " * 40)
    small = ["--steps", 3, "--length", 32, "--batch", 2, "--lr", 1e-3]
    options = ["--text", text, "--out", tmp_path / "out", *small, *(["--lora"] if lora else [])]
    said = run("fine_tune.py", "--model", MINI / "mini-flex3", *options)
    before, after = (float(said.split(word)[0].split()[-1]) for word in (" before", " after"))
    assert after < before
    if lora:
        assert (tmp_path / "out" / "model" / "adapter_model.safetensors").is_file()
    else:
        Checkpoint.open(tmp_path / "out" / "model").verify()


def test_offload(run, tmp_path):
    build_store(Checkpoint.open(MINI / "mini-memory"), tmp_path / "tol", codec="bf16")
    said = run("offload.py", "--model", MINI / "mini-memory", "--tol", tmp_path / "tol", "--tokens", 4)
    assert "The history of" in said
    assert "MB of weights in memory; rows: disk" in said


def test_the_blocks_of_the_guide(tmp_path, monkeypatch, capsys):
    (tmp_path / "models").symlink_to(MINI)
    monkeypatch.chdir(tmp_path)
    build_store(Checkpoint.open(MINI / "mini-memory"), Path("runs/tol"), codec="bf16")
    guide = (EXAMPLES.parent / "docs" / "transformers.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL):
        exec(block, names)
    assert capsys.readouterr().out.startswith("The history of")
    Checkpoint.open("runs/saved").verify()
