"""The learning rate: linear warm-up, then cosine (paper, Table 3)."""

from __future__ import annotations

import math

from flexmemory.config import TrainConfig


def learning_rate(step: int, *, config: TrainConfig) -> float:
    """The rate of optimizer step `step`, counted from 1.

    It reaches `lr` at step `warmup_steps` and `lr_final` at the last step.
    """
    assert 1 <= step <= config.total_steps
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = (step - config.warmup_steps) / (config.total_steps - config.warmup_steps)
    return config.lr_final + (config.lr - config.lr_final) * (1 + math.cos(math.pi * progress)) / 2
