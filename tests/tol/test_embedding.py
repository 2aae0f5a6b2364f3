"""Rows that carry the token's input embedding, and models that have no other table of it."""

import dataclasses

import pytest
import torch

from flexmemory.model.memory import ScaledRows
from flexmemory.tol.build import build_store
from flexmemory.tol.store import ToLStore
from flexmemory.tol.tiers import DeviceRows, Where, lookup, open_rows
from flexmemory.tol.verify import verify_store
from tests.conftest import NANO, VARIED, random_model
from tests.tol.conftest import SIZES, edit_manifest, rewrite, whole_table, write_checkpoint

CODECS = {"bf16": torch.bfloat16, "fp32": torch.float32}
PLACES: list[Where] = ["device", "host", "disk"]


@pytest.fixture(params=CODECS)
def carrying(request, nano, tmp_path):
    """A store of `nano` with embeddings."""
    return build_store(nano, tmp_path / "carrying", codec=request.param, embedding=True, **SIZES)


def test_the_embedding_comes_first_and_the_rest_is_as_without_it(carrying, nano, tmp_path):
    plain = build_store(nano, tmp_path / "plain", codec=carrying.codec, chunk_tokens=32)
    table = whole_table(carrying)
    assert (carrying.embedding, carrying.num_slices, carrying.layers) == (True, 4, (0, 1, 2))
    assert carrying.row_bytes == plain.row_bytes * 4 // 3
    embedding = nano.load().get_parameter("embedding.weight").detach()
    assert torch.equal(table[:, 0], embedding.to(CODECS[carrying.codec]))
    assert torch.equal(table[:, 1:], whole_table(plain))
    assert [carrying.manifest.slice_name(place) for place in (0, 1, 3)] == ["the embedding", "layer 0", "layer 2"]


@pytest.mark.parametrize("place", PLACES)
def test_lookup_gives_embeddings(place, carrying, tokens):
    ids = tokens(2, 20)
    tier = open_rows(carrying, place, device="cpu")
    assert (tier.embedding, tier.num_slices) == (True, 4)
    rows = lookup(tier, ids, dtype=torch.float64)
    embeddings, first = ScaledRows(rows, [1.0, 1.0, 1.0]).embeddings(), rows.layer(0)
    assert embeddings is not None
    assert first is not None
    assert torch.equal(embeddings, whole_table(carrying)[ids][:, :, 0].double())
    assert torch.equal(first, whole_table(carrying)[ids][:, :, 1].double())


@pytest.mark.parametrize("name", ["nano-memory", "untied"])
@pytest.mark.parametrize("place", PLACES)
def test_a_model_without_its_embedding_gives_the_same_logits(name, place, checkpoint_of, tokens, tmp_path):
    checkpoint = checkpoint_of(VARIED[name])
    store = build_store(checkpoint, tmp_path / "store", codec="fp32", embedding=True, layers=[1, 0])
    whole, without = checkpoint.load(memory=False), checkpoint.load(memory=False, embedding=False)
    assert (without.embedding is None) == (name == "untied")  # a tied head needs it
    assert (without.device, without.dtype) == (whole.device, whole.dtype)
    ids = tokens(2, 20)
    rows = lookup(open_rows(store, place, device="cpu"), ids, dtype=torch.float32)
    assert rows.layer(2) is None
    with torch.inference_mode():
        assert torch.equal(without(ids, rows), whole(ids, rows))
        plain = DeviceRows(build_store(checkpoint, tmp_path / "plain", codec="fp32", layers=[1, 0]), device="cpu")
        assert torch.equal(without(ids, rows), whole(ids, lookup(plain, ids, dtype=torch.float32)))


def test_missing_embeddings_are_said(checkpoint_of, tokens, tmp_path):
    checkpoint = checkpoint_of(VARIED["untied"])
    model = checkpoint.load(embedding=False)
    ids = tokens(1, 5)
    rows = lookup(DeviceRows(build_store(checkpoint, tmp_path / "store"), device="cpu"), ids, dtype=torch.float32)
    for given in (rows, None):
        with pytest.raises(ValueError, match=r"no embedding of its own: give rows that carry it, .* --embedding"):
            model(ids, given)


def test_embeddings_are_verified_to_the_bit(carrying, nano):
    assert verify_store(carrying.path, checkpoint=nano, sample=512).sampled == 512

    def move(rows: torch.Tensor) -> None:
        bits = rows.view({2: torch.int16, 4: torch.int32}[rows.element_size()])
        bits[20, 0, 5] += 1  # the next number

    rewrite(carrying, move)
    verify_store(carrying.path)
    token = carrying.manifest.shards[1].first_token + 20
    with pytest.raises(ValueError, match=f"does not hold the model's row of token {token}: the embedding has .* at 5,"):
        verify_store(carrying.path, checkpoint=nano, sample=512)


def test_an_embedding_that_is_not_finite_is_refused(tmp_path):
    config = dataclasses.replace(NANO["nano-memory"], memory_kind="table", intermediate_size=0)
    model = random_model(config, dtype=torch.float32)
    with torch.no_grad():
        model.get_parameter("embedding.weight")[300, 7] = float("inf")
    checkpoint = write_checkpoint(tmp_path / "checkpoint", model)
    with pytest.raises(ValueError, match="the row of token 300 in the embedding is not finite"):
        build_store(checkpoint, tmp_path / "store", embedding=True)


def test_stores_of_the_first_format_open(store, nano):
    def as_before(manifest):
        manifest["format_version"] = 1
        del manifest["embedding"]

    edit_manifest(store, as_before)
    old = ToLStore.open(store.path, checkpoint=nano)
    assert (old.embedding, old.num_slices, old.counts()) == (False, 3, None)
    assert torch.equal(DeviceRows(old, device="cpu").table, whole_table(store))


def test_the_second_format_must_say_whether_it_has_embeddings(store):
    edit_manifest(store, lambda manifest: manifest.pop("embedding"))
    with pytest.raises(ValueError, match="embedding"):
        ToLStore.open(store.path)
