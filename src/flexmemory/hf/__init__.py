"""The model in transformers: importing this registers it with the Auto classes (docs/transformers.md)."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from flexmemory.hf.configuration_flex_memory import FlexMemoryConfig
from flexmemory.hf.modeling_flex_memory import FlexMemoryForCausalLM, FlexMemoryModel

AutoConfig.register(FlexMemoryConfig.model_type, FlexMemoryConfig, exist_ok=True)
AutoModel.register(FlexMemoryConfig, FlexMemoryModel, exist_ok=True)
AutoModelForCausalLM.register(FlexMemoryConfig, FlexMemoryForCausalLM, exist_ok=True)

__all__ = ["FlexMemoryConfig", "FlexMemoryForCausalLM", "FlexMemoryModel"]
