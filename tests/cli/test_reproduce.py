"""`flexmemory reproduce --quick`, from text to page."""

import json

import pytest

from flexmemory.cli import main


def test_quick_from_text_to_page(tmp_path, capsys):
    work = tmp_path / "study"
    command = ["reproduce", "--quick", "--work", str(work), "--device", "cpu"]
    parts = ["data", "sweep", "runs", "quality", "page"]
    assert main([*command, "--parts", *parts]) == 0
    page = work / "study.md"
    assert capsys.readouterr().out.strip() == str(page)
    text = page.read_text()
    assert "## Claims" in text
    assert "base-as-memory" in text
    assert (work / "images" / "study-quality.png").exists()
    written = (work / "results" / "quality.json").read_bytes()
    assert main([*command, "--parts", "sweep", "runs", "quality", "--sizes", "nano"]) == 0
    assert (work / "results" / "quality.json").read_bytes() == written
    entries = json.loads(written)["entries"]
    assert {entry["variant"] for entry in entries.values()} >= {"base", "memory", "flex3", "table"}


def test_text_is_needed(tmp_path, capsys):
    assert main(["reproduce", "--work", str(tmp_path / "study"), "--device", "cpu"]) == 2
    assert "give --corpus FILES, or --quick" in capsys.readouterr().err


def test_sizes_are_known(tmp_path, capsys):
    assert main(["reproduce", "--quick", "--work", str(tmp_path), "--device", "cpu", "--sizes", "mini"]) == 2
    assert "the study has no size 'mini'; it has nano" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--parts nothing", "--size-of 3"])
def test_unknown_options(tmp_path, option):
    with pytest.raises(SystemExit) as stopped:
        main(["reproduce", "--quick", "--work", str(tmp_path), *option.split()])
    assert stopped.value.code == 2
