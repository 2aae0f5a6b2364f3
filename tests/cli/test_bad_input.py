"""What users get wrong, end to end: one sentence, exit code 2, nothing lost or half made."""

import json
import shutil

import pytest

from flexmemory.storage import sha256_file
from flexmemory.tol.format import FORMAT_VERSION
from tests.cli.conftest import run


@pytest.fixture
def store(walkthrough, tmp_path):
    """A copy of the walk-through's store, to be damaged."""
    return shutil.copytree(walkthrough / "runs/tol", tmp_path / "tol")


@pytest.fixture
def generate(walkthrough, store, refused):
    def refusal(place):
        return refused("generate", walkthrough / "runs/flex3", "--tol", store, "--rows", place)

    return refusal


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_a_truncated_store(generate, store, place):
    shard = next(store.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "is incomplete" in generate(place)


@pytest.mark.parametrize("place", ["device", "host"])
def test_a_flipped_byte_is_found_when_rows_are_loaded(generate, store, place):
    shard = next(store.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1000] ^= 1
    shard.write_bytes(content)
    assert "damaged" in generate(place)


def test_a_store_of_a_newer_format(generate, store):
    manifest = json.loads((store / "manifest.json").read_text())
    (store / "manifest.json").write_text(json.dumps(manifest | {"format_version": FORMAT_VERSION + 1}))
    assert "update flexmemory" in generate("disk")


def test_a_store_that_is_still_being_built(generate, store):
    store.rename(store.with_name("tol.partial"))
    assert "is not whole yet, see tol.partial" in generate("disk")


def test_a_half_written_checkpoint(walkthrough, tmp_path, refused):
    (newest,) = (walkthrough / "runs/flex3/checkpoints").glob("step-*40")
    copy = shutil.copytree(newest, tmp_path / "checkpoint")
    (copy / "manifest.json").unlink()
    assert "is an incomplete checkpoint" in refused("generate", copy)
    assert "is an incomplete checkpoint" in refused("tol", "build", copy, "--out", tmp_path / "tol")
    assert "is an incomplete checkpoint" in refused("info", copy)
    assert not list(tmp_path.glob("tol*"))


def test_fewer_tokens_than_one_sequence(tmp_path, refused):
    (tmp_path / "short.txt").write_text("too short")
    run("prepare", tmp_path / "short.txt", "--out", tmp_path / "data", "--vocab-size", "300")
    options = ("--data", tmp_path / "data", "--out", tmp_path / "run")
    assert "need at least seq_len + 1 = 65" in refused("train", "nano-base", *options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"\x00\x01binary", "binary"), ("Größe in Latin-1".encode("latin-1"), "UTF-8")],
)
def test_text_that_is_none(tmp_path, refused, content, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    sentence = refused("prepare", path, "--out", tmp_path / "data")
    assert "bad.txt" in sentence
    assert message in sentence
    assert not (tmp_path / "data").exists()


def test_a_prepared_shard_with_an_id_outside_the_vocabulary(walkthrough, tmp_path, refused):
    data = shutil.copytree(walkthrough / "runs/data", tmp_path / "data")
    shard = data / "train-00000.bin"
    shard.write_bytes(b"\xff\xff" * (shard.stat().st_size // 2))
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["sha256"] = sha256_file(shard)
    (data / "manifest.json").write_text(json.dumps(manifest))
    sentence = refused("train", "nano-base", "--data", data, "--out", tmp_path / "run")
    assert "token id 65535, but its vocabulary has 512 ids" in sentence
