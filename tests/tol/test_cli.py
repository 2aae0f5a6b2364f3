"""`flexmemory tol`: results on stdout, a mistake is one sentence and exit code 2."""

import json
import re

import pytest
import torch

from flexmemory.cli import main
from flexmemory.tokenizer import Tokenizer
from flexmemory.tol.store import ToLStore
from tests.conftest import NANO
from tests.tol.conftest import edit_manifest, files, flip_byte
from tests.train.conftest import write_prepared


def refused(capsys, *arguments) -> str:
    """The sentence that a mistake is answered with."""
    capsys.readouterr()
    assert main(["tol", *map(str, arguments)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert re.fullmatch(r"flexmemory: error: [^\n]+\n", output.err)
    return output.err


def test_build_info_and_verify(nano, tmp_path, capsys):
    out = tmp_path / "store"
    assert main(["tol", "build", str(nano.path), "--out", str(out), "--layers", "2", "0", "--codec", "fp32"]) == 0
    built = capsys.readouterr().out
    assert ToLStore.open(out, checkpoint=nano).layers == (2, 0)
    assert main(["tol", "info", str(out)]) == 0
    assert capsys.readouterr().out == built
    for text in ("fp32", "2 of 3: 2 0", "V 512, L 2, D 48", "0.000 GB", "384 bytes", nano.fingerprint[:12]):
        assert text in built
    assert f"rows-00000.safetensors  tokens 0 to 511  {512 * 384 + 4096:,} bytes" in built
    assert main(["tol", "verify", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: all blocks match their checksums (1)\n"
    assert main(["tol", "verify", str(out), "--checkpoint", str(nano.path), "--sample", "9"]) == 0
    assert re.search(rf"{out}: all sampled rows are those of {nano.path} \((9|10|11)\)\n", capsys.readouterr().out)


def test_embeddings_and_counts_are_stored(nano, tmp_path, capsys):
    tokenizer = nano.tokenizer()
    ids = tokenizer.encode("one two two one one")
    data = write_prepared(tmp_path / "data", tokenizer=tokenizer, splits={"train": [ids, ids[:1]], "validation": [[3]]})
    out = tmp_path / "store"
    assert main(["tol", "build", str(nano.path), "--out", str(out), "--embedding", "--counts", str(data)]) == 0
    built = capsys.readouterr().out
    store = ToLStore.open(out, checkpoint=nano)
    assert store.embedding
    counts = store.counts()
    assert counts is not None
    assert torch.equal(counts, torch.bincount(torch.tensor([*ids, ids[0]]), minlength=512))
    assert re.search(r"embedding +in the row\n", built)
    assert re.search(rf"counts +of {len(ids) + 1} tokens\n", built)
    assert main(["tol", "verify", str(out), "--checkpoint", str(nano.path)]) == 0


def test_counts_of_other_tokens_are_refused(nano, tmp_path, capsys):
    other = Tokenizer.train(["three four"], vocab_size=300)
    data = write_prepared(tmp_path / "data", tokenizer=other, splits={"train": [[1, 2]], "validation": []})
    message = refused(capsys, "build", nano.path, "--out", tmp_path / "out", "--counts", data)
    assert "was prepared with another tokenizer than" in message
    assert "no prepared data" in refused(capsys, "build", nano.path, "--out", tmp_path / "out", "--counts", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_building_again_is_refused_and_changes_nothing(nano, store, capsys):
    before = files(store.path)
    assert "already exists" in refused(capsys, "build", nano.path, "--out", store.path)
    assert files(store.path) == before


def test_mistakes_in_building(nano, checkpoint_of, tmp_path, capsys):
    out = tmp_path / "out"
    assert "unknown ToL codec 'bf17'" in refused(capsys, "build", nano.path, "--out", out, "--codec", "bf17")
    assert "layers must be distinct" in refused(capsys, "build", nano.path, "--out", out, "--layers", "0", "0")
    assert "does not exist" in refused(capsys, "build", tmp_path / "none", "--out", out)
    dense = checkpoint_of(NANO["nano-base"], name="dense")
    assert "dense model has no memory" in refused(capsys, "build", dense.path, "--out", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_gpu_is_said(nano, tmp_path, capsys):
    message = refused(capsys, "build", nano.path, "--out", tmp_path / "out", "--device", "cuda")
    assert "there is no device 'cuda' here, only cpu" in message


def test_damage_is_refused(store, capsys):
    flip_byte(store.path / "rows-00000.safetensors", 5000)
    assert "damaged in tokens 0 to 15" in refused(capsys, "verify", store.path)
    (store.path / "rows-00002.safetensors").write_bytes(b"")
    for verb in ("info", "verify"):
        assert "incomplete: rows-00002.safetensors has 0 bytes" in refused(capsys, verb, store.path)


def test_newer_and_unknown_formats_are_refused(store, capsys):
    edit_manifest(store, lambda manifest: manifest.update(codec="int3"))
    assert "unknown ToL codec 'int3'" in refused(capsys, "info", store.path)
    edit_manifest(store, lambda manifest: manifest.update(format_version=5))
    assert "update flexmemory" in refused(capsys, "info", store.path)
    (store.path / "manifest.json").unlink()
    assert "has no manifest.json" in refused(capsys, "info", store.path)
    store.path.rename(store.path.with_name("store.partial"))
    assert "not whole yet" in refused(capsys, "info", store.path)


def test_other_sources_are_refused(store, checkpoint_of, capsys):
    other = checkpoint_of(text="three four")
    assert "another tokenizer" in refused(capsys, "verify", store.path, "--checkpoint", other.path)
    other = checkpoint_of(text="one two", seed=1, name="other")
    assert "another checkpoint" in refused(capsys, "verify", store.path, "--checkpoint", other.path)


def test_a_sample_needs_a_checkpoint(store, capsys):
    assert "--sample recomputes rows and needs --checkpoint" in refused(capsys, "verify", store.path, "--sample", 3)


def test_requantize_and_diff(nano, tmp_path, capsys):
    exact, rough, report = tmp_path / "fp32", tmp_path / "int4", tmp_path / "diff.json"
    assert main(["tol", "build", str(nano.path), "--out", str(exact), "--codec", "fp32"]) == 0
    assert main(["tol", "requantize", str(exact), "--out", str(rough), "--codec", "int4", "--layers", "1", "0"]) == 0
    built = capsys.readouterr().out
    assert re.search(r"bands +512 tokens of 50 bytes\n", built)  # two layers of 48 numbers, 4 bits each, and a scale
    assert ToLStore.open(rough, checkpoint=nano).layers == (1, 0)
    assert main(["tol", "diff", str(exact), str(rough), "--worst", "3", "--out", str(report)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^layer 1 +\d+\.\d+% +", shown, flags=re.MULTILINE)
    assert "not compared, as one of the two lacks it: layer 2" in shown
    assert len(re.findall(r"^token \d+: \d+\.\d+% in layer [01]$", shown, flags=re.MULTILINE)) == 3
    assert len(json.loads(report.read_text())["tokens"]) == 512
    assert "already exists" in refused(capsys, "diff", exact, rough, "--out", report)
    assert "unknown ToL codec 'int9'" in refused(
        capsys, "requantize", exact, "--out", tmp_path / "x", "--codec", "int9"
    )
    assert not (tmp_path / "x").exists()
