"""`flexmemory plot`: which runs, under which names, and what is no run."""

import json
import shutil
import sys

import pytest

from tests.cli.conftest import run


def write_run(folder, *, lines=2, **values):
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, lines + 1):
            at = {"step": step, "tokens": 1000 * step, "train_s": 3.0 * step, "flops": 2e12 * step}
            file.write(json.dumps({**at, "ce": 5.0 / step, **values}) + "\n")
    return folder


def names(output):
    """First column of the printed table."""
    return [line.split()[0] for line in output.splitlines()[1:-1]]


def test_a_run_of_training_is_drawn(walkthrough, tmp_path):
    image = tmp_path / "new" / "losses.png"
    output = run("plot", walkthrough / "runs/flex3", "--out", image)
    assert image.read_bytes().startswith(b"\x89PNG")
    assert names(output) == ["flex3"]
    assert output.splitlines()[-1] == str(image)


def test_the_table_says_where_each_run_is(tmp_path):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "bc", lines=3, val_loss=2.5)]
    with (runs[0] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "tok')  # being written
    header, *rows, _ = run("plot", *runs, "--out", tmp_path / "losses.png").splitlines()
    assert header.split() == ["tokens", "train_s", "flops", "ce", "val_loss", "val_ppl"]
    assert [row.split() for row in rows] == [
        ["a", "2,000", "6", "4e+12", "2.5000", "-", "-"],
        ["bc", "3,000", "9", "6e+12", "1.6667", "2.5000", "-"],
    ]


def test_names_tell_runs_apart(tmp_path, monkeypatch):
    for folder in ("a/flex", "b/flex", "c/x/flex", "c/y/flex"):
        write_run(tmp_path / folder)
    shutil.copy(tmp_path / "a/flex/metrics.jsonl", tmp_path / "copied.jsonl")
    monkeypatch.chdir(tmp_path / "a/flex")

    def shown(*runs):
        return names(run("plot", *runs, "--out", tmp_path / "losses.png"))

    assert shown(".") == ["flex"]
    assert shown("metrics.jsonl", tmp_path / "b/flex/") == ["a/flex", "b/flex"]
    assert shown(tmp_path / "c/x/flex", tmp_path / "c/y/flex", tmp_path / "copied.jsonl")[:2] == ["x/flex", "y/flex"]
    assert shown(tmp_path / "copied.jsonl", ".") == ["copied.jsonl", "flex"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no loss"),
        ('{"step": 1, "tokens": 8, "ce"', "holds no loss"),
        ('{"step": 1, "tokens": 8, "text": "a sample"}\n', "holds no loss"),
        ('{\n  "model": {}\n}\n', "is not lines of JSON"),
        ("\x89PNG\n\x00", "is not lines of JSON"),
    ],
)
def test_files_without_losses(tmp_path, refused, content, message):
    (tmp_path / "file").write_text(content)
    assert f"{tmp_path / 'file'} {message}" in refused("plot", tmp_path / "file", "--out", tmp_path / "losses.png")
    assert not (tmp_path / "losses.png").exists()


def test_mistakes(tmp_path, refused, monkeypatch):
    good = write_run(tmp_path / "good")
    (tmp_path / "empty").mkdir()
    out = ("--out", tmp_path / "losses.png")
    assert "name a run first" in refused("plot", *out)
    assert f"{tmp_path / 'none'} does not exist" in refused("plot", good, tmp_path / "none", *out)
    assert f"{tmp_path / 'empty'} has no metrics.jsonl" in refused("plot", tmp_path / "empty", *out)
    assert "each run can be given once" in refused("plot", good, good / "metrics.jsonl", *out)
    assert "is a folder; name an image" in refused("plot", good, "--out", tmp_path)
    assert "'txt' is not supported" in refused("plot", good, "--out", tmp_path / "losses.txt")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'flexmemory[train]'" in refused("plot", good, *out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "good"]
