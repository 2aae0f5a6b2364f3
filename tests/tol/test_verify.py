"""Verification: damage is found and located, and wrong rows with right checksums are found when sampled."""

import pytest
import torch

from flexmemory.tol.build import build_store
from flexmemory.tol.format import ToLMismatchError
from flexmemory.tol.verify import verify_store
from tests.conftest import WITH_MEMORY
from tests.tol.conftest import SIZES, flip_byte, rewrite

EVERY_TOKEN = 512


@pytest.mark.parametrize("codec", ["bf16", "fp32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["nano-memory", "ffn+table"])
def test_a_good_store_is_found_good(codec, dtype, name, checkpoint_of, tmp_path):
    checkpoint = checkpoint_of(WITH_MEMORY[name], dtype=dtype)
    store = build_store(
        checkpoint, tmp_path / "store", codec=codec, layers=[2, 0], chunk_tokens=100, block_bytes=30_000
    )
    verified = verify_store(store.path, checkpoint=checkpoint, sample=EVERY_TOKEN)
    assert (verified.store, verified.sampled) == (store, 512)
    assert verified.blocks == len(store.manifest.shards[0].blocks) >= 4


def test_first_and_last_token_are_always_sampled(stored, nano):
    assert verify_store(stored.path, checkpoint=nano, sample=0).sampled == 2
    assert verify_store(stored.path, checkpoint=nano, sample=5).sampled in (6, 7)
    assert verify_store(stored.path).sampled == 0


@pytest.mark.parametrize("position", [4096, 4096 + 128 * 288 - 1])
def test_a_flipped_byte_is_located(position, store):
    flip_byte(store.path / "rows-00001.safetensors", position)
    first = 128 + (position - 4096) // (16 * 288) * 16
    with pytest.raises(
        ValueError, match=f"damaged in tokens {first} to {first + 15} in rows-00001.safetensors; build it"
    ):
        verify_store(store.path)


def test_every_damaged_block_is_counted(store):
    for shard in range(4):
        for block in range(3):
            flip_byte(store.path / f"rows-0000{shard}.safetensors", 4096 + block * 16 * 288)
    with pytest.raises(
        ValueError, match=r"tokens 0 to 15 in .*; tokens 16 to 31 in .*; and 4 more blocks; build it again"
    ):
        verify_store(store.path)


def test_negative_samples_are_refused(store, nano):
    with pytest.raises(ValueError, match="sample must not be negative, got -1"):
        verify_store(store.path, checkpoint=nano, sample=-1)


def test_another_checkpoint_is_refused(store, checkpoint_of):
    with pytest.raises(ToLMismatchError, match="another checkpoint"):
        verify_store(store.path, checkpoint=checkpoint_of(seed=1))


def take_neighbour(rows: torch.Tensor) -> None:
    rows[20] = rows[21].clone()


def take_other_layer(rows: torch.Tensor) -> None:
    rows[20, 1] = rows[20, 2].clone()


def move_one_percent(rows: torch.Tensor) -> None:
    element = rows[20, 1].abs().argmax()
    rows[20, 1, element] *= 1.01


def put_nan(rows: torch.Tensor) -> None:
    rows[20, 1, 5] = float("nan")


@pytest.mark.parametrize("codec", ["bf16", "fp32"])
@pytest.mark.parametrize("change", [take_neighbour, take_other_layer, move_one_percent, put_nan])
def test_wrong_rows_with_right_checksums_are_found_when_sampled(change, codec, nano, tmp_path):
    store = build_store(nano, tmp_path / "store", codec=codec, **SIZES)
    rewrite(store, change)
    shard = store.manifest.shards[1]
    verify_store(store.path)  # checksums match: nothing to see without the model
    with pytest.raises(ValueError, match=f"does not hold the model's row of token {shard.first_token + 20}: layer"):
        verify_store(store.path, checkpoint=nano, sample=EVERY_TOKEN)


def test_rewriting_the_same_rows_changes_nothing(store, nano):
    rewrite(store, lambda rows: None)
    assert verify_store(store.path, checkpoint=nano, sample=EVERY_TOKEN).sampled == 512
