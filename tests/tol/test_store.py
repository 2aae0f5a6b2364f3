"""Opening: what a store says of itself, and the folders that are refused."""

import dataclasses

import pytest

from flexmemory.model.checkpoint import Checkpoint
from flexmemory.tol.build import build_store
from flexmemory.tol.format import ToLMismatchError
from flexmemory.tol.store import ToLStore
from flexmemory.tol.tiers import open_rows
from tests.tol.conftest import SIZES, flip_byte


def test_a_store_says_what_it_holds(nano: Checkpoint, stored: ToLStore):
    store = ToLStore.open(stored.path, checkpoint=nano)
    assert store == stored
    width = {"bf16": 2, "fp32": 4}[store.codec]
    assert (store.layers, store.hidden_size, store.vocab_size) == ((0, 1, 2), 48, 512)
    assert (store.row_bytes, store.stride_bytes, store.nbytes) == (144 * width, 144 * width, 512 * 144 * width)
    assert sum(path.stat().st_size for path in store.path.glob("rows-*")) == store.nbytes + 4096 * len(
        store.manifest.shards
    )
    assert store.manifest.checkpoint_fingerprint == nano.fingerprint
    assert store.manifest.tokenizer_fingerprint == nano.tokenizer_fingerprint != ""


def test_another_checkpoint_is_refused(store, nano, checkpoint_of):
    other = dataclasses.replace(checkpoint_of(seed=1), tokenizer_fingerprint=nano.tokenizer_fingerprint)
    message = (
        rf"built from another checkpoint \(fingerprint {nano.fingerprint[:12]}.* has {other.fingerprint[:12]}\); use"
    )
    with pytest.raises(ToLMismatchError, match=message):
        ToLStore.open(store.path, checkpoint=other)


def test_another_tokenizer_with_the_same_weights_is_refused(store, nano, checkpoint_of):
    other = checkpoint_of(text="three four")
    assert other.fingerprint == nano.fingerprint
    with pytest.raises(ToLMismatchError, match=r"built from another tokenizer \(fingerprint"):
        ToLStore.open(store.path, checkpoint=other)
    without = checkpoint_of(name="without-tokenizer")
    with pytest.raises(ToLMismatchError, match=r"another tokenizer .* has none\)"):
        ToLStore.open(store.path, checkpoint=without)


def test_both_differences_are_named(store, checkpoint_of):
    with pytest.raises(ToLMismatchError, match=r"another checkpoint .* and another tokenizer"):
        ToLStore.open(store.path, checkpoint=checkpoint_of(seed=1, text="three four"))


@pytest.mark.parametrize("change", [-1, 1])
def test_a_shard_of_another_size_is_refused(store, change):
    shard = store.path / "rows-00003.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] if change < 0 else data + b"\0")
    with pytest.raises(
        ValueError, match=rf"incomplete: rows-00003.safetensors has {len(data) + change} bytes, expected"
    ):
        ToLStore.open(store.path)


def test_a_missing_shard_is_refused(store):
    (store.path / "rows-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"incomplete: rows-00001.safetensors is missing"):
        ToLStore.open(store.path)


@pytest.mark.parametrize(
    ("position", "message"),
    [(0, "has the header"), (8, "no valid safetensors header"), (30, "has the header|no valid safetensors header")],
)
def test_a_damaged_header_is_refused(store, position, message):
    flip_byte(store.path / "rows-00002.safetensors", position)
    with pytest.raises(ValueError, match=message):
        ToLStore.open(store.path)


def test_headers_that_say_another_shape_are_refused(store):
    shard = store.path / "rows-00002.safetensors"
    shard.write_bytes(shard.read_bytes().replace(b'"shape":[128,288]', b'"shape":[288,128]'))
    with pytest.raises(ValueError, match=r"has the header .*\[288, 128\].*, expected .*\[128, 288\]"):
        ToLStore.open(store.path)


def test_headers_of_other_writers_are_accepted(store):
    shard = store.path / "rows-00000.safetensors"
    data = shard.read_bytes()
    header = (
        b'{"__metadata__": {"format": "pt"}, "rows": {"data_offsets": [0, 36864], "shape": [128, 288], "dtype": "U8"}}'
    )
    shard.write_bytes(data[:8] + header.ljust(4088) + data[4096:])
    ToLStore.open(store.path)


def test_unfinished_and_foreign_folders_are_refused(nano, tmp_path, monkeypatch):
    out = tmp_path / "store"
    with pytest.raises(FileNotFoundError, match="does not exist; expected a folder written by"):
        ToLStore.open(out)
    with monkeypatch.context() as patch:
        patch.setattr("flexmemory.tol.build.publish", lambda partial, final: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build_store(nano, out, **SIZES)
    with pytest.raises(FileNotFoundError, match=r"store is not whole yet, see store.partial: run the same"):
        ToLStore.open(out)
    (tmp_path / "store.partial" / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no manifest.json: it is not a ToL store, or not a whole one"):
        ToLStore.open(tmp_path / "store.partial")
    with pytest.raises(ValueError, match="is not a ToL store"):
        ToLStore.open(nano.path)


@pytest.mark.parametrize("where", ["device", "host"])
def test_a_flipped_byte_is_found_when_the_table_is_loaded(where, store):
    flip_byte(store.path / "rows-00001.safetensors", 4096 + 100 * 288 + 3)
    with pytest.raises(ValueError, match=r"damaged: tokens 224 to 239 in rows-00001.safetensors do not match"):
        open_rows(ToLStore.open(store.path), where, device="cpu")
