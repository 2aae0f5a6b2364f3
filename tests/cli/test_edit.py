"""`flexmemory edit`: what it writes is what the library makes, and a user's mistake is a sentence."""

import json
from pathlib import Path

import pytest
import torch

from flexmemory.cli import main
from flexmemory.interpret.patch import Patch
from flexmemory.interpret.spill import spill
from flexmemory.interpret.tkv import TokenMemory
from flexmemory.model.checkpoint import Checkpoint, save_checkpoint
from flexmemory.tokenizer import Tokenizer
from flexmemory.tol.build import build_store
from tests.cli.conftest import run
from tests.conftest import NANO, random_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("edit") / "checkpoint"
    folder.mkdir()
    tokenizer = Tokenizer.train(["one two one two three three"], vocab_size=300)
    save_checkpoint(folder, random_model(NANO["nano-flex1"], dtype=torch.float32), tokenizer)
    return Checkpoint.open(folder)


def rows(model) -> torch.Tensor:
    return model.compute_rows(torch.arange(512)).detach()


def ids(checkpoint: Checkpoint) -> tuple[int, int]:
    return tuple(checkpoint.tokenizer().encode(text)[0] for text in (" two", " three"))  # type: ignore[return-value]


def test_a_row_from_patch_to_store_and_back(checkpoint, tmp_path):
    two, three = ids(checkpoint)
    patch, path = tmp_path / "p.safetensors", checkpoint.path
    said = run("edit", "row", path, "--token", " two", "--like", " three", "--out", patch, "--why", "a test")
    assert "a test" in said
    assert "3 rows" in said
    assert run("edit", "show", patch) == said
    model = checkpoint.load()
    expected = rows(model)
    expected[two] = expected[three]
    torch.testing.assert_close(rows(Patch.load(patch).apply(model)), expected)
    report = run("edit", "spill", patch, path)
    assert "exact over 512 tokens" in report
    assert [line.split()[1:3] for line in report.splitlines()[2:]] == [["0", "0"]] * 3
    build_store(checkpoint, tmp_path / "tol", codec="fp32")
    assert "0.000% off" in run("edit", "apply", patch, "--to", tmp_path / "tol", "--out", tmp_path / "edited-tol")
    assert "rows of 1 tokens, in 1 edits" in run("tol", "info", tmp_path / "edited-tol")
    run("tol", "verify", tmp_path / "edited-tol", "--checkpoint", path)
    run("edit", "apply", patch, "--to", path, "--out", tmp_path / "edited")
    run("tol", "verify", tmp_path / "edited-tol", "--checkpoint", tmp_path / "edited")
    found = run("edit", "diff", path, tmp_path / "edited", "--worst", "5", "--out", tmp_path / "diff.json")
    assert [line.split()[-1] for line in found.splitlines()[1:5]] == ["0", "1", "1", "1"]
    assert f"token {two} (' two')" in found
    assert json.loads((tmp_path / "diff.json").read_text())["changed"] == [0, 1, 1, 1]
    run("edit", "revert", tmp_path / "edited", "--out", tmp_path / "back")
    assert (tmp_path / "back" / "manifest.json").read_bytes() == (path / "manifest.json").read_bytes()


