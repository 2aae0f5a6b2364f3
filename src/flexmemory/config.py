"""Configurations: frozen, strict, JSON in and out.

A model is described by one `ModelConfig`, a training recipe by one `TrainConfig`. Both refuse what they do not know:
an unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

MODEL_TYPE = "flex_memory"
KEYS_OF_TRANSFORMERS = {
    "architectures",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "transformers_version",
    "use_cache",
}
"""What transformers adds to config.json (`flexmemory.hf`); nothing of it changes the model."""

Architecture = Literal["dense", "memory", "flex"]
MemoryKind = Literal["ffn", "table", "ffn+table"]
Config = TypeVar("Config", "ModelConfig", "TrainConfig")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The shape of one model. Letters of docs/notation.md: V, D, L, H, K."""

    architecture: Architecture
    """`dense` (the Llama-style base), `memory` (MemoryLLM, Eq. 2.4) or `flex` (Flex-MemoryLLM, Sec. 4.2)."""
    vocab_size: int
    """V, number of token ids."""
    hidden_size: int
    """D (d in the paper), width of the residual stream."""
    num_layers: int
    """L (N in the paper)."""
    num_heads: int
    """H, query heads."""
    num_kv_heads: int
    """Key and value heads; equal to `num_heads` unless attention is grouped-query."""
    intermediate_size: int
    """K, cells of one feed-forward memory: the FFN of `dense`, FFN-M of `memory` and `flex`."""
    flex_ratio: int = 0
    """b of Flex-MemoryLLM-b h^2: FFN-C has about b * D^2 parameters a layer. 0 unless `flex`."""
    ffn_c: Literal["swiglu", "square"] = "swiglu"
    """FFN-C as a SwiGLU with b * D / 3 cells, or as b square matrices (docs/architecture.md)."""
    memory_kind: MemoryKind = "ffn"
    """Where a row comes from: FFN-M on the token embedding, a free table per layer, or their sum."""
    tie_embeddings: bool = False
    """Use the input embedding as the output head."""
    max_seq_len: int = 2048
    """Longest sequence the model accepts."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-5
    """Epsilon of every RMSNorm."""

    def __post_init__(self) -> None:
        """Reject impossible shapes."""
        _check_literals(self)
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "max_seq_len"):
            _require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        _require(
            self.hidden_size % self.num_heads == 0 and self.head_size % 2 == 0,
            f"hidden_size ({self.hidden_size}) must be num_heads ({self.num_heads}) times an even head width",
        )
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})",
        )
        _require(
            (self.architecture == "flex") == (self.flex_ratio > 0) and 0 <= self.flex_ratio <= 3,
            f"flex_ratio must be 1, 2 or 3 for flex and 0 otherwise, got {self.flex_ratio} for {self.architecture}",
        )
        _require(
            self.architecture != "dense" or self.memory_kind == "ffn",
            f"memory_kind {self.memory_kind!r} needs a memory or flex architecture, got dense",
        )
        needs_ffn = self.memory_kind != "table"
        _require(
            (self.intermediate_size > 0) == needs_ffn,
            f"intermediate_size must be {'positive' if needs_ffn else '0 (memory_kind table has no FFN-M)'}, "
            f"got {self.intermediate_size}",
        )

    @property
    def head_size(self) -> int:
        """E, width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def has_memory(self) -> bool:
        """Whether layers add token-indexed rows."""
        return self.architecture != "dense"

    @property
    def ffn_c_size(self) -> int:
        """Cells of the SwiGLU FFN-C: b * D / 3, so that its parameters are b * D^2."""
        return round(self.flex_ratio * self.hidden_size / 3)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """A training recipe. Defaults are the paper's (Table 3)."""

    total_tokens: int = 25_000_000_000
    """Tokens to train on, all epochs together."""
    batch_tokens: int = 524_288
    """Tokens per optimizer step."""
    seq_len: int = 2048
    """Tokens per training sequence."""
    micro_batch_size: int = 8
    """Sequences per forward pass; gradients accumulate up to `batch_tokens`."""
    rows_per: Literal["auto", "job", "step", "micro-batch"] = "auto"
    """Compute memory rows once per unique id of the optimizer step in all processes together (`job`), of a process's
    share of the step, or of each micro-batch. `auto` is the step where an estimate of the memory that takes fits what
    is free, and the job where exchanging rows is measured to take less time than it saves."""
    lr: float = 1e-4
    """Peak learning rate."""
    lr_final: float = 1e-5
    """Learning rate at the end of the cosine."""
    warmup_steps: int = 5000
    """Steps of linear warm-up."""
    embedding_lr: float = 1.0
    """Learning rate of the input embedding and a head tied to it, as a multiple."""
    memory_lr: float = 1.0
    """Learning rate of FFN-M's matrices, as a multiple."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW for all, or Muon for the matrices of attention and FFNs and AdamW for the rest."""
    beta1: float = 0.9
    """AdamW first moment decay."""
    beta2: float = 0.95
    """AdamW second moment decay."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms, embeddings and free tables have none."""
    clip_norm: float = 1.0
    """Largest gradient norm; larger gradients are scaled down to it."""
    z_loss: float = 1e-6
    """Weight of the squared log-partition term."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute dtype; master weights are always fp32. `auto` is bf16 on a GPU and fp32 on a CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile the training step. `auto` is on for a GPU."""
    seed: int = 0
    """Seed of initialisation, data order and samples."""
    log_every: int = 10
    """Steps between metric lines."""
    eval_every: int = 500
    """Steps between validations (and one at the end)."""
    eval_tokens: int = 1_000_000
    """Validation tokens to use, at most."""
    save_every: int = 500
    """Steps between checkpoints (and one at the end)."""
    keep_checkpoints: int = 3
    """Newest checkpoints to keep."""
    divergence_margin: float = 2.0
    """Stop when the smoothed loss is this many nats above its best."""

    def __post_init__(self) -> None:
        """Reject impossible recipes."""
        _check_literals(self)
        for name in ("total_tokens", "batch_tokens", "seq_len", "micro_batch_size", "log_every", "eval_every"):
            _require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        for name in (
            "eval_tokens",
            "save_every",
            "keep_checkpoints",
            "clip_norm",
            "lr",
            "embedding_lr",
            "memory_lr",
            "divergence_margin",
        ):
            _require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay", "z_loss", "lr_final", "seed"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"{name} must be in [0, 1), got {getattr(self, name)}")
        _require(self.lr_final <= self.lr, f"lr_final ({self.lr_final}) must not be above lr ({self.lr}): lower it too")
        tokens = self.seq_len * self.micro_batch_size
        _require(
            self.batch_tokens % tokens == 0,
            f"batch_tokens ({self.batch_tokens}) must be a multiple of seq_len * micro_batch_size ({tokens})",
        )
        _require(
            self.total_tokens >= self.batch_tokens,
            f"total_tokens ({self.total_tokens}) must be at least one step of batch_tokens ({self.batch_tokens})",
        )

    @property
    def total_steps(self) -> int:
        """Optimizer steps in the run."""
        return self.total_tokens // self.batch_tokens

    @property
    def micro_steps(self) -> int:
        """Forward passes per optimizer step."""
        return self.batch_tokens // (self.seq_len * self.micro_batch_size)


