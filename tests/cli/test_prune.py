"""`flexmemory prune`: a dense checkpoint becomes a sparse one that is otherwise like any other."""

import json
import re

import pytest
import torch

from flexmemory.cli import main
from flexmemory.evaluate.pruning import prune, sparsity_for
from flexmemory.model.accounting import count_parameters
from flexmemory.model.checkpoint import Checkpoint, save_checkpoint
from flexmemory.storage import atomic_folder
from flexmemory.train.data import TokenDataset
from tests.cli.conftest import REPOSITORY, run
from tests.conftest import random_model
from tests.train.conftest import nano, prepared, tokenizer  # noqa: F401 - fixtures

ACTIVE = count_parameters(nano("flex3")).active


@pytest.fixture
def base(tmp_path, tokenizer):  # noqa: F811 - a fixture
    with atomic_folder(tmp_path / "base") as folder:
        save_checkpoint(folder, random_model(nano("base"), dtype=torch.float32), tokenizer)
    return tmp_path / "base"


def test_a_pruned_checkpoint_is_what_prune_makes(base, prepared, tmp_path):  # noqa: F811
    with atomic_folder(tmp_path / "flex3") as folder:
        save_checkpoint(folder, random_model(nano("flex3")), None)
    text = ("--calibration", prepared, "--calibration-tokens", "2560", "--device", "cpu")
    options = ("--method", "sparsegpt", "--match", tmp_path / "flex3", *text)
    said = run("prune", base, *options, "--out", tmp_path / "sparse")
    opened = Checkpoint.open(tmp_path / "sparse")
    opened.verify()
    made = opened.load()
    stream = TokenDataset.open(prepared).train
    chosen = torch.randperm(stream.num_windows(64), generator=torch.Generator().manual_seed(0))[:40].tolist()
    windows = torch.stack([torch.from_numpy(stream.window(number, seq_len=64)) for number in chosen])
    expected = Checkpoint.open(base).load()
    sparsity = sparsity_for(expected.config, ACTIVE)
    report = prune(expected, method="sparsegpt", sparsity=sparsity, calibration=windows[:, :-1])
    for (name, weight), reference in zip(made.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(weight, reference), name
    assert report.active == pytest.approx(ACTIVE, abs=11)
    assert f"active  {report.active:,} of {count_parameters(expected.config).backbone:,} parameters" in said
    record = json.loads((tmp_path / "sparse/pruning.json").read_text())
    assert record["checkpoint_fingerprint"] == Checkpoint.open(base).fingerprint
    assert record["sparsity"] == sparsity
    assert record["zeros"] == report.zeros
    assert record["calibration"]["windows"] == 40
    assert opened.tokenizer_fingerprint == Checkpoint.open(base).tokenizer_fingerprint
    assert "perplexity" in run("eval", "ppl", tmp_path / "sparse", "--data", prepared)


@pytest.mark.parametrize(("options", "share"), [(("--pattern", "2:4"), 50), (("--sparsity", "0.25"), 25)])
def test_magnitude_needs_no_text(base, tmp_path, options, share):
    said = run("prune", base, "--method", "magnitude", *options, "--out", tmp_path / "sparse")
    assert f"({share}.00%)" in said


def test_a_preset_is_matched(base, tmp_path):
    said = run("prune", base, "--method", "magnitude", "--match", "nano-flex3", "--out", tmp_path / "sparse")
    found = re.search(r"active +([\d,]+)", said)
    assert found is not None
    assert int(found[1].replace(",", "")) == pytest.approx(ACTIVE, abs=11)


def test_the_document_names_every_option(capsys):
    text = (REPOSITORY / "docs/pruning.md").read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["prune", "--help"])
    known = capsys.readouterr().out
    named = set(re.findall(r"--[a-z][a-z-]*", text))
    assert len(named) > 7
    assert [option for option in named if f"{option} " not in known] == []


def test_mistakes(base, prepared, tmp_path, refused):  # noqa: F811
    out = tmp_path / "sparse"

    def refusal(*options, model=base):
        message = refused("prune", model, "--out", out, *options)
        assert not list(tmp_path.glob("*sparse*"))
        return message

    one = ("--method", "magnitude", "--sparsity", "0.5")
    assert "give one of --sparsity, --match and --pattern" in refusal("--method", "magnitude")
    assert "give one of --sparsity, --match and --pattern" in refusal(*one, "--pattern", "2:4")
    assert "is n:m, such as 2:4, got '2/4'" in refusal("--method", "magnitude", "--pattern", "2/4")
    assert "below 1, got 1.5" in refusal("--method", "magnitude", "--sparsity", "1.5")
    assert "match another model" in refusal("--method", "magnitude", "--match", "1b-memory")
    assert "unknown preset '1b-memry'" in refusal("--method", "magnitude", "--match", "1b-memry")
    assert "wanda looks at the inputs of each matrix" in refusal("--method", "wanda", "--sparsity", "0.5")
    assert "magnitude pruning reads no text" in refusal(*one, "--calibration", prepared, "--calibration-tokens", "2048")
    with atomic_folder(tmp_path / "memory") as folder:
        save_checkpoint(folder, random_model(nano("memory")), None)
    assert "only dense models are pruned, got memory" in refusal(*one, model=tmp_path / "memory")
    out.mkdir()
    assert "already exists" in refused("prune", base, "--out", out, *one)
