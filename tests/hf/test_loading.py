"""Folders of this package are transformers', and the other way round: weights, dtypes, shards, devices, settings."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import flexmemory
from flexmemory.config import KEYS_OF_TRANSFORMERS, ModelConfig, to_dict
from flexmemory.hf import FlexMemoryConfig, FlexMemoryForCausalLM, FlexMemoryModel
from flexmemory.model.checkpoint import Checkpoint, save_checkpoint
from flexmemory.model.init import INIT_STD
from tests.conftest import NANO, VARIED, random_model
from tests.hf.conftest import MINI, config_of, opened


@pytest.mark.parametrize("name", VARIED)
def test_a_checkpoint_opens_as_it_is_and_is_saved_as_one(checkpoint, tokens, tmp_path, name):
    folder, ids = checkpoint(name), tokens(2, 13)
    expected = Checkpoint.open(folder).load()(ids)
    model, report = opened(folder, output_loading_info=True)
    assert type(model) is FlexMemoryForCausalLM
    assert not any(report.values()), report
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    again = Checkpoint.open(tmp_path / "saved")
    again.verify()
    assert again.config == VARIED[name]
    assert torch.equal(again.load()(ids), expected)
    assert torch.equal(opened(tmp_path / "saved")(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ["mini-memory", "mini-flex3"])
def test_the_models_of_the_repository_open(name):
    text = AutoTokenizer.from_pretrained(MINI / name)("The history of", return_tensors="pt")
    model = opened(MINI / name)
    checkpoint = Checkpoint.open(MINI / name)
    assert text.input_ids[0].tolist() == checkpoint.tokenizer().encode("The history of")
    assert torch.equal(model(**text).logits, checkpoint.load()(text.input_ids))


def test_the_base_model_is_the_model_without_its_head(checkpoint, tokens, tmp_path):
    folder, ids = checkpoint("untied"), tokens(2, 9)
    whole, (base, report) = (
        opened(folder),
        AutoModel.from_pretrained(folder, output_loading_info=True),
    )
    assert type(base) is FlexMemoryModel
    assert report["missing_keys"] == set()
    assert report["unexpected_keys"] == {"lm_head.weight"}
    states = base(ids).last_hidden_state
    assert torch.equal(whole.lm_head(states), whole(ids).logits)
    assert torch.equal(base(ids, return_dict=False)[0], states)
    base.save_pretrained(tmp_path / "base")
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "base")(ids).last_hidden_state, states)


def test_shards_and_their_way_back_to_one_file(load, tokens, tmp_path):
    model, ids = load("nano-flex3"), tokens(1, 7)
    model.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in"):
        Checkpoint.open(tmp_path / "shards")
    again = opened(tmp_path / "shards")
    assert torch.equal(again(ids).logits, model(ids).logits)
    again.save_pretrained(tmp_path / "shards")
    Checkpoint.open(tmp_path / "shards").verify()
    again.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert not (tmp_path / "shards" / "manifest.json").exists()


def test_edited_rows_come_along(tokens, tmp_path):
    model, ids = random_model(NANO["nano-flex3"], dtype=torch.float32), tokens(1, 7)
    model.give_rows({"ids.1": ids[0, :1], "rows.1": torch.ones(1, model.config.hidden_size)})
    (tmp_path / "edited").mkdir()
    save_checkpoint(tmp_path / "edited", model, None)
    opened_again = opened(tmp_path / "edited")
    torch.testing.assert_close(opened_again(ids).logits, model(ids), rtol=1e-5, atol=1e-5)
    opened_again.save_pretrained(tmp_path / "again")
    assert torch.equal(Checkpoint.open(tmp_path / "again").load()(ids), model(ids))


def test_dtypes(checkpoint, tokens):
    folder, ids = checkpoint("nano-memory", dtype=torch.bfloat16), tokens(1, 7)
    stored = opened(folder)
    assert stored.dtype == torch.bfloat16
    widened = opened(folder, dtype=torch.float32)
    torch.testing.assert_close(widened(ids).logits, Checkpoint.open(folder).load(dtype=torch.float32)(ids))


def test_a_tied_head_stays_tied(load, tmp_path):
    model = load("nano-memory")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.resize_token_embeddings(520)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path / "larger")
    assert Checkpoint.open(tmp_path / "larger").config.vocab_size == 520
    assert opened(tmp_path / "larger").lm_head.weight.shape == (
        520,
        model.config.hidden_size,
    )


def test_device_maps(checkpoint, tokens, tmp_path):
    pytest.importorskip("accelerate")
    folder, ids = checkpoint("nano-flex3"), tokens(2, 9)
    expected = opened(folder)(ids).logits
    placed = opened(folder, device_map="auto")
    torch.testing.assert_close(placed(ids.to(placed.device)).logits.cpu(), expected, rtol=1e-4, atol=1e-5)
    parts = {"model.core.embedding": "cpu", "model.core.norm": "cpu", "lm_head": "cpu"}
    places = {f"model.core.blocks.{layer}": "disk" if layer else "cpu" for layer in range(3)}
    offloaded = opened(folder, device_map={**parts, **places}, offload_folder=tmp_path / "offload")
    assert offloaded.model.core.blocks[1].attention.qkv.weight.device.type == "meta"
    assert torch.equal(offloaded(ids).logits, expected)


def test_the_configuration_has_the_cores_fields_and_defaults(tmp_path):
    ours = {field.name: field for field in dataclasses.fields(ModelConfig)}
    theirs = FlexMemoryConfig()
    for name, field in ours.items():
        assert type(getattr(theirs, name)) is type(getattr(NANO["nano-memory"], name))
        if field.default is not dataclasses.MISSING:
            assert getattr(theirs, name) == field.default
    config = config_of(NANO["nano-flex3"])
    assert config.core() == NANO["nano-flex3"]
    assert (config.num_hidden_layers, config.num_attention_heads) == (3, config.num_heads)
    assert config.head_dim * config.num_heads == config.hidden_size
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).core() == NANO["nano-flex3"]
    stored = json.loads((tmp_path / "config.json").read_text())
    assert to_dict(NANO["nano-flex3"]).items() <= stored.items()
    assert stored.keys() - to_dict(NANO["nano-flex3"]).keys() <= KEYS_OF_TRANSFORMERS | {"model_type"}


def test_an_impossible_configuration_is_refused():
    with pytest.raises(ValueError, match=r"flex_ratio must be 1, 2 or 3 for flex and 0 otherwise, got 0 for flex"):
        FlexMemoryConfig(architecture="flex")
    with pytest.raises(ValueError, match=r"vocab_size must be int"):
        config_of(NANO["nano-memory"], vocab_size="many")


def test_fresh_weights_start_as_those_of_the_core():
    config = config_of(NANO["nano-flex3"], memory_kind="ffn+table", tie_embeddings=False)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    block = model.model.core.blocks[0]
    assert float(block.attention_norm.weight.detach().mean()) == 1
    assert float(block.memory.table.weight.detach().abs().max()) == 0
    for weight, expected in (
        (block.attention.qkv.weight, INIT_STD),
        (model.lm_head.weight, INIT_STD),
        (block.ffn_c.down.weight, INIT_STD / 6**0.5),
    ):
        assert float(weight.detach().std()) == pytest.approx(expected, rel=0.1)


def test_what_a_checkpoint_lacks_is_reported_and_drawn(load, tmp_path):
    load("nano-memory").save_pretrained(tmp_path / "tied")
    config = AutoConfig.from_pretrained(tmp_path / "tied", tie_embeddings=False)
    model, report = opened(tmp_path / "tied", config=config, output_loading_info=True)
    assert report["missing_keys"] == {"lm_head.weight"}
    assert float(model.lm_head.weight.detach().std()) == pytest.approx(INIT_STD, rel=0.1)


def test_embeddings_alone_are_refused_with_the_reason(load, tokens):
    model, ids = load("nano-memory"), tokens(1, 5)
    with pytest.raises(ValueError, match=r"takes input_ids alone, since each layer adds a row that is a function of"):
        model(inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match=r"no input_ids were given"):
        model()


def test_bad_ids_and_positions_are_refused(load, tokens):
    model = load("nano-memory")
    with pytest.raises(ValueError, match=r"token id 512 is out of range"):
        model(torch.tensor([[1, 512]]))
    limit = model.config.max_seq_len
    with pytest.raises(ValueError, match=rf"sequence of {limit + 1} tokens is longer than the model's {limit}"):
        model(tokens(1, limit + 1))


def test_nothing_else_imports_transformers():
    for path in Path(flexmemory.__file__).parent.rglob("*.py"):
        if path.parent.name != "hf":
            imports = re.findall(r"^\s*(?:from|import) (\w+)(?:\.(\w+))?", path.read_text(), flags=re.MULTILINE)
            assert not any(package == "transformers" or part == "hf" for package, part in imports), path
