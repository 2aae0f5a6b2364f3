"""The model's configuration as transformers knows it: the fields of `ModelConfig`, and transformers' names for them."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, no_type_check

from transformers import PreTrainedConfig

from flexmemory.config import MODEL_TYPE, ModelConfig, from_dict


@no_type_check  # transformers gives it keywords that it does not name
class FlexMemoryConfig(PreTrainedConfig):
    """`ModelConfig` for transformers; see there for what the fields mean. The defaults are a small model's."""

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "max_position_embeddings": "max_seq_len",
        "tie_word_embeddings": "tie_embeddings",
        "head_dim": "head_size",
    }
    # Queries, keys and values share one matrix, so its shares are gathered again and cut by head.
    base_model_tp_plan: ClassVar[dict[str, Any] | None] = {
        "core.embedding": "embedding_rowwise",
        "core.blocks.*.attention.qkv": "colwise_gather_output",
        "core.blocks.*.attention.output": "rowwise_split_input",
        **{f"core.blocks.*.{ffn}.{name}": "colwise" for ffn in ("ffn", "memory.ffn") for name in ("gate", "up")},
        **{f"core.blocks.*.{ffn}.down": "rowwise" for ffn in ("ffn", "memory.ffn")},
        **{f"core.blocks.*.ffn_c.{name}": "colwise_gather_output" for name in ("gate", "up")},
        "core.blocks.*.ffn_c.down": "rowwise_split_input",
    }
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {
        "core.embedding": "free_full_weight",
        "core.blocks.*": "free_full_weight",
        "core.norm": "keep_full_weight",
    }

    architectures: list[str] | None = dataclasses.field(default_factory=lambda: ["FlexMemoryForCausalLM"])
    architecture: str = "memory"
    vocab_size: int = 8192
    hidden_size: int = 256
    num_layers: int = 8
    num_heads: int = 4
    num_kv_heads: int = 4
    intermediate_size: int = 680
    flex_ratio: int = 0
    ffn_c: str = "swiglu"
    memory_kind: str = "ffn"
    tie_embeddings: bool = False
    max_seq_len: int = 2048
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Refuse impossible shapes.

        Raises:
            ValueError: as `ModelConfig` does.
        """
        super().__post_init__(**kwargs)
        self.core()

    @property
    def head_size(self) -> int:
        """E, width of one attention head."""
        return self.hidden_size // self.num_heads

    def core(self) -> ModelConfig:
        """The model's configuration in this package.

        Raises:
            ValueError: it describes no model.
        """
        return from_dict(
            ModelConfig, {field.name: getattr(self, field.name) for field in dataclasses.fields(ModelConfig)}
        )
