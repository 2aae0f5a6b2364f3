"""Falls beyond perplexity: 0 on the curve of whole models, else what is missing; contrasts and their verdicts."""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from flexmemory.reproduce import report
from flexmemory.reproduce.claims import claims
from flexmemory.reproduce.found import Found
from flexmemory.reproduce.recall import ALPHA, contrast, fall, fall_beyond, falls
from flexmemory.reproduce.study import RECALL, TASKS
from tests.reproduce.test_report import run

BLOCKS = 8
NOISE = {task: np.random.default_rng(number).normal(0, 0.05, BLOCKS) for number, task in enumerate(TASKS)}


def curve(nats: float) -> float:
    return 2.0 - 0.1 * nats - 0.05 * nats**2


def entry(variant: str, nats: float, *, gain: Mapping[Any, float] | None = None, tokens: int = 100, seed: int = 0):
    """A model whose gains are on the curve, or others; documents are as hard for all."""
    found = run(variant, nats, tokens=tokens, seed=seed)
    for task in TASKS:
        blocks = (gain or {}).get(task, curve(nats)) + NOISE[task]
        stderr = blocks.std(ddof=1) / math.sqrt(BLOCKS)
        accuracy = {"value": 0.3, "stderr": 0.01}
        found["tasks"][task] = {
            "documents": 80,
            "metrics": {"acc": accuracy, "acc_norm": accuracy},
            "gain": {"value": float(blocks.mean()), "stderr": stderr, "blocks": blocks.tolist()},
        }
    return found


def found_of(folder, probes):
    runs = [entry("base", 3 + 0.2 * number, tokens=100 + number, seed=number) for number in range(8)]
    runs.append(entry("base", 3.0))
    where = {"gpu": "none", "cpu": "a CPU", "torch": "2", "commit": "c"}
    for part, entries in (("quality", dict(enumerate(runs))), ("probes", probes)):
        (folder / f"{part}.json").write_text(json.dumps({"provenance": [where], "entries": entries}))
    return Found(folder)


def test_a_fall_is_paired(tmp_path):
    whole, half = entry("base", 3.0), entry("base", 3.5)
    both = np.array([each["tasks"]["sciq"]["gain"]["blocks"] for each in (whole, half)])
    without = [np.delete(both, block, axis=1).mean(axis=1) for block in range(BLOCKS)]
    ratios = np.array([after / before for before, after in without])
    error = math.sqrt((BLOCKS - 1) / BLOCKS * ((ratios - ratios.mean()) ** 2).sum())
    found = fall(whole, half, "sciq")
    assert found == pytest.approx((both[1].mean() / both[0].mean() - 1, error))
    alone = half["tasks"]["sciq"]["gain"]["stderr"] / both[0].mean()
    assert found.stderr < alone / 2


def beyond(found, whole, scaled, task):
    result = fall_beyond(found, whole, scaled, task)
    assert result is not None
    return result


def test_beyond_perplexity_is_what_leaves_the_curve(tmp_path):
    whole, on_it = entry("base", 3.0), entry("base", 3.7)
    off_it = entry("base", 3.7, gain={"sciq": curve(3.7) - 0.3})
    found = found_of(tmp_path, {})
    assert fall(whole, on_it, "sciq").value < -0.1
    assert beyond(found, whole, on_it, "sciq").value == pytest.approx(0, abs=1e-9)
    before = whole["tasks"]["sciq"]["gain"]["value"]
    assert beyond(found, whole, off_it, "sciq").value == pytest.approx(-0.3 / before)


def test_scatter_of_models_is_in_the_error(tmp_path):
    whole, half = entry("base", 3.0), entry("base", 3.7)
    found = found_of(tmp_path, {})
    exact = beyond(found, whole, half, "piqa").stderr
    for number, each in enumerate(found.parts["quality"].values()):
        each["tasks"]["piqa"]["gain"]["blocks"] = [
            gain + 0.2 * (-1) ** number for gain in each["tasks"]["piqa"]["gain"]["blocks"]
        ]
    assert beyond(found, whole, half, "piqa").stderr > exact + 0.1


def test_models_from_elsewhere_stand_beside_the_study_s(tmp_path):
    """Judged on fewer documents, they have falls, and nothing beyond a curve of models judged on others."""
    whole, half = entry("base", 3.0), entry("base", 3.7)
    for each in (whole, half):
        each["tasks"]["sciq"]["documents"] = 40
    entries = {"a": whole | {"model": "large", "alpha": 1.0}, "b": half | {"model": "large", "alpha": ALPHA}}
    found_of(tmp_path, {})
    (tmp_path / "models.json").write_text(json.dumps({"provenance": [], "entries": entries}))
    (each,) = falls(Found(tmp_path))
    assert each.model == "large"
    assert each.fall["sciq"] == fall(whole, half, "sciq")
    assert "piqa" in each.beyond
    assert "sciq" not in each.beyond


@pytest.mark.parametrize(
    ("recall", "expected"), [(-0.4, "holds"), (0.4, "does not hold here"), (None, "cannot be told here")]
)
def test_the_verdict_follows_from_the_contrast(tmp_path, recall, expected):
    """At half, recall tasks are off the curve; without any gain in a kind nothing can be told."""
    lost = dict.fromkeys(RECALL, curve(3.7) + (recall or 0))
    whole = dict.fromkeys(RECALL, 0.0) if recall is None else None
    probes = {
        "nano-base alpha 1": entry("base", 3.0, gain=whole),
        "nano-base alpha 0.5": entry("base", 3.7, gain=lost),
    }
    found = found_of(tmp_path, probes)
    (each,) = falls(found)
    difference = contrast(each.beyond)
    assert (difference is None) == (recall is None)
    if recall is not None:
        assert difference is not None
        assert difference.value == pytest.approx(recall / curve(3.0), rel=0.1)
    (claim,) = (claim for claim in claims(found) if "than perplexity predicts" in claim.claim)
    assert claim.verdict == expected
    page = report.text(found, {})
    assert "| nano base, beyond perplexity |" in page
    assert "| gain, points |" in page
