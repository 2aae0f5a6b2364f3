"""What an optimizer step costs each GPU of a job: operations, memory, network, seconds; from numbers alone.

All of it is per rank and per optimizer step, in bf16 with fp32 master weights under FSDP2 (train/parallel.py).
docs/scaling.md states the model, what it leaves out, and how it compares with measurements. Letters of
docs/notation.md, and W for the number of ranks.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple

from flexmemory.config import ModelConfig
from flexmemory.model.accounting import count_parameters, row_numbers, row_training_bytes, train_flops_per_token

BF16, FP32, INT64 = 2, 4, 8
LOGITS_BYTES = 2**30
"""Logits that the loss holds at once, at most; as much again for their gradient."""
_ROW_MOVES = 7 * BF16
"""Bytes moved for one number of one position's row: gathered (read, written), its gradient read and added in fp32."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """An optimizer step spread over a job."""

    batch_tokens: int
    """Tokens of the whole job's step."""
    world_size: int
    """W, ranks; each takes an equal share of the tokens."""
    rank_ids: int
    """Unique ids in one rank's share of the tokens."""
    job_ids: int
    """Unique ids in all tokens of the step."""
    rows_per: Literal["step", "job"] = "step"
    """FFN-M computes a rank's unique ids on that rank, or each unique id of the job on the one rank that owns it."""
    micro_batch_tokens: int = 16_384
    """Tokens per forward pass of a rank, at most its share."""
    seq_len: int = 2048
    """Tokens per sequence."""
    keep_gathered: bool = True
    """Weights stay gathered from a step's first use of them to its last; otherwise each pass gathers them again."""
    gradient_bytes: int = FP32
    """Bytes a number of row gradients on their way to the owner."""

    def __post_init__(self) -> None:
        """Reject impossible plans."""
        if self.batch_tokens % (self.world_size * self.seq_len):
            raise ValueError(
                f"{self.batch_tokens} tokens do not give each of {self.world_size} ranks whole sequences of "
                f"{self.seq_len}: use another batch_tokens or world_size"
            )
        if not 0 < self.rank_ids <= self.job_ids <= self.world_size * self.rank_ids:
            raise ValueError(
                f"{self.rank_ids} unique ids a rank and {self.job_ids} in a job of {self.world_size} cannot be: a "
                "rank has at most the job's, and the job at most the sum of its ranks'"
            )

    @property
    def rank_tokens(self) -> int:
        """Tokens of one rank."""
        return self.batch_tokens // self.world_size

    @property
    def micro_steps(self) -> int:
        """Forward passes of one rank."""
        return -(-self.rank_tokens // self.micro_batch_tokens)

    @property
    def computed_ids(self) -> int:
        """Ids that FFN-M computes on one rank."""
        return self.rank_ids if self.rows_per == "step" else -(-self.job_ids // self.world_size)


class StepFlops(NamedTuple):
    """Floating-point operations, forward and backward."""

    backbone: float
    """Attention, and the FFN of a dense model or FFN-C."""
    head: float
    ffn_m: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)


class NetworkBytes(NamedTuple):
    """Bytes that a rank receives from others; it sends as many (rows and their gradients: on average)."""

    gather: float
    """Weights in bf16, all-gather."""
    scatter: float
    """Gradients of weights in fp32, reduce-scatter."""
    exchange: float
    """Ids, rows and gradients of rows, all-to-all; 0 unless rows are shared by the job."""


class DeviceBytes(NamedTuple):
    """Device memory at a step's peak, an estimate without what allocator and libraries add."""

    optimizer: float
    """This rank's part of fp32 weights and both moments."""
    weights: float
    """Gathered in bf16."""
    gradients: float
    """Of weights, fp32: whole while micro-batches add to them, this rank's part otherwise."""
    rows: float
    """Table, its gradient, and what FFN-M keeps for its backward pass."""
    activations: float
    """Of one micro-batch, eager mode's."""
    logits: float
    """Logits and gradients that the loss holds at once."""

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """How fast the machines are, per GPU and as achieved."""

    matmul_flops_per_s: float
    memory_bytes_per_s: float
    """Read and written."""
    nvlink_bytes_per_s: float
    """Each way, inside a node."""
    internode_bytes_per_s: float
    """Each way, between nodes."""
    gpus_per_node: int = 8


class StepSeconds(NamedTuple):
    """Seconds of a step."""

    compute: float
    """Matrix products."""
    rows: float
    """Gathering rows from the table and adding to its gradient."""
    exchange: float
    """All-to-all of rows and their gradients; nothing hides it."""
    weights: float
    """The part of gathering weights and scattering gradients that compute does not hide."""

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)


