"""The README's walk-through, run once: every later test of the command line stands on what it made."""

import contextlib
import dataclasses
import importlib.util
import io
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from flexmemory.cli import main

REPOSITORY = Path(__file__).parents[2]


def load_script(path: str) -> ModuleType:
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, REPOSITORY / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


def readme_blocks(language: str) -> list[str]:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def run(*args: str | Path) -> str:
    """What `flexmemory ARGS` prints; it must succeed."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = main([str(arg) for arg in args])
    assert code == 0, args
    return output.getvalue()


@dataclasses.dataclass(frozen=True)
class Walkthrough:
    folder: Path
    outputs: dict[str, str]
    """What each command of the README printed."""

    def __truediv__(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="session")
def walkthrough(tmp_path_factory: pytest.TempPathFactory) -> Walkthrough:
    """A folder in which the README's commands have run."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(REPOSITORY / "docs", folder / "docs")
    shutil.copy(REPOSITORY / "README.md", folder)
    (block,) = readme_blocks("bash")
    commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    with contextlib.chdir(folder):
        outputs = {shlex.join(command): run(*command[1:]) for command in commands if command[0] == "flexmemory"}
    assert len(outputs) == len(commands)
    return Walkthrough(folder, outputs)


@pytest.fixture(scope="session")
def exact_store(walkthrough: Walkthrough) -> Path:
    """The walk-through's rows in fp32."""
    run("tol", "build", walkthrough / "runs/flex3", "--out", walkthrough / "runs/tol-fp32", "--codec", "fp32")
    return walkthrough / "runs/tol-fp32"


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`refused(*args)`: the one sentence with which `flexmemory ARGS` refuses a user's mistake."""

    def run_and_fail(*args: str | Path) -> str:
        capsys.readouterr()
        assert main([str(arg) for arg in args]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        message = captured.err.strip().splitlines()[-1]
        assert message.startswith("flexmemory: error: ")
        assert "Traceback" not in captured.err
        return message.removeprefix("flexmemory: error: ")

    return run_and_fail
