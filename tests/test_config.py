"""Configurations are strict, survive JSON, and are known by name."""

import dataclasses
import json
import subprocess
import sys

import pytest

from flexmemory.config import ModelConfig, TrainConfig, from_dict, to_dict
from flexmemory.presets import PRESETS, VARIANTS, get_preset


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    preset = PRESETS[name]
    assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(preset.model)))) == preset.model
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(preset.train)))) == preset.train


def test_every_size_has_every_variant():
    sizes = ("250m", "750m", "1b", "nano", "demo", "mini", "small")
    assert set(PRESETS) == {f"{size}-{variant}" for size in sizes for variant in VARIANTS}


def test_unknown_key_names_the_nearest():
    values = to_dict(PRESETS["nano-base"].model) | {"hidden_sise": 48}
    with pytest.raises(ValueError, match=r"unknown key 'hidden_sise' in ModelConfig; did you mean 'hidden_size'\?"):
        from_dict(ModelConfig, values)


def test_missing_key_is_named():
    values = to_dict(PRESETS["nano-base"].model)
    del values["num_heads"]
    with pytest.raises(ValueError, match="ModelConfig lacks num_heads"):
        from_dict(ModelConfig, values)


@pytest.mark.parametrize(("key", "value"), [("num_layers", "3"), ("num_layers", 3.0), ("num_layers", True)])
def test_wrong_type_is_an_error(key, value):
    with pytest.raises(ValueError, match=f"ModelConfig.{key} must be int, got {value!r}"):
        from_dict(ModelConfig, to_dict(PRESETS["nano-base"].model) | {key: value})


def test_an_integer_is_a_float():
    assert from_dict(TrainConfig, to_dict(PRESETS["nano-base"].train) | {"lr": 1}).lr == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 50}, "hidden_size"),
        ({"num_kv_heads": 3}, "multiple of num_kv_heads"),
        ({"flex_ratio": 2}, "flex_ratio must be"),
        ({"memory_kind": "table"}, "needs a memory or flex architecture"),
        ({"intermediate_size": 0}, "intermediate_size must be positive"),
        ({"architecture": "memory", "memory_kind": "table"}, "intermediate_size must be 0"),
        ({"vocab_size": 0}, "vocab_size must be positive"),
    ],
)
def test_impossible_models(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PRESETS["nano-base"].model, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_tokens": 500}, "multiple of seq_len"),
        ({"total_tokens": 100}, "at least one step"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"beta2": 1.0}, r"beta2 must be in \[0, 1\)"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative"),
    ],
)
def test_impossible_recipes(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PRESETS["nano-base"].train, **changes)


def test_unknown_choice_is_an_error():
    """In a process of its own: under the test hook, the type checker would speak first."""
    program = "from flexmemory.config import *; TrainConfig(precision='fp16')"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "ValueError: precision must be one of auto, fp32, bf16, got 'fp16'" in result.stderr


@pytest.mark.parametrize("cls", [ModelConfig, TrainConfig])
def test_every_attribute_is_a_field(cls):
    public = {name for name, value in vars(cls).items() if not name.startswith("_") and not isinstance(value, property)}
    assert public <= {field.name for field in dataclasses.fields(cls)}
    assert len(dataclasses.fields(cls)) <= 25


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="unknown preset '1b-flx3'; did you mean '1b-flex3'"):
        get_preset("1b-flx3")


def test_the_paper_recipe_is_the_default():
    """Table 3."""
    recipe = PRESETS["1b-flex3"].train
    assert recipe == TrainConfig()
    assert (recipe.lr, recipe.lr_final, recipe.warmup_steps, recipe.seq_len) == (1e-4, 1e-5, 5000, 2048)
    assert (recipe.beta1, recipe.beta2, recipe.weight_decay, recipe.z_loss) == (0.9, 0.95, 0.1, 1e-6)