class RowsChoice(NamedTuple):
    """Whether the job should compute each unique id once, and why."""

    pays: bool
    saved_s: float
    """Seconds of FFN-M saved on a rank, a step."""
    exchange_s: float
    """Seconds to exchange rows and their gradients instead."""


def flops_per_id(config: ModelConfig) -> float:
    """Operations to compute one id's rows in all layers, and their backward pass."""
    return train_flops_per_token(config, unique_share=1.0) - train_flops_per_token(config, unique_share=0.0)


def step_flops(config: ModelConfig, plan: StepPlan) -> StepFlops:
    """Operations of one rank; causal attention as in `train_flops_per_token`."""
    per_token = train_flops_per_token(config, unique_share=0.0, seq_len=plan.seq_len)
    head = 6 * config.vocab_size * config.hidden_size
    return StepFlops(
        backbone=(per_token - head) * plan.rank_tokens,
        head=head * plan.rank_tokens,
        ffn_m=flops_per_id(config) * plan.computed_ids,
    )


def network_bytes(config: ModelConfig, plan: StepPlan) -> NetworkBytes:
    """Bytes that one rank receives from others."""
    counts = count_parameters(config)
    elsewhere = 1 - 1 / plan.world_size
    # The table needs FFN-M for one forward and one backward pass a step, and lets it go between them.
    passes = 2 * plan.micro_steps if not plan.keep_gathered else 1
    gathered = passes * counts.resident + 2 * counts.memory
    exchange = 0.0
    if plan.rows_per == "job":
        exchange = exchange_bytes(
            config, rank_ids=plan.rank_ids, world_size=plan.world_size, gradient_bytes=plan.gradient_bytes
        )
    return NetworkBytes(gather=BF16 * gathered * elsewhere, scatter=FP32 * counts.total * elsewhere, exchange=exchange)


def exchange_bytes(config: ModelConfig, *, rank_ids: int, world_size: int, gradient_bytes: int = FP32) -> float:
    """Bytes that a rank receives, on average, when rows are shared by the job: ids and gradients, and its own rows."""
    if not config.has_memory:
        return 0.0
    numbers = row_numbers(config) + config.hidden_size  # the embedding lies beside the rows
    return rank_ids * (1 - 1 / world_size) * (INT64 + numbers * (BF16 + gradient_bytes))


def device_bytes(config: ModelConfig, plan: StepPlan) -> DeviceBytes:
    """Memory of one rank at its peak."""
    counts = count_parameters(config)
    micro_tokens = min(plan.micro_batch_tokens, plan.rank_tokens)
    outside = counts.embedding + counts.head + config.hidden_size  # what belongs to no layer stays gathered
    layer = (counts.backbone - config.hidden_size) // config.num_layers
    summed = counts.resident if plan.micro_steps > 1 else 0  # FFN-M has one backward pass a step
    rows = 0
    if config.has_memory:
        rows = row_training_bytes(config, num_unique=plan.computed_ids, bytes_per_number=BF16)
        if plan.rows_per == "job":  # the rank's own table, its gradient, and that gradient sent and received
            rows += plan.rank_ids * row_numbers(config) * (BF16 + FP32 + 2 * plan.gradient_bytes)
    logits = min(LOGITS_BYTES, BF16 * config.vocab_size * micro_tokens)
    return DeviceBytes(
        optimizer=3 * FP32 * counts.total / plan.world_size,
        weights=BF16 * (counts.total if plan.keep_gathered else outside + 2 * layer),  # this layer and the next
        gradients=FP32 * max(summed, counts.total / plan.world_size),
        rows=rows,
        activations=_activation_bytes(config) * micro_tokens,
        logits=2 * logits + BF16 * config.vocab_size * config.hidden_size,
    )


