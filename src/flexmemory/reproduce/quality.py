"""Every run judged: perplexity by parameters, tokens and time (Table 2, 5, Fig. 9, 10), and zero-shot tasks."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from typing import Any

from flexmemory.model.accounting import count_parameters
from flexmemory.reproduce.runs import Run, outcome
from flexmemory.reproduce.study import Job, Study
from flexmemory.train.metrics import read_lines


def jobs(study: Study) -> dict[str, Job]:
    """Of all runs; the longest first, those of a sweep too."""
    return {run.name: functools.partial(judged, run=run) for size in study.sizes for run in study.runs(size)}


def judged(study: Study, run: Run) -> dict[str, Any]:
    """What a run is, what it cost and what it can do."""
    checkpoint = study.checkpoint(run)
    counts = count_parameters(checkpoint.config)
    lines = read_lines(study.work / "runs" / run.name / "metrics.jsonl")
    logged = [line for line in lines if "tokens_per_s" in line]
    return {
        "size": run.size.family,
        "variant": run.variant,
        "seed": run.seed,
        "lr": run.lr,
        "tokens": run.config.total_tokens,
        "parameters": dataclasses.asdict(counts) | {"backbone": counts.backbone, "active": counts.active},
        "model": {
            "hidden_size": checkpoint.config.hidden_size,
            "intermediate_size": checkpoint.config.intermediate_size,
        },
        "flops": logged[-1]["flops"],
        "unique_share": statistics.median(line["unique_share"] for line in logged if "unique_share" in line),
        "train_ce": logged[-1]["ce"],
        "validation": outcome(run, study.work)["val_loss"],
        **study.judge(study.load(run)),
    }
