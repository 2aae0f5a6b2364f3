"""A Llama-family checkpoint of transformers as our dense base, with the same logits.

Same mathematics: RMSNorm before attention and FFN, rotary positions in halves, grouped-query attention, SwiGLU, no
biases. What our base does not have (biases, stretched rotary positions, head widths of their own) is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flexmemory.config import ModelConfig
from flexmemory.model.checkpoint import write_checkpoint
from flexmemory.storage import atomic_folder, read_json
from flexmemory.tokenizer import Tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_LAYER = {
    "input_layernorm": "attention_norm",
    "self_attn.o_proj": "attention.output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn.gate",
    "mlp.up_proj": "ffn.up",
    "mlp.down_proj": "ffn.down",
}


def dense_config(values: dict[str, Any]) -> ModelConfig:
    """Our configuration of a `config.json` of transformers.

    Raises:
        ValueError: it is not of a Llama, or asks for what the dense base does not have.
    """
    if values.get("model_type") != "llama":
        raise ValueError(f"expected a checkpoint of model_type 'llama', got {values.get('model_type')!r}")
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    odd = {
        "attention_bias": bool(values.get("attention_bias")),
        "mlp_bias": bool(values.get("mlp_bias")),
        "hidden_act": values.get("hidden_act", "silu") != "silu",
        "head_dim": (values.get("head_dim") or hidden // heads) * heads != hidden,
        "rope_scaling": rope.get("rope_type", rope.get("type", "default")) != "default",
    }
    if any(odd.values()):
        names = ", ".join(f"{name} = {values.get(name, rope)}" for name, found in odd.items() if found)
        raise ValueError(f"the dense base has nothing like this checkpoint's {names}: its logits would differ")
    return ModelConfig(
        architecture="dense",
        vocab_size=values["vocab_size"],
        hidden_size=hidden,
        num_layers=values["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=values.get("num_key_value_heads") or heads,
        intermediate_size=values["intermediate_size"],
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        max_seq_len=values.get("max_position_embeddings", 2048),
        rope_theta=float(rope.get("rope_theta", values.get("rope_theta", 10_000.0))),
        norm_eps=float(values.get("rms_norm_eps", 1e-6)),
    )


def dense_parameters(config: ModelConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters by our names, of weights by transformers' names, which are taken out of `weights`.

    Raises:
        ValueError: a weight is missing, or one is left that has no place.
    """
    found: dict[str, Tensor] = {}
    try:
        found["embedding.weight"] = weights.pop("model.embed_tokens.weight")
        for layer in range(config.num_layers):
            theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
            projections = [weights.pop(f"{theirs}.self_attn.{name}_proj.weight") for name in "qkv"]
            found[f"{ours}.attention.qkv.weight"] = torch.cat(projections)
            for name, our_name in _LAYER.items():
                found[f"{ours}.{our_name}.weight"] = weights.pop(f"{theirs}.{name}.weight")
        found["norm.weight"] = weights.pop("model.norm.weight")
        if config.tie_embeddings:
            weights.pop("lm_head.weight", None)
        else:
            found["head.weight"] = weights.pop("lm_head.weight")
    except KeyError as error:
        raise ValueError(f"the checkpoint has no weight {error}") from error
    left = [name for name in weights if not name.endswith("rotary_emb.inv_freq")]
    if left:
        raise ValueError(f"the checkpoint has weights that a Llama does not have: {', '.join(sorted(left)[:3])}")
    return found


def convert_llama(source: Path, out: Path) -> ModelConfig:
    """Write the checkpoint `out` from a folder of transformers: config.json, safetensors, tokenizer.json.

    Args:
        source: The folder, with one weights file or sharded.
        out: A folder that does not exist.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is damaged, or not one that the dense base can be.
        FileExistsError: `out` exists.
    """
    for name in ("config.json", "tokenizer.json"):
        if not (source / name).is_file():
            raise FileNotFoundError(f"{source} has no {name}; expected a folder that transformers saved")
    config = dense_config(read_json(source / "config.json"))
    boundary = read_json(source / "tokenizer_config.json").get("bos_token") if _has_settings(source) else None
    boundary = boundary.get("content") if isinstance(boundary, dict) else boundary
    tokenizer = Tokenizer.load(source, boundary=boundary)
    parameters = dense_parameters(config, _read_weights(source))
    with atomic_folder(out) as folder:
        write_checkpoint(folder, config, parameters, tokenizer)
    return config


def _has_settings(source: Path) -> bool:
    return (source / "tokenizer_config.json").is_file()


def _read_weights(source: Path) -> dict[str, Tensor]:
    files = [WEIGHTS]
    if (source / INDEX).is_file():
        files = sorted(set(json.loads((source / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    weights: dict[str, Tensor] = {}
    for name in files:
        if not (source / name).is_file():
            raise FileNotFoundError(f"{source} has no {name}; only safetensors are read")
        try:
            with safe_open(source / name, framework="pt") as file:
                weights |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        except SafetensorError as error:
            raise ValueError(f"{source / name} cannot be read ({error}); it is damaged") from error
    return weights
