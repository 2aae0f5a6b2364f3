"""What the README says can be done, and its numbers are those that were measured."""

import contextlib
import re
import runpy
import shlex

import pytest
import torch

from tests.cli.conftest import REPOSITORY, load_script, readme_blocks, run


def test_every_command_says_something(walkthrough):
    assert {command.split()[1] for command in walkthrough.outputs} == {
        "info", "prepare", "train", "plot", "tol", "generate", "eval", "index", "explore", "edit",
    }  # fmt: skip
    assert all(output.strip() for output in walkthrough.outputs.values())


def test_the_python_block_runs_and_lookups_agree(walkthrough, tmp_path, capsys):
    (block,) = readme_blocks("python")
    script = tmp_path / "block.py"
    script.write_text(block)
    with contextlib.chdir(walkthrough.folder):
        names = runpy.run_path(str(script))
    assert names["logits"].shape == names["dimmed"].shape
    logits = names["logits"].detach()
    rounding, experiment = ((logits - names[name].detach()).norm() / logits.norm() for name in ("looked_up", "dimmed"))
    assert rounding < 1e-3  # of rows to bf16
    assert experiment > 0.01
    assert "(" in capsys.readouterr().out


def test_the_block_of_the_reading_guide_runs(capsys):
    text = (REPOSITORY / "docs" / "reading.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    with contextlib.chdir(REPOSITORY):
        exec(compile(block, "reading.md", "exec"), {})
    said = capsys.readouterr().out
    assert "\u2423April" in said  # a month, as its comment says
    assert float(said.rsplit(": ", 1)[1]) > 0.001


def test_the_blocks_of_the_editing_guide_run(capsys, tmp_path):
    text = (REPOSITORY / "docs" / "editing.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (commands,) = re.findall(r"```\n(flexmemory.*?)```", text, flags=re.DOTALL)
    (tmp_path / "models").symlink_to(REPOSITORY / "models")
    with contextlib.chdir(tmp_path):
        exec(compile(block, "editing.md", "exec"), {})
        said = capsys.readouterr().out.splitlines()
        for line in commands.splitlines():
            run(*shlex.split(line, comments=True)[1:])
    assert [re.findall(r"[A-Z]\w+", line)[0] for line in said[4:]] == ["Berlin", "London", "France", "Chicago"]
    printed = [[float(chance) for chance in re.findall(r"0\.\d+", line)] for line in said[:4]]
    before, after = torch.tensor(printed[:2]), torch.tensor(printed[2:])
    table = [
        [float(cell) for cell in row.split("|")[2:6]] for row in re.findall(r"^\| He lived.*$", text, re.MULTILINE)
    ]
    expected = torch.stack((before, after), dim=2).flatten(1)
    torch.testing.assert_close(torch.tensor(table), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("path", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *sorted(
    str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "docs").glob("*.md")
)])  # fmt: skip
def test_links_lead_somewhere(path):
    page = REPOSITORY / path
    for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if not link.startswith(("http://", "https://")):
            assert (page.parent / link).exists(), f"{path} links to {link}"


def test_tables_are_those_of_the_committed_results():
    module = load_script("benchmarks/readme.py")
    for document in module.DOCUMENTS:
        written = (REPOSITORY / document).read_text(encoding="utf-8")
        assert module.render(written, document) == written, document
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    perplexity = re.search(r"\| validation perplexity \| ([\d.]+)", text)
    assert perplexity is not None
    assert module.render(text.replace(perplexity[1], "1.0")) == text


def test_every_test_that_the_paper_map_names_exists():
    named = re.findall(r"`(tests/\S+\.py)::(\w+)`", (REPOSITORY / "docs/paper-map.md").read_text(encoding="utf-8"))
    assert len(named) > 15
    for path, name in named:
        assert f"\ndef {name}(" in (REPOSITORY / path).read_text(encoding="utf-8"), f"{path}::{name}"
