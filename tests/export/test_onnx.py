"""The graph gives the model's logits, and text without PyTorch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flexmemory.engine.reference import generate
from flexmemory.export.onnx import RowGraph, export_onnx
from flexmemory.model.memory import MemoryRows
from flexmemory.tol.build import build_store
from flexmemory.tol.store import ToLStore
from tests.cli.conftest import REPOSITORY
from tests.conftest import VARIED, random_model
from tests.tol.conftest import whole_table, write_checkpoint

TEXT = "the memory of a token is a row. " * 40


def test_the_function_of_tensors_is_the_model(tokens):
    model, ids = random_model(VARIED["grouped-query"]), tokens(2, 7)
    config = model.config
    rows = model.compute_rows(ids.flatten()).unflatten(0, (2, 7))
    past = torch.zeros(config.num_layers, 2, 2, config.num_kv_heads, 0, config.head_size, dtype=torch.float64)
    first, past = RowGraph(model)(ids[:, :3], rows[:, :3], past)
    second, past = RowGraph(model)(ids[:, 3:], rows[:, 3:], past)
    torch.testing.assert_close(torch.cat((first, second), dim=1), model(ids))
    assert past.shape[-2] == 7


@pytest.mark.compile
def test_onnxruntime_gives_the_same_text(tmp_path: Path):
    import onnxruntime

    model = random_model(VARIED["nano-flex2"], seed=4, dtype=torch.float32)
    checkpoint = write_checkpoint(tmp_path / "model", model, text=TEXT)
    build_store(checkpoint, tmp_path / "tol")
    export_onnx(checkpoint, tmp_path / "graph")
    session = onnxruntime.InferenceSession(tmp_path / "graph" / "model.onnx")
    config = model.config
    for batch, lengths in ((1, (5,)), (3, (4, 1, 6))):
        ids = torch.randint(config.vocab_size, (batch, sum(lengths)), generator=torch.Generator().manual_seed(0))
        rows = model.compute_rows(ids.flatten()).unflatten(0, ids.shape).detach()
        past = torch.zeros(config.num_layers, 2, batch, config.num_kv_heads, 0, config.head_size).numpy()
        logits, start = [], 0
        for length in lengths:
            here = slice(start, start + length)
            inputs = {"token_ids": ids[:, here].numpy(), "rows": rows[:, here].numpy(), "past": past}
            found, past = session.run(None, inputs)
            logits.append(torch.from_numpy(found))
            start += length
        torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).detach(), rtol=1e-4, atol=1e-4)

    script = REPOSITORY / "examples" / "onnx_generate.py"
    command = [sys.executable, script, tmp_path / "graph", tmp_path / "tol", "the memory"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    table = whole_table(ToLStore.open(tmp_path / "tol")).float()
    tokenizer = checkpoint.tokenizer()
    prompt = [tokenizer.boundary_id, *tokenizer.encode("the memory")]

    def looked_up(ids: torch.Tensor) -> MemoryRows:
        return MemoryRows(table, ids)

    expected = list(generate(model, prompt, row_source=looked_up, max_new_tokens=24))
    assert said.rstrip("\n") == tokenizer.decode([*prompt, *expected]).rstrip("\n")
    assert len({token for token in expected if token < 300}) > 5


def test_what_cannot_be_exported(tmp_path: Path):
    checkpoint = write_checkpoint(tmp_path / "model", random_model(VARIED["nano-base"]))
    with pytest.raises(ValueError, match="a dense model: it has no rows"):
        export_onnx(checkpoint, tmp_path / "graph")
    assert not (tmp_path / "graph").exists()
