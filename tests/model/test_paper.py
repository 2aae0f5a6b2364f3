"""The model equals the paper's equations, and its dense base equals transformers' Llama."""

import dataclasses

import pytest
import torch

from flexmemory.config import ModelConfig
from flexmemory.model.transformer import Transformer
from tests.conftest import NANO, VARIED, random_model
from tests.reference import paper

REFERENCE_NAMES = {
    "attention_norm": "attention_norm",
    "attention.output": "output",
    "ffn_norm": "ffn_norm",
    "ffn.gate": "gate",
    "ffn.up": "up",
    "ffn.down": "down",
    "ffn_c.gate": "c_gate",
    "ffn_c.up": "c_up",
    "ffn_c.down": "c_down",
    "memory.norm": "m_norm",
    "memory.ffn.gate": "m_gate",
    "memory.ffn.up": "m_up",
    "memory.ffn.down": "m_down",
    "memory.table": "m_table",
}


def reference_weights(model: Transformer) -> dict:
    config = model.config
    layers: list[dict[str, torch.Tensor]] = []
    for block in model.blocks:
        named = {name.removesuffix(".weight"): value.detach() for name, value in block.named_parameters()}
        kv_size = config.num_kv_heads * config.head_size
        query, key, value = named.pop("attention.qkv").split((config.hidden_size, kv_size, kv_size))
        layer = {REFERENCE_NAMES[name]: tensor for name, tensor in named.items()}
        layers.append(layer | {"query": query, "key": key, "value": value})
    weights = {name: getattr(model, name).weight.detach() for name in ("embedding", "norm", "head")}
    return {**weights, "layers": layers}


def reference_logits(model: Transformer, sequence: torch.Tensor) -> torch.Tensor:
    config = model.config
    return paper.logits(
        sequence.tolist(),
        reference_weights(model),
        architecture=config.architecture,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        theta=config.rope_theta,
        eps=config.norm_eps,
    )


@pytest.mark.parametrize("name", VARIED)
def test_logits_equal_the_paper(name, tokens):
    model = random_model(VARIED[name])
    ids = tokens(2, 9)
    with torch.no_grad():
        logits = model(ids)
    expected = torch.stack([reference_logits(model, sequence) for sequence in ids])
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_dense_base_equals_transformers_llama(kv_heads, tokens):
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(NANO["nano-base"], num_kv_heads=kv_heads, tie_embeddings=False)
    model = random_model(config, dtype=torch.float32)
    llama = transformers.LlamaForCausalLM(llama_config(config)).eval()
    llama.load_state_dict(llama_weights(model), strict=True)
    ids = tokens(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), llama(ids).logits, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["nano-memory", "grouped-query"])
def test_transformers_dynamic_cache_works(name, tokens):
    cache_class = pytest.importorskip("transformers").DynamicCache
    model = random_model(VARIED[name])
    ids = tokens(2, 16)
    cache = cache_class()
    with torch.no_grad():
        steps = [model(piece, kv_cache=cache) for piece in ids.split((7, 1, 8), dim=1)]
        torch.testing.assert_close(torch.cat(steps, dim=1), model(ids), rtol=1e-10, atol=1e-10)
    assert cache.get_seq_length() == 16


def llama_config(config: ModelConfig):
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tie_embeddings,
    )


def llama_weights(model: Transformer) -> dict[str, torch.Tensor]:
    config = model.config
    kv_size = config.num_kv_heads * config.head_size
    weights = {
        "model.embed_tokens.weight": model.get_parameter("embedding.weight"),
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.head.weight,
    }
    for layer, block in enumerate(model.blocks):
        named = dict(block.named_parameters())
        query, key, value = named["attention.qkv.weight"].split((config.hidden_size, kv_size, kv_size))
        weights |= {
            f"model.layers.{layer}.{name}": tensor
            for name, tensor in {
                "self_attn.q_proj.weight": query,
                "self_attn.k_proj.weight": key,
                "self_attn.v_proj.weight": value,
                "self_attn.o_proj.weight": named["attention.output.weight"],
                "input_layernorm.weight": named["attention_norm.weight"],
                "post_attention_layernorm.weight": named["ffn_norm.weight"],
                "mlp.gate_proj.weight": named["ffn.gate.weight"],
                "mlp.up_proj.weight": named["ffn.up.weight"],
                "mlp.down_proj.weight": named["ffn.down.weight"],
            }.items()
        }
    return weights
