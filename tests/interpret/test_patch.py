"""Patches as files and stacks."""

import copy
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexmemory.interpret.patch import EVERY_LAYER, Patch, Step, stack
from flexmemory.interpret.tkv import TokenMemory
from flexmemory.model.checkpoint import Checkpoint, save_checkpoint
from flexmemory.model.transformer import Transformer
from tests.conftest import NANO, VARIED, random_model


@pytest.fixture(scope="module")
def memory() -> TokenMemory:
    return TokenMemory(random_model(NANO["nano-memory"], dtype=torch.float32))


def of_everything(memory: TokenMemory, seed: int = 0) -> Patch:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(5, memory.hidden_size, generator=generator)
    with memory.edit() as edit:
        edit.set_row(7 + seed, layer=0, row=vectors[0])
        edit.set_value(layer=0, key=5, value=vectors[1])
        edit.rank_one(30 + seed, layer=0, row=vectors[2])
        edit.set_value(layer=0, key=6, value=vectors[3])
        edit.set_key(layer=1, key=5, vector=vectors[3], gate=vectors[4])
        edit.inject(500 + seed, embedding=vectors[4])
        edit.swap_rows(1, 2)
    return dataclasses.replace(edit.patch, base="a" * 64, tokenizer="b" * 64, description="why")


def tensors(model: Transformer) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def assert_same(first: Transformer, second: Transformer) -> None:
    one, other = tensors(first), tensors(second)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_a_patch_survives_the_file_to_the_last_byte(memory, tmp_path):
    patch = of_everything(memory)
    patch.save(tmp_path / "p.safetensors")
    read = Patch.load(tmp_path / "p.safetensors")
    assert read.to_bytes() == patch.to_bytes() == (tmp_path / "p.safetensors").read_bytes()
    assert read.fingerprint == patch.fingerprint
    assert (read.base, read.tokenizer, read.what, read.tokens) == (
        patch.base,
        patch.tokenizer,
        patch.what,
        patch.tokens,
    )
    assert_same(read.apply(memory.model), patch.apply(memory.model))
    with pytest.raises(FileExistsError, match="already exists"):
        patch.save(tmp_path / "p.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["p.safetensors"]


def test_a_patch_does_what_the_editor_showed(memory):
    edit = memory.edit()
    edit.scale_value(layer=0, key=5, factor=2.0)
    edit.rank_one(30, layer=0, row=torch.ones(memory.hidden_size))
    edit.scale_value(layer=0, key=5, factor=2.0)
    edit.scale_value(layer=0, key=6, factor=2.0)
    edit.rank_one(31, layer=0, row=torch.ones(memory.hidden_size))
    edit.scale_row(4, layer=0, factor=3.0)
    edit.scale_row(5, layer=0, factor=3.0)
    edit.scale_row(4, layer=0, factor=3.0)
    assert_same(edit.memory.model, edit.patch.apply(memory.model))
    assert [step.kind for step in edit.patch.steps] == ["values", "outer", "values", "outer", "rows"]


def test_patches_stack_in_order(memory):
    first, second = of_everything(memory, 0), of_everything(memory, 1)
    assert_same(stack([first, second]).apply(memory.model), second.apply(first.apply(memory.model)))
    swapped = stack([second, first]).apply(memory.model)
    value = [TokenMemory(model).values(0)[6] for model in (swapped, first.apply(memory.model))]
    assert torch.equal(*value)  # the last one wins
    assert stack([first, second]).tokens == (1, 2, 7, 8, 30, 31, 500, 501)
    with pytest.raises(ValueError, match="made for different checkpoints"):
        stack([first, dataclasses.replace(second, base="c" * 64)])
    with pytest.raises(ValueError, match="no patch"):
        stack([])


def test_a_patch_is_small(memory):
    with memory.edit() as edit:
        edit.scale_row(7, layer=0, factor=2.0)
    assert edit.patch.nbytes == 4 * memory.hidden_size + 8
    assert len(edit.patch.to_bytes()) < edit.patch.nbytes + 1000


def test_the_model_keeps_its_bits_and_other_shapes_are_refused(memory):
    before = copy.deepcopy(memory.model)
    patch = of_everything(memory)
    patch.apply(memory.model)
    assert_same(before, memory.model)
    with pytest.raises(ValueError, match="the patch is for a model of"):
        patch.apply(random_model(dataclasses.replace(NANO["nano-memory"], num_layers=2)))
    step = Step(kind="values", layer=0, ids=torch.tensor([0]), numbers=torch.zeros(1, memory.hidden_size))
    table = random_model(VARIED["table"])
    shape = {**patch.shape, "intermediate_size": table.config.intermediate_size}
    with pytest.raises(ValueError, match="range"):
        Patch(steps=(step,), shape=shape).apply(table)
    rows = Patch(steps=(dataclasses.replace(step, kind="rows"),), shape=shape).apply(table)  # rows of a free table too
    assert not rows.compute_rows(torch.tensor([0]))[0, 0].any()


def test_damaged_and_foreign_files_are_refused(memory, tmp_path):
    path, bad = tmp_path / "p.safetensors", tmp_path / "bad.safetensors"
    of_everything(memory).save(path)
    with pytest.raises(FileNotFoundError, match="no patch at"):
        Patch.load(bad)
    bad.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="damaged"):
        Patch.load(bad)
    bad.write_text("no safetensors")
    with pytest.raises(ValueError, match="damaged"):
        Patch.load(bad)
    save_file({"x": torch.zeros(1)}, bad)
    with pytest.raises(ValueError, match="is not a patch"):
        Patch.load(bad)
    stored = load_file(path)
    raw = path.read_bytes()
    entry = json.loads(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]["flexmemory-patch"])

    def written(tensors: dict[str, torch.Tensor], **changes) -> None:
        save_file(tensors, bad, {"flexmemory-patch": json.dumps(entry | changes)})

    written(stored, format_version=2)
    with pytest.raises(ValueError, match="update flexmemory"):
        Patch.load(bad)
    written(stored, surprise=1)
    with pytest.raises(ValueError, match="damaged"):
        Patch.load(bad)
    written(stored | {"00000.numbers": stored["00000.numbers"] * torch.nan})
    with pytest.raises(ValueError, match="not all finite"):
        Patch.load(bad)
    written(stored | {"00000.ids": stored["00000.ids"] + 600})
    with pytest.raises(ValueError, match="out of range"):
        Patch.load(bad)
    written(stored | {"00000.ids": stored["00000.ids"].float()})
    with pytest.raises(ValueError, match=r"ids is of torch\.float32"):
        Patch.load(bad)
    written(stored | {"00000.numbers": stored["00000.numbers"].to(torch.float8_e5m2)})
    with pytest.raises(ValueError, match=r"numbers is of torch\.float8"):
        Patch.load(bad)
    for change in ({"tokens": [0.5]}, {"tokens": ["a"]}, {"tokens": 3}, {"steps": [3]}, {"steps": 3}, {"shape": {}}):
        written(stored, **change)
        with pytest.raises(ValueError, match="damaged"):
            Patch.load(bad)
    written(stored, tokens=[-1])
    with pytest.raises(ValueError, match="token id -1"):
        Patch.load(bad)
    save_file(stored, bad, {"flexmemory-patch": "[" * 100_000})
    with pytest.raises(ValueError, match="damaged"):
        Patch.load(bad)
    entry["steps"][0]["kind"] = "novel"
    written(stored)
    with pytest.raises(ValueError, match="novel"):
        Patch.load(bad)


