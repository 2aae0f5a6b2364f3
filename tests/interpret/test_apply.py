"""Patches on checkpoints and stores: what is edited, what keeps its bytes, and the way back to the last bit."""

import dataclasses
import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flexmemory.config import ModelConfig
from flexmemory.interpret import apply as applying
from flexmemory.interpret.apply import apply_to_checkpoint, apply_to_store, revert
from flexmemory.interpret.patch import Patch
from flexmemory.interpret.tkv import TokenMemory
from flexmemory.model.checkpoint import Checkpoint, save_checkpoint
from flexmemory.tokenizer import Tokenizer
from flexmemory.tol.build import build_store, write_store
from flexmemory.tol.coding import coding_of
from flexmemory.tol.disk import DiskRows
from flexmemory.tol.format import ToLMismatchError
from flexmemory.tol.layout import layout_of
from flexmemory.tol.requantize import StoreRows, requantize
from flexmemory.tol.scheme import Scheme
from flexmemory.tol.store import ToLStore
from flexmemory.tol.tiers import open_rows
from flexmemory.tol.verify import verify_store
from tests.conftest import NANO, random_model
from tests.tol.schemes import mixed, scheme_of

SIZES: dict[str, Any] = {"shard_bytes": 40_000, "block_bytes": 5_000}


