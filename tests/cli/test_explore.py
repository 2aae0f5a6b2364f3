"""`flexmemory explore`, up to the point where it would serve for ever."""

import shutil
import subprocess
import sys

import pytest

from flexmemory.interpret.reader import MemoryIndex
from flexmemory.model.checkpoint import Checkpoint
from tests.cli.conftest import run


@pytest.fixture
def checkpoint(walkthrough, tmp_path):
    """A checkpoint of the test's own."""
    return shutil.copytree(Checkpoint.open(walkthrough / "runs/flex3").path, tmp_path / "model")


@pytest.fixture
def served(monkeypatch):
    """What would be served."""
    calls = []
    monkeypatch.setattr("flexmemory.serve.explorer.serve", lambda app, **options: calls.append((app, options)))
    return calls


def test_the_index_is_built_beside_the_checkpoint_once(checkpoint, served):
    run("explore", checkpoint, "--no-open")
    folder = checkpoint.with_name("index-model")
    built = MemoryIndex.open(folder, checkpoint=Checkpoint.open(checkpoint)).path.stat().st_mtime_ns
    run("explore", checkpoint, "--port", "0")
    assert folder.stat().st_mtime_ns == built
    options = [options for _, options in served]
    assert options[0] == {"host": "127.0.0.1", "port": 8642, "open_browser": False}
    assert options[1] == {"host": "127.0.0.1", "port": 0, "open_browser": True}


def test_an_export_and_what_it_says(checkpoint, tmp_path, served):
    assert "files in" in run("explore", checkpoint, "--index", tmp_path / "i", "--export", tmp_path / "pages")
    assert (tmp_path / "pages/index.html").is_file()
    assert served == []


def test_mistakes(checkpoint, tmp_path, refused, walkthrough, served):
    assert "does not exist" in refused("explore", tmp_path / "none")
    assert "--port" in refused("explore", checkpoint, "--port", "70000")
    assert "already exists" in refused("explore", checkpoint, "--export", checkpoint)
    assert "no device" in refused("explore", checkpoint, "--device", "tpu")
    assert "no single address" in refused("explore", checkpoint, "--host", "0.0.0.0")
    assert "does not exist" in refused("explore", checkpoint, "--compare", tmp_path / "none")
    assert "is not an index" in refused("explore", checkpoint, "--index", walkthrough / "runs/data")
    assert not (tmp_path / "index-model").exists(), "mistakes are found before the index is built"


def test_help_does_not_wait_for_the_server_or_torch():
    program = (
        "import sys, contextlib, flexmemory.cli\n"
        "with contextlib.suppress(SystemExit): flexmemory.cli.main(['explore', '--help'])\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'starlette', 'uvicorn')))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0
