"""Trained models from elsewhere, such as a larger budget's, whole and with FFNs scaled: do recall tasks fall more?

Beside the study's own, which are seldom above chance on reasoning tasks (`reproduce.recall`).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from flexmemory.evaluate.probes import layer_alphas, scaled_ffn
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.reproduce.recall import ALPHA
from flexmemory.reproduce.study import Job, Study


def jobs(study: Study) -> dict[str, Job]:
    """Each model at both factors."""
    return {
        f"{path.resolve().name} alpha {alpha:g}": functools.partial(_judged, path=path, alpha=alpha)
        for path in study.models
        for alpha in (1.0, ALPHA)
    }


def _judged(study: Study, path: Path, *, alpha: float) -> dict[str, Any]:
    """Its perplexity, tasks and gains.

    Raises:
        ValueError: its tokenizer is not the study's.
    """
    checkpoint = Checkpoint.open(path)
    if checkpoint.tokenizer().fingerprint != study.train_data.tokenizer().fingerprint:
        raise ValueError(f"{path} has another tokenizer than the study's data; prepare the data with {path}'s")
    model = checkpoint.load(device=study.device, dtype=torch.float32).requires_grad_(False)
    with scaled_ffn(model, layer_alphas(model.config.num_layers, alpha=alpha)) as row_source:
        return {"model": path.resolve().name, "alpha": alpha} | study.judge(model, row_source)