def to_dict(config: ModelConfig | TrainConfig) -> dict[str, Any]:
    """The JSON form of a configuration."""
    return dataclasses.asdict(config)


def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """Build a configuration from JSON.

    Raises:
        ValueError: a key is unknown (the nearest known one is named), missing, or holds a value of another type.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise ValueError(f"unknown key {key!r} in {cls.__name__}{nearest(key, fields)}")
    required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    missing = [name for name in required if name not in values]
    _require(not missing, f"{cls.__name__} lacks {', '.join(missing)}")
    hints = get_type_hints(cls)
    typed = dict(values)
    for key, value in values.items():
        expected = hints[key]
        if get_origin(expected) is Literal:
            continue
        if expected is float and type(value) is int:
            typed[key] = float(value)
        elif type(value) is not expected:
            raise ValueError(f"{cls.__name__}.{key} must be {expected.__name__}, got {value!r}")
    return cls(**typed)


def nearest(name: str, known: Mapping[str, Any]) -> str:
    """`; did you mean 'x'?` for the closest known name, or the empty string."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _check_literals(config: ModelConfig | TrainConfig) -> None:
    for name, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is Literal and getattr(config, name) not in get_args(hint):
            raise ValueError(f"{name} must be one of {', '.join(get_args(hint))}, got {getattr(config, name)!r}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