def test_other_edits(checkpoint, tmp_path):
    two, three = ids(checkpoint)
    memory, path = TokenMemory(checkpoint.load()), checkpoint.path

    def made(name: str, *args: str | Path) -> Patch:
        run("edit", *args, "--out", tmp_path / name)
        return Patch.load(tmp_path / name)

    def same(patch: Patch, edit) -> bool:
        return patch.steps[0].kind == edit.patch.steps[0].kind and torch.equal(
            rows(patch.apply(memory.model)), rows(edit.patch.apply(memory.model))
        )

    edit = memory.edit()
    edit.scale_row(two, layer=1, factor=0.5)
    assert same(made("a", "row", path, "--token", f"T{two}", "--scale", "0.5", "--layers", "1"), edit)
    edit = memory.edit()
    edit.swap_rows(two, three)
    assert same(made("b", "swap", path, "--tokens", " two", " three"), edit)
    edit = memory.edit()
    edit.scale_value(layer=0, key=3, factor=0.0)
    edit.scale_value(layer=2, key=4, factor=0.0)
    assert same(made("c", "cell", path, "--cells", "L0K3", "L2K4", "--scale", "0"), edit)
    edit = memory.edit()
    edit.scale_keys([3, 4], layer=0, factor=2.0, token_ids=torch.tensor([two]))
    assert same(made("d", "cell", path, "--cells", "L0K3", "L0K4", "--scale", "2", "--tokens", " two"), edit)
    edit = memory.edit()
    edit.rank_one(two, layer=1, row=edit.row(three, layer=1))
    assert same(made("e", "rank-one", path, "--token", " two", "--layer", "1", "--like", " three"), edit)
    edit = memory.edit()
    edit.suppress(torch.tensor([two, three]), count=3)
    assert same(made("f", "suppress", path, "--tokens", " two", " three", "--count", "3"), edit)
    assert made("g", "suppress", path, "--tokens", " two", "--level", "rows", "--count", "3").rows_only
    report = run("edit", "spill", tmp_path / "e", path, "--worst", "3").splitlines()
    token, layer, moved = spill(memory, Patch.load(tmp_path / "e")).worst(1)[0]
    assert report[3].endswith(f"(T{token}) in layer {layer}: {moved:.4g}")
    assert len(report) == 6


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["row", "BASE", "--token", " two", "--out", "p"], "give either --like TOKEN or --scale"),
        (["row", "BASE", "--token", " two three", "--scale", "0", "--out", "p"], "is 2 tokens"),
        (["row", "BASE", "--token", "T512", "--scale", "0", "--out", "p"], "token id 512 is out of range"),
        (["row", "BASE", "--token", " two", "--scale", "0", "--layers", "7", "--out", "p"], "layer 7 is out of range"),
        (["row", "nowhere", "--token", " two", "--scale", "0", "--out", "p"], "nowhere does not exist"),
        (["cell", "BASE", "--cells", "K3", "--scale", "0", "--out", "p"], "L12K3071"),
        (["cell", "BASE", "--cells", "L0K9999", "--scale", "0", "--out", "p"], "key 9999 is out of range"),
        (["suppress", "BASE", "--tokens", " two", "--strength", "3", "--out", "p"], "between 0 and 1"),
        (["show", "nowhere"], "no patch at nowhere"),
        (["spill", "PATCH", "BASE", "--worst", "-1"], "must not be negative"),
        (["spill", "PATCH", "OTHER"], "was made for checkpoint"),
        (["apply", "PATCH", "--to", "OTHER", "--out", "out"], "was made for checkpoint"),
        (["apply", "PATCH", "--to", "BASE", "--out", "BASE"], "already exists"),
        (["revert", "BASE", "--out", "out"], "was not edited"),
        (["diff", "BASE", "DENSE"], "dense model has no rows"),
    ],
)
def test_mistakes_are_sentences(checkpoint, tmp_path, args, message, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = {"BASE": checkpoint.path, "PATCH": tmp_path / "patch.safetensors"}
    for name, preset in (("OTHER", "nano-flex1"), ("DENSE", "nano-base")):
        if name in args:
            folders[name] = tmp_path / name
            folders[name].mkdir()
            save_checkpoint(folders[name], random_model(NANO[preset], seed=1), checkpoint.tokenizer())
    if "PATCH" in args:
        run("edit", "row", checkpoint.path, "--token", " two", "--scale", "0", "--out", folders["PATCH"])
    before = sorted(tmp_path.iterdir())
    assert main(["edit", *(str(folders.get(arg, arg)) for arg in args)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert sorted(tmp_path.iterdir()) == before
