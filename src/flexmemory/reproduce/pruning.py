"""The dense base pruned to as many active parameters as memory and flex models have (Fig. 11), and 2:4."""

from __future__ import annotations

import functools
from typing import Any, get_args

from flexmemory.evaluate.pruning import Method, Sparsity, prune, sparsity_for
from flexmemory.model.accounting import count_parameters
from flexmemory.reproduce.runs import Run, variant_config
from flexmemory.reproduce.study import Job, Study, reference

MATCHED = ("flex3", "flex2", "flex1", "memory")
CALIBRATION_TOKENS = 131_072


def jobs(study: Study) -> dict[str, Job]:
    """Every method at every match."""
    found: dict[str, Job] = {}
    for size, run in reference(study, ["base"]):
        base = study.checkpoint(run).config
        targets: dict[str, Sparsity] = {"2:4": (2, 4)}
        for variant in MATCHED:
            active = count_parameters(variant_config(size.family, variant, base.vocab_size)).active
            targets[variant] = sparsity_for(base, active)
        for target, sparsity in targets.items():
            for method in get_args(Method):
                found[f"{size.family} {method} {target}"] = functools.partial(
                    _pruned, run=run, method=method, target=target, sparsity=sparsity
                )
    return found


def _pruned(study: Study, run: Run, *, method: Method, target: str, sparsity: Sparsity) -> dict[str, Any]:
    model = study.load(run)
    windows = study.calibration(run.size.seq_len, tokens=2048 if study.quick else CALIBRATION_TOKENS)
    done = prune(model, method=method, sparsity=sparsity, calibration=None if method == "magnitude" else windows)
    facts = {"size": run.size.family, "method": method, "target": target, "sparsity": sparsity, "active": done.active}
    return facts | study.judge(model)
