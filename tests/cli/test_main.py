"""The command itself: verbs, help, mistakes."""

import subprocess
import sys

import pytest

from flexmemory import __version__
from flexmemory.cli import VERBS, main


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"flexmemory {__version__}\n"


def test_help_names_every_verb(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert [verb for verb in VERBS if f"\n  {verb} " not in shown] == []


def test_no_verb_is_a_mistake(capsys):
    assert main([]) == 2
    assert "usage: flexmemory VERB" in capsys.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert "usage: flexmemory" in capsys.readouterr().out


def test_unknown_verb_names_the_nearest(capsys):
    assert main(["infoo"]) == 2
    assert "unknown verb 'infoo'; did you mean 'info'?" in capsys.readouterr().err


def test_unknown_option_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["info", "1b-base", "--contex", "3"])
    assert stop.value.code == 2
    assert "--context" in capsys.readouterr().err


def test_traceback_only_on_request(capsys):
    assert main(["info", "1b-bace"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert main(["info", "1b-bace", "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_is_no_traceback(monkeypatch, capsys):
    def interrupted(_argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("flexmemory.cli.info.main", interrupted)
    assert main(["info", "1b-base"]) == 130
    assert capsys.readouterr().err.startswith("flexmemory: error: interrupted")


def test_python_dash_m():
    command = [sys.executable, "-m", "flexmemory", "info", "1b-bace"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("flexmemory: error: unknown preset '1b-bace'; did you mean '1b-base'?")


def test_importing_the_command_is_light():
    """Verbs are imported when called: `--help` must not wait for torch."""
    program = "import sys, flexmemory.cli; flexmemory.cli.main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0