def saved(folder: Path, config: ModelConfig = NANO["nano-flex1"], dtype: torch.dtype = torch.float32) -> Checkpoint:
    folder.mkdir()
    save_checkpoint(folder, random_model(config, dtype=dtype), Tokenizer.train(["one two"], vocab_size=300))
    return Checkpoint.open(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return saved(tmp_path_factory.mktemp("base") / "checkpoint")


@pytest.fixture(scope="module")
def stores(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ToLStore]:
    """Every kind of store, with several shards and blocks; `planned` is in an order of its own."""
    folder = tmp_path_factory.mktemp("stores")
    made = {codec: build_store(checkpoint, folder / codec, codec=codec, **SIZES) for codec in ("bf16", "fp32", "int8")}
    made["int4 with embedding"] = build_store(checkpoint, folder / "int4", codec="int4", embedding=True, **SIZES)
    made["two layers"] = build_store(checkpoint, folder / "two", codec="bf16", layers=[2, 0], **SIZES)
    made["svd"] = build_store(checkpoint, folder / "svd", codec="svd40+normal6", **SIZES)
    width = checkpoint.config.hidden_size
    torch.manual_seed(0)
    scheme = scheme_of(
        (100, [coding_of("fp32", width), mixed((8, 20), (6, width - 20)), coding_of("bf16", width)]),
        (412, [mixed((6, 20), (5, width - 20), group=16), coding_of("int6", width), None]),
        width=width,
        means=False,
    )
    assert isinstance(scheme, Scheme)
    manifest = layout_of(
        vocab_size=512, hidden_size=width, num_layers=3, codec="", embedding=False, layers=None, scheme=scheme, **SIZES
    )
    manifest = dataclasses.replace(
        manifest,
        checkpoint_fingerprint=checkpoint.fingerprint,
        tokenizer_fingerprint=checkpoint.tokenizer_fingerprint,
    )
    source = StoreRows(made["fp32"])
    write_store(folder / "planned", manifest, source, scheme=scheme, counts=None)
    made["planned"] = ToLStore.open(folder / "planned", checkpoint=checkpoint)
    assert made["planned"].order is not None
    return made


def files(folder: Path) -> dict[str, str]:
    """The hash of every file."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def row_patch(checkpoint: Checkpoint, token: int = 7, layers: tuple[int, ...] = (0, 2)) -> Patch:
    with TokenMemory(checkpoint.load()).edit(checkpoint) as edit:
        for layer in layers:
            edit.scale_row(token, layer=layer, factor=-1.5)
            edit.set_row(300, layer=layer, row=edit.row(token, layer=layer))
    return edit.patch


def weight_patch(checkpoint: Checkpoint) -> Patch:
    with TokenMemory(checkpoint.load()).edit(checkpoint) as edit:
        edit.scale_value(layer=0, key=3, factor=2.0)
        edit.set_key(layer=1, key=4, vector=torch.ones(48), gate=torch.ones(48))
        edit.rank_one(9, layer=2, row=torch.ones(48))
        edit.inject(400, embedding=torch.ones(48))
        edit.scale_row(7, layer=0, factor=3.0)
    return edit.patch


def all_rows(store: ToLStore) -> torch.Tensor:
    with DiskRows(store) as rows:
        out = torch.empty((store.vocab_size, store.num_slices, store.hidden_size), dtype=store.decoded_dtype)
        rows.gather(torch.arange(store.vocab_size), out)
    return out


def assert_same_model(first: Checkpoint | torch.nn.Module, second: torch.nn.Module) -> None:
    model = first.load() if isinstance(first, Checkpoint) else first
    one, other = (dict(m.named_parameters()) | dict(m.named_buffers()) for m in (model, second))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_is_edited_and_reverted_to_the_last_bit(tmp_path, dtype):
    checkpoint = saved(tmp_path / "base", NANO["nano-memory"], dtype)
    before = files(checkpoint.path)
    first, second = weight_patch(checkpoint), row_patch(checkpoint)
    edited = apply_to_checkpoint(checkpoint, [first, second], tmp_path / "edited")
    edited.verify()
    assert files(checkpoint.path) == before
    assert_same_model(edited, second.apply(first.apply(checkpoint.load())))
    assert edited.lineage == (checkpoint.fingerprint,)
    revert(tmp_path / "edited", tmp_path / "back")
    assert files(tmp_path / "back") == before
    assert_same_model(Checkpoint.open(tmp_path / "back"), checkpoint.load())


def test_edits_of_edits(checkpoint, tmp_path):
    """Each on the last, patches of an ancestor among them; taken back one at a time."""
    one = apply_to_checkpoint(checkpoint, [row_patch(checkpoint)], tmp_path / "one")
    two = apply_to_checkpoint(one, [weight_patch(checkpoint)], tmp_path / "two")
    three = apply_to_checkpoint(two, [row_patch(two, 8)], tmp_path / "three")
    assert three.lineage == (checkpoint.fingerprint, one.fingerprint, two.fingerprint)
    for last, folder, name in ((three, two.path, "a"), (two, one.path, "b"), (one, checkpoint.path, "c")):
        revert(last.path, tmp_path / name)
        assert files(tmp_path / name) == files(folder)
    revert(tmp_path / "a", tmp_path / "d")  # what was reverted can be reverted on
    assert files(tmp_path / "d") == files(one.path)


def test_rows_alone_leave_the_weights_file(checkpoint, tmp_path):
    edited = apply_to_checkpoint(checkpoint, [row_patch(checkpoint)], tmp_path / "edited")
    assert (edited.path / "model.safetensors").samefile(checkpoint.path / "model.safetensors")
    assert edited.fingerprint != checkpoint.fingerprint
    assert set(load_file(edited.path / "rows.safetensors")) == {"ids.0", "rows.0", "ids.2", "rows.2"}


@pytest.mark.parametrize("kind", ["bf16", "fp32", "int8", "int4 with embedding", "svd", "planned", "two layers"])
def test_a_store_is_edited_and_reverted_to_the_last_bit(checkpoint, stores, kind, tmp_path):
    store = stores[kind]
    before, rows = files(store.path), all_rows(store)
    places = store.positions
    frequent = range(512) if places is None else places.argsort()[:100].tolist()
    token, other = next(t for t in frequent if t not in (0, 511)), frequent[-1]
    with TokenMemory(checkpoint.load()).edit(checkpoint) as edit:
        for layer in (0, 2):
            edit.swap_rows(token, other, layers=[layer])
            edit.scale_row(token, layer=layer, factor=-1.5)
    edited = apply_to_store(store, [edit.patch], tmp_path / "edited")
    assert files(store.path) == before
    after = all_rows(edited.store)
    untouched = torch.ones(after.shape[:2], dtype=torch.bool)
    tolerance = {"bf16": 2**-8, "fp32": 0, "two layers": 2**-8, "int8": 0.02, "planned": 2**-8}.get(kind, 0.3)
    wanted = edit.patch.apply(checkpoint.load()).compute_rows(torch.tensor([token, other])).detach()
    for layer in (0, 2):
        place = store.embedding + store.layers.index(layer)
        untouched[[token, other], place] = False
        error = (after[[token, other], place].float() - wanted[:, layer]).norm(dim=1) / wanted[:, layer].norm(dim=1)
        assert (error <= tolerance).all()
        if store.plain:
            assert torch.equal(after[[token, other], place], wanted[:, layer].to(after.dtype))
    assert torch.equal(after[untouched], rows[untouched])
    assert not torch.equal(after, rows)
    assert edited.relative_error <= tolerance
    verify_store(tmp_path / "edited")
    revert(tmp_path / "edited", tmp_path / "back")
    assert files(tmp_path / "back") == before


def test_an_edited_store_fits_its_checkpoint_edited_or_not(checkpoint, stores, tmp_path):
    patch = row_patch(checkpoint)
    edited = apply_to_checkpoint(checkpoint, [patch], tmp_path / "checkpoint")
    store = apply_to_store(stores["bf16"], [patch], tmp_path / "store").store
    for one in (checkpoint, edited):
        verify_store(store.path, checkpoint=one, sample=512)
    other = apply_to_checkpoint(checkpoint, [row_patch(checkpoint, 8)], tmp_path / "other")
    for made, of in ((stores["bf16"], edited), (store, other)):
        with pytest.raises(ToLMismatchError, match="another checkpoint"):
            ToLStore.open(made.path, checkpoint=of)
    built = build_store(edited, tmp_path / "built", **SIZES)
    assert torch.equal(all_rows(built), all_rows(store))
    again = apply_to_store(store, [row_patch(edited, 9)], tmp_path / "again").store
    verify_store(again.path, checkpoint=apply_to_checkpoint(edited, [row_patch(edited, 9)], tmp_path / "third"))
    small = requantize(store, tmp_path / "int8", codec="int8")
    verify_store(small.path, checkpoint=edited)


def test_every_tier_reads_edited_rows(checkpoint, stores, tmp_path):
    store = apply_to_store(stores["int8"], [row_patch(checkpoint)], tmp_path / "store").store
    ids = torch.tensor([7, 300, 5])
    expected = all_rows(store)[ids]
    for place in ("disk", "host", "device"):
        tier = open_rows(store, place, device="cpu")
        out = torch.empty_like(expected)
        tier.gather(ids, out)
        assert torch.equal(out, expected)


def test_what_does_not_fit_is_refused(checkpoint, stores, tmp_path):
    rows, weights = row_patch(checkpoint), weight_patch(checkpoint)
    out = tmp_path / "out"
    for patches, message in [
        ([], "no patch"),
        ([dataclasses.replace(rows, base="f" * 64)], "made for checkpoint ffffffffffff"),
        ([dataclasses.replace(rows, base="")], "in memory only"),
        ([dataclasses.replace(rows, tokenizer="")], "another tokenizer"),
        ([dataclasses.replace(rows, shape={**rows.shape, "vocab_size": 513})], "is for a model of"),
    ]:
        with pytest.raises(ValueError, match=message):
            apply_to_checkpoint(checkpoint, patches, out)
        with pytest.raises(ValueError, match=message):
            apply_to_store(stores["bf16"], patches, out)
    with pytest.raises(ValueError, match="changes more than rows"):
        apply_to_store(stores["bf16"], [weights], out)
    with pytest.raises(ValueError, match=r"holds no layers \[1\]"):
        apply_to_store(stores["two layers"], [row_patch(checkpoint, layers=(1,))], out)
    planned = stores["planned"]
    assert planned.order is not None
    with pytest.raises(ValueError, match="leaves it out"):
        apply_to_store(planned, [row_patch(checkpoint, int(planned.order[-1]))], out)
    with TokenMemory(checkpoint.load()).edit(checkpoint) as edit:
        edit.set_row(3, layer=0, row=torch.full((48,), 3.4e38))
    with pytest.raises(ValueError, match="too large for codec bf16"):
        apply_to_store(stores["bf16"], [edit.patch], out)
    for path in (checkpoint.path, stores["bf16"].path):
        with pytest.raises(ValueError, match="was not edited"):
            revert(path, out)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        revert(tmp_path / "nowhere", out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["checkpoint", "store"])
def test_an_interrupted_application_leaves_nothing(checkpoint, stores, kind, tmp_path, monkeypatch):
    patch = row_patch(checkpoint)

    def interrupted(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(applying, "write_json", interrupted)
    to_store = partial(apply_to_store, stores["bf16"])
    to_checkpoint = partial(apply_to_checkpoint, checkpoint)
    with pytest.raises(KeyboardInterrupt):
        (to_store if kind == "store" else to_checkpoint)([patch], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_changed_copy_is_not_passed_off_as_reverted(checkpoint, stores, tmp_path):
    patch = weight_patch(checkpoint)
    apply_to_checkpoint(checkpoint, [patch], tmp_path / "edited")
    weights = tmp_path / "edited" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match="not as it was before the edit"):
        revert(tmp_path / "edited", tmp_path / "back")
    (tmp_path / "edited" / "edits" / "0000" / "undo.safetensors").unlink()
    with pytest.raises(ValueError, match=r"undo.safetensors is missing"):
        revert(tmp_path / "edited", tmp_path / "back")
    assert not (tmp_path / "back").exists()
