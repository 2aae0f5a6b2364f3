"""`flexmemory index`: a folder for the explorer, and what is said of it."""

from flexmemory.interpret.reader import MemoryIndex
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.train.data import TokenDataset
from tests.cli.conftest import run
from tests.conftest import VARIED, random_model
from tests.tol.conftest import write_checkpoint


def test_the_walkthroughs_index_is_of_its_checkpoint(walkthrough):
    checkpoint = Checkpoint.open(walkthrough / "runs/flex3")
    index = MemoryIndex.open(walkthrough / "runs/index", checkpoint=checkpoint)
    index.verify()
    (printed,) = [output for command, output in walkthrough.outputs.items() if " index " in command]
    for text in ("3: 0 1 2", "V 512, K 80", f"{index.nbytes / 1e6:.1f} MB", "FFN-C reads the residual stream"):
        assert text in printed


def test_counts_mask_tokens_that_the_text_lacks(walkthrough, tmp_path):
    run(
        "index", walkthrough / "runs/flex3", "--out", tmp_path / "index", "--counts", walkthrough / "runs/data",
        "--layers", "1", "--no-neighbors", "--keep.keys", "4", "--device", "cpu",
    )  # fmt: skip
    index = MemoryIndex.open(tmp_path / "index")
    assert index.layers == (1,)
    assert index.array("token_keys_idx").shape == (512, 1, 4)
    assert index.manifest.counts is not None
    assert index.manifest.counts.total == len(TokenDataset.open(walkthrough / "runs/data").train)
    assert index.tokens["undertrained"] == [count == 0 for count in index.tokens["count"]]
    assert index.manifest.mask.tokens < 512


def test_mistakes_are_one_sentence(walkthrough, refused, tmp_path):
    checkpoint, out = walkthrough / "runs/flex3", tmp_path / "index"
    assert "already exists" in refused("index", checkpoint, "--out", walkthrough / "runs/index")
    assert "has layers 0 to 2" in refused("index", checkpoint, "--out", out, "--layers", "7")
    assert "there is no device 'tpu'" in refused("index", checkpoint, "--out", out, "--device", "tpu")
    table = write_checkpoint(tmp_path / "table", random_model(VARIED["table"]))
    assert "a free table has no keys" in refused("index", table.path, "--out", out)
    assert not out.exists()


def test_of_a_dense_model_layer_0_is_indexed_and_its_scope_is_said(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "dense", random_model(VARIED["nano-base"]), text="one two")
    printed = run("index", checkpoint.path, "--out", tmp_path / "index")
    assert "1: 0" in printed
    assert "the token as the first of its sequence" in printed
