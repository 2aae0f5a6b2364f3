"""The format's arithmetic, its safetensors files, and manifests that are refused."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flexmemory.model.checkpoint import Checkpoint
from flexmemory.presets import get_preset
from flexmemory.storage import read_json
from flexmemory.tol.build import build_store, load_for_rows
from flexmemory.tol.format import read_manifest
from flexmemory.tol.layout import BLOCK_BYTES, SHARD_BYTES, layout, stride_of
from flexmemory.tol.store import ToLStore
from tests.conftest import NANO
from tests.tol.conftest import edit_manifest


@pytest.mark.parametrize(
    ("preset", "codec", "gigabytes"),
    [
        ("1b-memory", "bf16", 12.6),
        ("1b-flex3", "bf16", 12.6),
        ("750m-memory", "bf16", 10.0),
        ("1b-memory", "fp32", 25.2),
    ],
)
def test_size_is_known_without_building(preset, codec, gigabytes):
    assert round(layout(get_preset(preset).model, codec=codec).nbytes / 1e9, 1) == gigabytes  # Table 8


@pytest.mark.parametrize("preset", ["250m-memory", "750m-memory", "1b-memory"])
def test_paper_shapes_have_large_blocks_and_bounded_shards(preset):
    manifest = layout(get_preset(preset).model)
    assert BLOCK_BYTES / 2 < manifest.block_rows * manifest.stride_bytes <= BLOCK_BYTES
    assert len(manifest.shards) > 1
    assert max(shard.tokens for shard in manifest.shards) * manifest.stride_bytes <= SHARD_BYTES


@pytest.mark.parametrize(
    ("row_bytes", "stride"),
    [(98_304, 98_304), (76_800, 77_824), (46_080, 46_080), (288, 288), (4096 * 20 + 1, 4096 * 21), (4096, 4096)],
)
def test_rows_are_padded_to_pages_where_it_costs_under_5_percent(row_bytes, stride):
    assert stride_of(row_bytes) == stride
    assert stride % 4096 == 0 or (-row_bytes % 4096) >= 0.05 * row_bytes


def test_shards_hold_whole_blocks_and_every_token_once():
    manifest = layout(NANO["nano-memory"], shard_bytes=50_000, block_bytes=3_000)
    assert manifest.block_rows == 8
    assert [shard.tokens for shard in manifest.shards] == [168, 168, 168, 8]
    assert [shard.first_token for shard in manifest.shards] == [0, 168, 336, 504]


def test_a_block_is_at_least_a_row():
    manifest = layout(NANO["nano-memory"], shard_bytes=1, block_bytes=1)
    assert manifest.block_rows == 1
    assert len(manifest.shards) == NANO["nano-memory"].vocab_size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": [0, 0]}, "layers must be distinct numbers from 0 to 2, got [0, 0]"),
        ({"layers": [3]}, "layers must be distinct numbers from 0 to 2, got [3]"),
        ({"layers": []}, "layers must be distinct numbers from 0 to 2, got []"),
        ({"codec": "bf17"}, "unknown ToL codec 'bf17'; this version has bf16, fp32"),
        ({"shard_bytes": 0}, "shard_bytes must be positive, got 0"),
        ({"block_bytes": 0}, "block_bytes must be positive, got 0"),
    ],
)
def test_impossible_plans_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        layout(NANO["nano-memory"], **arguments)


def test_dense_models_have_nothing_to_look_up():
    with pytest.raises(ValueError, match="dense model has no memory"):
        layout(NANO["nano-base"])


def test_rows_are_token_major_in_the_raw_file(nano: Checkpoint, stored: ToLStore):
    """A token's bytes, read by hand: its layers side by side, each D numbers."""
    manifest = read_manifest(stored.path)
    shard = manifest.shards[1]
    data = (stored.path / shard.file).read_bytes()[shard.data_offset :]
    row = torch.tensor(
        list(data[5 * stored.stride_bytes : 5 * stored.stride_bytes + stored.row_bytes]), dtype=torch.uint8
    )
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[stored.codec]
    with torch.inference_mode():
        expected = load_for_rows(nano, device="cpu").compute_rows(torch.tensor([shard.first_token + 5]))[0]
    # One row rounds differently from a chunk of rows, hence the tolerance.
    torch.testing.assert_close(row.view(dtype).view(3, 48), expected.to(dtype), rtol=2**-7, atol=1e-6)


