import dataclasses
import json

import pytest

from flexmemory.cli.tol_plan import plan
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.tol.plan import load_plan, store_bytes
from flexmemory.train.prepare import prepare
from tests.conftest import NANO, random_model
from tests.tol.conftest import write_checkpoint


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A checkpoint with short sequences, and prepared text of its tokenizer."""
    folder = tmp_path_factory.mktemp("plan")
    words = " ".join(f"{a} {b} and {a}{b}" for a in ("one", "two", "three") for b in ("four", "five", "six"))
    config = dataclasses.replace(NANO["nano-flex3"], max_seq_len=16, vocab_size=300)
    checkpoint = write_checkpoint(folder / "checkpoint", random_model(config).float(), text=words)
    (folder / "text.txt").write_text(words * 60)
    prepare([folder / "text.txt"], out=folder / "data", tokenizer=checkpoint.tokenizer())
    return folder


def test_a_plan_is_made_and_read_back(work, capsys, tmp_path):
    out = tmp_path / "plan"
    plan(work / "checkpoint", budget="80kB", calibration=work / "data", out=out, tokens=1024, basis=False, device="cpu")
    said = capsys.readouterr().out
    checkpoint = Checkpoint.open(work / "checkpoint")
    scheme = load_plan(out, checkpoint)
    values = json.loads((out / "plan.json").read_text())
    assert values["bytes"]["total"] == store_bytes(scheme, num_layers=checkpoint.config.num_layers).total <= 80_000
    assert f"{values['bytes']['total']:,} of 80,000" in said
    assert values["measured"]["stderr"] > 0
    assert len(values["table"]["predicted (codec, layer, band)"]["int4"]) == checkpoint.config.num_layers
    assert sum(values["bytes_per_layer"].values()) < values["bytes"]["rows"]
    with pytest.raises(FileExistsError):
        plan(work / "checkpoint", budget="80kB", calibration=work / "data", out=out)


def test_too_little_text_says_how_much_is_needed(work, tmp_path):
    with pytest.raises(ValueError, match="an error bar needs 513 at least"):
        plan(work / "checkpoint", budget="80kB", calibration=work / "data", out=tmp_path / "plan", tokens=200)
    with pytest.raises(ValueError, match="has 0 tokens"):
        plan(work / "checkpoint", budget="80kB", calibration=work / "data", out=tmp_path / "plan", split="validation")