def _activation_bytes(config: ModelConfig) -> int:
    """Bytes that the layers keep of one token for their backward pass, rows apart."""
    d, heads = config.hidden_size, config.num_heads + config.num_kv_heads
    numbers = 3 * d + config.head_size * (
        2 * heads + config.num_kv_heads
    )  # x, normed, attended; q, k, v, q and k turned
    cells = config.intermediate_size if config.architecture == "dense" else config.ffn_c_size
    if cells:
        numbers += 2 * d + 4 * cells  # y, normed; gate, up, SiLU of the gate, product
    return BF16 * numbers * config.num_layers


def step_seconds(config: ModelConfig, plan: StepPlan, rates: Rates) -> StepSeconds:
    """Time of a step, by the rates given.

    The first gathering of weights hides behind the first forward pass and the scattering of gradients behind the last
    backward pass, of the table and of one micro-batch; weights gathered again and again hide behind every pass.
    """
    flops, network = step_flops(config, plan), network_bytes(config, plan)
    compute = flops.total / rates.matmul_flops_per_s
    pass_s = ((flops.backbone + flops.head) / plan.micro_steps + flops.ffn_m) / rates.matmul_flops_per_s
    gather = ring_seconds(network.gather, world_size=plan.world_size, rates=rates)
    scatter = ring_seconds(network.scatter, world_size=plan.world_size, rates=rates)
    hidden_gather = min(gather, pass_s / 3 if plan.keep_gathered else compute)
    hidden_scatter = min(scatter, pass_s * 2 / 3)
    return StepSeconds(
        compute=compute,
        rows=_ROW_MOVES * row_numbers(config) * plan.rank_tokens / rates.memory_bytes_per_s,
        exchange=network.exchange / exchange_rate(plan.world_size, rates=rates),
        weights=gather - hidden_gather + scatter - hidden_scatter,
    )


def ring_seconds(num_bytes: float, *, world_size: int, rates: Rates) -> float:
    """Time of an all-gather or reduce-scatter that brings `num_bytes` to each rank.

    Between nodes a ring enters each node once and goes on inside it, so the node's links share what one GPU receives.
    """
    inside = num_bytes / rates.nvlink_bytes_per_s
    if world_size <= rates.gpus_per_node:
        return inside
    return max(inside, num_bytes / (rates.gpus_per_node * rates.internode_bytes_per_s))


def exchange_rate(world_size: int, *, rates: Rates) -> float:
    """Bytes per second that a rank receives in an all-to-all: nothing of it is meant for two GPUs of a node."""
    if world_size <= rates.gpus_per_node:
        return rates.nvlink_bytes_per_s
    across = (world_size - rates.gpus_per_node) / (world_size - 1)
    return min(rates.internode_bytes_per_s / across, rates.nvlink_bytes_per_s / (1 - across))


def rows_job_pays(
    config: ModelConfig,
    *,
    rank_ids: int,
    job_ids: int,
    world_size: int,
    matmul_flops_per_s: float,
    exchange_bytes_per_s: float,
    gradient_bytes: int = FP32,
) -> RowsChoice:
    """Whether computing each unique id once in the job takes less time than each rank computing its own.

    It counts every saved second, so it holds while weights move behind compute: docs/scaling.md, "Which rows".

    Args:
        config: The model.
        rank_ids: Unique ids in one rank's share of a step.
        job_ids: Unique ids in the whole step.
        world_size: Ranks.
        matmul_flops_per_s: What a rank achieves in matrix products of FFN-M's shapes.
        exchange_bytes_per_s: What a rank receives from the others in an all-to-all in which all take part.
        gradient_bytes: Bytes a number of row gradients on their way to the owner.
    """
    saved_ids = rank_ids - math.ceil(job_ids / world_size)
    num_bytes = exchange_bytes(config, rank_ids=rank_ids, world_size=world_size, gradient_bytes=gradient_bytes)
    saved_s = saved_ids * flops_per_id(config) / matmul_flops_per_s
    exchange_s = num_bytes / exchange_bytes_per_s
    return RowsChoice(saved_s > exchange_s, saved_s, exchange_s)
