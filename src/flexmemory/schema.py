"""The JSON schema of a checkpoint's `config.json`, from the dataclass that reads it."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any, Literal, get_args, get_origin, get_type_hints

from flexmemory.config import KEYS_OF_TRANSFORMERS, MODEL_TYPE, ModelConfig

_TYPES = {int: "integer", float: "number", bool: "boolean", str: "string"}


def model_schema() -> dict[str, Any]:
    """Types, choices, defaults and descriptions of entries; how they must fit together is the code's to check."""
    hints, described = get_type_hints(ModelConfig), _descriptions()
    properties: dict[str, Any] = {"model_type": {"const": MODEL_TYPE}}
    required = ["model_type"]
    for field in dataclasses.fields(ModelConfig):
        hint = hints[field.name]
        entry: dict[str, Any] = {"description": described[field.name]}
        if get_origin(hint) is Literal:
            entry["enum"] = list(get_args(hint))
        else:
            entry["type"] = _TYPES[hint]
        if hint in (int, float):
            entry["minimum"] = 0
        if field.default is dataclasses.MISSING:
            required.append(field.name)
            if hint is int and field.name != "intermediate_size":  # 0 where the memory is a free table
                entry["minimum"] = 1
        else:
            entry["default"] = field.default
        properties[field.name] = entry
    properties |= {key: {"description": "Of transformers."} for key in sorted(KEYS_OF_TRANSFORMERS)}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "flexmemory model",
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _descriptions() -> dict[str, str]:
    """The string under each field, which Python does not keep."""
    source = inspect.getsource(ModelConfig)
    found = re.findall(r'^    (\w+): [^\n]+\n    """(.*?)"""', source, flags=re.DOTALL | re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}
