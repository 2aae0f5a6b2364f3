"""A Llama of transformers becomes a dense base with its logits."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from flexmemory.config import ModelConfig
from flexmemory.convert.llama import convert_llama, dense_config
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.tokenizer import Tokenizer
from tests.conftest import NANO, random_model
from tests.model.test_paper import llama_config, llama_weights

transformers = pytest.importorskip("transformers")


def write_llama(folder: Path, config: ModelConfig, *, shard: str | None = None) -> torch.nn.Module:
    """A random Llama, as transformers saves it, with a tokenizer."""
    llama = transformers.LlamaForCausalLM(llama_config(config)).double().eval()
    llama.load_state_dict(llama_weights(random_model(config)), strict=True)
    llama.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    Tokenizer.train(["one two three"], vocab_size=280).save(folder)
    return llama


@pytest.mark.parametrize("shard", [None, "100KB"])
@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 2}, {"tie_embeddings": True, "rope_theta": 5000.0}])
def test_logits_are_those_of_the_llama(tmp_path, changes, shard, tokens):
    config = dataclasses.replace(NANO["nano-base"], **{"tie_embeddings": False, "norm_eps": 1e-6, **changes})
    llama = write_llama(tmp_path / "llama", config, shard=shard)
    assert (len(list((tmp_path / "llama").glob("*.safetensors"))) > 1) == (shard is not None)
    assert convert_llama(tmp_path / "llama", tmp_path / "dense") == config
    checkpoint, ids = Checkpoint.open(tmp_path / "dense"), tokens(2, 30)
    checkpoint.verify()
    assert checkpoint.tokenizer().encode("one two") == Tokenizer.load(tmp_path / "llama").encode("one two")
    with torch.no_grad():
        torch.testing.assert_close(
            checkpoint.load()(ids), llama(ids).logits, rtol=1e-4, atol=2e-5
        )  # its rotary is fp32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "expected a checkpoint of model_type 'llama', got 'mamba'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"head_dim": 64}, "head_dim = 64"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_scaling"),
        ({"hidden_act": "gelu"}, "hidden_act = gelu"),
    ],
)
def test_what_the_dense_base_does_not_have_is_refused(change, message):
    values = llama_config(NANO["nano-base"]).to_dict() | change
    with pytest.raises(ValueError, match=message):
        dense_config(values)


def test_incomplete_and_odd_checkpoints(tmp_path):
    config = dataclasses.replace(NANO["nano-base"], tie_embeddings=False)
    write_llama(tmp_path / "llama", config)
    out, weights = tmp_path / "dense", tmp_path / "llama" / "model.safetensors"
    values = json.loads((tmp_path / "llama" / "config.json").read_text())
    (tmp_path / "llama" / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 4}))
    with pytest.raises(ValueError, match=r"no weight 'model.layers.3"):
        convert_llama(tmp_path / "llama", out)
    (tmp_path / "llama" / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 2}))
    with pytest.raises(ValueError, match="weights that a Llama does not have"):
        convert_llama(tmp_path / "llama", out)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="it is damaged"):
        convert_llama(tmp_path / "llama", out)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors; only safetensors are read"):
        convert_llama(tmp_path / "llama", out)
    with pytest.raises(FileNotFoundError, match=r"no config.json"):
        convert_llama(tmp_path / "nothing", out)
    assert not out.exists()