def test_an_embedding_is_of_no_layer(memory):
    step = Step(kind="embedding", layer=0, ids=torch.tensor([0]), numbers=torch.zeros(1, memory.hidden_size))
    shape = of_everything(memory).shape
    with pytest.raises(ValueError, match="layer 0"):
        Patch(steps=(step,), shape=shape).apply(memory.model)
    edited = Patch(steps=(dataclasses.replace(step, layer=EVERY_LAYER),), shape=shape).apply(memory.model)
    assert not edited.embed(torch.tensor([0])).any()


def test_a_checkpoint_keeps_given_rows(memory, tmp_path):
    edited = of_everything(memory).apply(memory.model)
    for name, model in (("plain", memory.model), ("edited", edited)):
        (tmp_path / name).mkdir()
        save_checkpoint(tmp_path / name, model, None)
    checkpoint = Checkpoint.open(tmp_path / "edited")
    checkpoint.verify()
    assert_same(checkpoint.load(), edited)
    with memory.edit() as edit:
        edit.scale_row(3, layer=1, factor=0.0)
    (tmp_path / "rows").mkdir()
    save_checkpoint(tmp_path / "rows", edit.patch.apply(memory.model), None)
    rows = Checkpoint.open(tmp_path / "rows")
    assert rows.fingerprint != Checkpoint.open(tmp_path / "plain").fingerprint  # the weights are the same
    assert rows.load(memory=False).config == memory.model.config
    (tmp_path / "rows" / "rows.safetensors").unlink()
    with pytest.raises(ValueError, match=r"rows.safetensors is missing"):
        Checkpoint.open(tmp_path / "rows")
