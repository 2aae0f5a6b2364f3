"""FFNs scaled by alpha (Table 1, Fig. 7) and one layer's left out (Fig. 4, 12), in base, memory and flex-3 alike."""

from __future__ import annotations

import functools
from typing import Any

from flexmemory.evaluate.probes import layer_alphas, scaled_ffn
from flexmemory.reproduce.runs import Run
from flexmemory.reproduce.study import Job, Study, reference

ALPHAS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
VARIANTS = ("base", "memory", "flex3")
"""In flex models FFN-M alone is scaled."""


def jobs(study: Study) -> dict[str, Job]:
    """All factors, then all layers, over texts and tasks."""
    found: dict[str, Job] = {}
    for size, run in reference(study, VARIANTS):
        name = f"{size.family}-{run.variant}"
        for alpha in ALPHAS:
            found[f"{name} alpha {alpha:g}"] = functools.partial(_scaled, run=run, alpha=alpha)
        for layer in range(study.checkpoint(run).config.num_layers):
            found[f"{name} without {layer}"] = functools.partial(_scaled, run=run, layer=layer)
    return found


def _scaled(study: Study, run: Run, *, alpha: float = 1.0, layer: int | None = None) -> dict[str, Any]:
    model = study.load(run)
    dropped = () if layer is None else (layer,)
    alphas = layer_alphas(model.config.num_layers, alpha=alpha, drop_layers=dropped)
    facts = {"size": run.size.family, "variant": run.variant, "alpha": alpha, "layer": layer}
    with scaled_ffn(model, alphas) as row_source:
        return facts | study.judge(model, row_source)