def test_shards_load_with_the_safetensors_library(stored: ToLStore):
    for shard in stored.manifest.shards:
        assert shard.data_offset % 4096 == 0
        tensors = load_file(stored.path / shard.file)
        assert list(tensors) == ["rows"]
        raw = np.fromfile(stored.path / shard.file, np.uint8, offset=shard.data_offset)
        assert tensors["rows"].shape == (shard.tokens, stored.stride_bytes)
        assert np.array_equal(tensors["rows"].numpy().ravel(), raw)


def test_padding_is_zero_and_counts(checkpoint_of, tmp_path):
    wide = dataclasses.replace(
        NANO["nano-memory"], hidden_size=1336, intermediate_size=8, vocab_size=20
    )  # 8016 bytes a row
    store = build_store(checkpoint_of(wide), tmp_path / "wide", block_bytes=40_000)
    assert (store.row_bytes, store.stride_bytes, store.nbytes) == (8016, 8192, 20 * 8192)
    rows = load_file(store.path / "rows-00000.safetensors")["rows"]
    assert not rows[:, 8016:].any()
    assert rows[:, :8016].any(dim=1).all()


def test_manifest_has_the_documented_entries(store: ToLStore):
    values = read_json(store.path / "manifest.json")
    assert list(values) == [
        "format", "format_version", "codec", "embedding", "layers", "num_layers", "hidden_size", "vocab_size",
        "stride_bytes", "checkpoint_fingerprint", "tokenizer_fingerprint", "block_rows", "shards",
    ]  # fmt: skip
    assert (values["format"], values["format_version"]) == ("flexmemory-tol", 2)
    assert list(values["shards"][0]) == ["file", "first_token", "tokens", "data_offset", "blocks"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version=5), "has ToL format 5; this version reads up to 4: update flexmemory"),
        (lambda m: m.update(format="other"), "is not a ToL store"),
        (lambda m: m.update(format_version="1"), "ToL format '1'"),
        (lambda m: m.update(codec="int3"), "unknown ToL codec 'int3'"),
        (lambda m: m.pop("layers"), "'layers'"),
        (lambda m: m.update(extra=1), "extra"),
        (lambda m: m.update(vocab_size="512"), "vocab_size"),
        (lambda m: m.update(vocab_size=513), "shards hold 512 tokens, expected 513"),
        (lambda m: m.update(layers=[0, 1, 3]), "layers must be distinct"),
        (lambda m: m.update(stride_bytes=100), "stride_bytes \\(100\\) must be at least the 288 bytes of a row"),
        (lambda m: m["shards"].pop(0), "shard 0 must be rows-00000.safetensors"),
        (lambda m: m["shards"][0].update(file="../../secret"), "shard 0 must be rows-00000.safetensors"),
        (lambda m: m["shards"][1].update(first_token=0), "rows-00001.safetensors must start at 128"),
        (lambda m: m["shards"][1].update(data_offset=0), "leaves no room for a header"),
        (lambda m: m["shards"][1]["blocks"].pop(), "rows-00001.safetensors has 7 checksums, expected 8"),
    ],
)  # fmt: skip
def test_wrong_manifests_are_refused(store: ToLStore, change, message):
    edit_manifest(store, change)
    with pytest.raises(ValueError, match=message):
        ToLStore.open(store.path)


def test_a_damaged_manifest_is_refused(store: ToLStore):
    (store.path / "manifest.json").write_text('{"format": "flexm')
    with pytest.raises(ValueError, match=r"manifest\.json is not valid JSON"):
        ToLStore.open(store.path)
