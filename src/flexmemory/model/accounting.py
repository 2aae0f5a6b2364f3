"""What a model costs, from its configuration alone: parameters, bytes, operations.

Embedding and head are counted apart, as the paper counts neither (docs/architecture.md, errata).
"""

from __future__ import annotations

import dataclasses

from flexmemory.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCounts:
    """Parameters by role, all layers together."""

    attention: int
    """Query, key, value and output projections."""
    ffn: int
    """The FFN of a dense model, or FFN-C."""
    norms: int
    """Norms on the residual stream."""
    memory: int
    """FFN-M with its norms, and free tables: what rows replace."""
    embedding: int
    """Input embedding."""
    head: int
    """Output head; 0 when tied to the embedding."""

    @property
    def backbone(self) -> int:
        """All but embedding and head: the paper's "total"."""
        return self.attention + self.ffn + self.norms + self.memory

    @property
    def active(self) -> int:
        """What must be in device memory, embedding and head apart: the paper's "active"."""
        return self.backbone - self.memory

    @property
    def total(self) -> int:
        """Every parameter."""
        return self.backbone + self.embedding + self.head

    @property
    def resident(self) -> int:
        """Every parameter that is left when rows are looked up."""
        return self.total - self.memory


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Parameters of a model by role."""
    d, layers = config.hidden_size, config.num_layers
    attention = d * config.head_size * (config.num_heads + 2 * config.num_kv_heads) + d * d
    ffn = memory = 0
    if config.architecture == "dense":
        ffn = 3 * d * config.intermediate_size
    else:
        if config.memory_kind != "table":
            memory += 3 * d * config.intermediate_size + d
        if config.memory_kind != "ffn":
            memory += config.vocab_size * d
    if config.architecture == "flex":
        square = config.ffn_c == "square" and config.flex_ratio < 3
        ffn = config.flex_ratio * d * d if square else 3 * d * config.ffn_c_size
    norms_per_layer = 1 if config.architecture == "memory" else 2
    return ParameterCounts(
        attention=attention * layers,
        ffn=ffn * layers,
        norms=(norms_per_layer * layers + 1) * d,
        memory=memory * layers,
        embedding=config.vocab_size * d,
        head=0 if config.tie_embeddings else config.vocab_size * d,
    )


def train_flops_per_token(config: ModelConfig, *, unique_share: float, seq_len: int | None = None) -> float:
    """Floating-point operations to train on one token: forward, and twice that backward.

    Args:
        config: The model.
        unique_share: Unique ids per token of what FFN-M is computed over at once; 1 is "for every position".
        seq_len: Length of sequences (by default the model's longest); causal attention costs half its square.
    """
    counts = count_parameters(config)
    d = config.hidden_size
    ffn_m = 3 * d * config.intermediate_size * config.num_layers if config.has_memory else 0
    weights = counts.attention + counts.ffn + unique_share * ffn_m + config.vocab_size * d
    return 6 * weights + attention_flops_per_token(config, seq_len=seq_len or config.max_seq_len)


def attention_flops_per_token(config: ModelConfig, *, seq_len: int) -> int:
    """The part of `train_flops_per_token` that multiplies no weights: scores and what they sum, causal."""
    return 6 * config.hidden_size * seq_len * config.num_layers


def row_numbers(config: ModelConfig) -> int:
    """Numbers in one token's rows, all layers together: L * D (Eq. 2.9)."""
    return config.num_layers * config.hidden_size if config.has_memory else 0


def row_training_bytes(
    config: ModelConfig, *, num_unique: int, bytes_per_number: int, kept_layers: int | None = None
) -> int:
    """Memory that training holds for the rows of `num_unique` ids computed at once: an estimate, eager mode's.

    Each of `kept_layers` layers (by default all) keeps for its backward pass the embedding before and after its norm,
    gate, up, SiLU of the gate and their product. Each layer makes a row; the table is a copy of the rows, with a
    gradient in the same dtype and a sum of gradients in fp32.
    """
    d, cells = config.hidden_size, config.intermediate_size
    kept = config.num_layers if kept_layers is None else kept_layers
    numbers = kept * (2 * d + 4 * cells) + config.num_layers * 3 * d
    return num_unique * (numbers * bytes_per_number + config.num_layers * 4 * d)


def kv_cache_bytes(config: ModelConfig, *, context: int, bytes_per_number: int) -> int:
    """Bytes of keys and values of one sequence of `context` tokens."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_size * context * bytes_per_number


def decode_bytes_per_token(config: ModelConfig, *, context: int, bytes_per_number: int = 2) -> int:
    """Fewest bytes that decoding one token at batch 1 moves: weights and KV cache read, rows looked up once."""
    counts = count_parameters(config)
    weights = counts.active + config.vocab_size * config.hidden_size + config.hidden_size
    cache = kv_cache_bytes(config, context=context, bytes_per_number=bytes_per_number)
    return (weights + row_numbers(config)) * bytes_per_number + cache
