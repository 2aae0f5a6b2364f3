"""Checkpoints are whole or refused, and load to the same bits."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flexmemory.model.checkpoint import Checkpoint, save_checkpoint
from flexmemory.storage import atomic_folder
from flexmemory.tokenizer import Tokenizer
from tests.conftest import VARIED, random_model


def saved(folder, name, *, tokenizer=None, dtype=torch.float32):
    model = random_model(VARIED[name], dtype=dtype)
    with atomic_folder(folder) as partial:
        save_checkpoint(partial, model, tokenizer)
    return model


@pytest.mark.parametrize("name", VARIED)
def test_loads_to_the_same_bits(name, tmp_path, tokens):
    model = saved(tmp_path / "checkpoint", name)
    checkpoint = Checkpoint.open(tmp_path / "checkpoint")
    checkpoint.verify()
    assert checkpoint.config == model.config
    ids = tokens(2, 9)
    loaded = checkpoint.load()
    with torch.no_grad():
        assert torch.equal(loaded(ids), model(ids))
        assert torch.equal(checkpoint.load(dtype=torch.bfloat16)(ids), model.to(torch.bfloat16)(ids))


def test_memory_weights_are_not_read_when_not_wanted(tmp_path, tokens):
    model = saved(tmp_path / "checkpoint", "nano-flex2")
    resident = Checkpoint.open(tmp_path / "checkpoint").load(memory=False)
    assert not any(".memory." in name for name, _ in resident.named_parameters())
    ids = tokens(1, 9)
    with torch.no_grad():
        assert torch.equal(resident(ids, model.rows(ids)), model(ids))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_weights_are_mapped_each_on_its_own_and_never_written_back(tmp_path):
    def mappings():
        return Path("/proc/self/maps").read_text().count(str(tmp_path))

    model = saved(tmp_path / "checkpoint", "nano-memory")
    checkpoint = Checkpoint.open(tmp_path / "checkpoint")
    loaded = checkpoint.load(memory=False)
    assert mappings() == len(list(loaded.parameters()))
    with torch.no_grad():
        loaded.norm.weight.zero_()
        loaded.blocks[0] = torch.nn.Identity()
    checkpoint.verify()
    assert mappings() == len(list(loaded.parameters()))
    assert torch.equal(checkpoint.load().norm.weight, model.norm.weight)
    converted = checkpoint.load(dtype=torch.float64)
    del loaded
    assert mappings() == 0
    assert converted.norm.weight.dtype == torch.float64


def test_loading_a_model_needs_no_compiler(tmp_path):
    saved(tmp_path / "checkpoint", "ffn+table")
    code = (
        "import sys; from flexmemory.model.checkpoint import Checkpoint; "
        f"Checkpoint.open({str(tmp_path / 'checkpoint')!r}).load(); sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_tied_head_is_stored_once_and_stays_tied(tmp_path):
    from safetensors import safe_open

    saved(tmp_path / "checkpoint", "nano-memory")
    with safe_open(tmp_path / "checkpoint" / "model.safetensors", framework="pt") as file:
        assert "head.weight" not in file.keys()  # noqa: SIM118 - not a mapping
    model = Checkpoint.open(tmp_path / "checkpoint").load()
    assert model.head.weight is model.get_parameter("embedding.weight")


def test_tokenizer_travels_with_the_weights(tmp_path):
    tokenizer = Tokenizer.train(["some text to learn from"], vocab_size=270)
    saved(tmp_path / "checkpoint", "nano-memory", tokenizer=tokenizer)
    checkpoint = Checkpoint.open(tmp_path / "checkpoint")
    assert checkpoint.tokenizer_fingerprint == tokenizer.fingerprint
    assert checkpoint.tokenizer().encode("some text") == tokenizer.encode("some text")


def test_a_run_folder_opens_its_newest_checkpoint(tmp_path):
    for step in (2, 10):
        saved(tmp_path / "checkpoints" / f"step-{step:08d}", "nano-base")
    (tmp_path / "checkpoints" / ".step-00000020.partial").mkdir()
    assert Checkpoint.open(tmp_path).path.name == "step-00000010"


def test_an_error_while_saving_leaves_nothing(tmp_path):
    def save_half():
        with atomic_folder(tmp_path / "checkpoint") as partial:
            (partial / "model.safetensors").write_bytes(b"half")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        save_half()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_never_replaced(tmp_path):
    saved(tmp_path / "checkpoint", "nano-base")
    before = (tmp_path / "checkpoint" / "manifest.json").read_bytes()
    with pytest.raises(FileExistsError, match="already exists; choose another"):
        saved(tmp_path / "checkpoint", "nano-memory")
    assert (tmp_path / "checkpoint" / "manifest.json").read_bytes() == before


def test_half_written_and_damaged_checkpoints_are_refused(tmp_path):
    good = tmp_path / "good"
    saved(good, "nano-memory")

    def damaged(name):
        shutil.copytree(good, tmp_path / name)
        return tmp_path / name

    with pytest.raises(FileNotFoundError, match="does not exist"):
        Checkpoint.open(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        Checkpoint.open(tmp_path / "empty")

    (damaged("unsealed") / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"incomplete checkpoint: it has weights but no manifest\.json"):
        Checkpoint.open(tmp_path / "unsealed")

    weights = damaged("truncated") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"is incomplete: model\.safetensors has \d+ bytes, expected \d+"):
        Checkpoint.open(tmp_path / "truncated")

    weights = damaged("flipped") / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors does not match its checksum"):
        Checkpoint.open(tmp_path / "flipped").verify()

    (damaged("garbled") / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        Checkpoint.open(tmp_path / "garbled")

    path = damaged("partial-manifest") / "manifest.json"
    path.write_text(json.dumps({"format": "flexmemory-checkpoint", "format_version": 1}))
    with pytest.raises(ValueError, match="lacks 'files'; it is damaged"):
        Checkpoint.open(tmp_path / "partial-manifest")

    path = damaged("newer") / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    with pytest.raises(ValueError, match="has checkpoint format 2; this version reads up to 1: update flexmemory"):
        Checkpoint.open(tmp_path / "newer")


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path):
    saved(tmp_path / "a", "nano-memory")
    saved(tmp_path / "b", "nano-flex1")
    manifest = tmp_path / "a" / "manifest.json"
    shutil.copy(tmp_path / "b" / "model.safetensors", tmp_path / "a")
    entries = json.loads(manifest.read_text())
    other = json.loads((tmp_path / "b" / "manifest.json").read_text())
    entries["files"]["model.safetensors"] = other["files"]["model.safetensors"]
    manifest.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=r"does not fit its config\.json"):
        Checkpoint.open(tmp_path / "a").load()
