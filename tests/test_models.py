"""The models in the repository are whole, small enough, and speak English."""

import json
import math
from pathlib import Path

import pytest
import torch

from flexmemory.model.accounting import count_parameters
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.presets import get_preset
from flexmemory.train.loss import next_token_loss

FOLDER = Path(__file__).parents[1] / "models"
NAMES = ("mini-memory", "mini-flex3")
TEXT = (
    "The city stands on the left bank of the river, about twenty miles from the sea. It was founded in the twelfth "
    "century, and its walls were built by the king in order to protect the harbour from his enemies."
)


def test_together_they_are_small():
    assert sum((FOLDER / name / "model.safetensors").stat().st_size for name in NAMES) <= 32 * 2**20


@pytest.mark.parametrize("name", NAMES)
def test_each_is_whole_and_predicts_english(name):
    checkpoint = Checkpoint.open(FOLDER / name)
    checkpoint.verify()
    assert checkpoint.config == get_preset(name).model
    tokenizer = checkpoint.tokenizer()
    token_ids = torch.tensor([[tokenizer.boundary_id, *tokenizer.encode(TEXT)]])
    with torch.no_grad():
        logits = checkpoint.load(dtype=torch.float32)(token_ids[:, :-1])
    _, entropy = next_token_loss(logits, token_ids[:, 1:], z_loss=0.0)
    assert math.exp(entropy) < 60


@pytest.mark.parametrize("name", NAMES)
def test_the_card_says_what_was_measured(name):
    figures = json.loads((FOLDER / "figures.json").read_text())[name]
    card = (FOLDER / "README.md").read_text()
    counts = count_parameters(get_preset(name).model)
    assert (figures["parameters"], figures["resident parameters"]) == (counts.total, counts.resident)
    assert figures["train"]["total_tokens"] == get_preset(name).train.total_tokens
    column = NAMES.index(name) + 2
    rows = {
        row.split("|")[1].strip(): row.split("|")[column].strip() for row in card.splitlines() if row.count("|") == 4
    }
    assert rows["parameters"] == f"{counts.total:,}"
    for label, text in (("held-out text", "held-out"), ("WikiText-2 raw test", "WikiText-2")):
        words = figures[text].split()
        perplexity, bits = float(words[1]), float(words[words.index("byte") + 1])
        assert float(rows[f"{label}, perplexity a token"].split()[0]) == pytest.approx(perplexity, abs=0.06)
        assert float(rows[f"{label}, bits a byte"]) == pytest.approx(bits, abs=0.0006)
    assert len(figures["tasks"]) == 8
    for task, score in figures["tasks"].items():
        metric, row = next((m, rows[f"{task}, {m}, %"]) for m in score["metrics"] if f"{task}, {m}, %" in rows)
        found = score["metrics"][metric]
        assert row == f"{100 * found['value']:.1f} ± {100 * found['stderr']:.1f}"
