"""Diff: what two memories differ by is what their rows differ by."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flexmemory.interpret.patch import Patch
from flexmemory.interpret.tkv import TokenMemory
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.serve.comparing import all_comparable, comparable
from flexmemory.tol.build import build_store
from flexmemory.tol.disk import DiskRows
from flexmemory.tol.store import ToLStore
from tests.conftest import NANO, random_model
from tests.serve.conftest import TEXT, rows_of
from tests.tol.conftest import write_checkpoint


def sizes(explored, name: str, layer: int = -1) -> torch.Tensor:
    response = explored.client.post("/api/diff/sizes", json={"with": name, "layer": layer})
    assert response.status_code == 200, response.text
    return torch.tensor(np.frombuffer(response.content, dtype="<f4"))


def test_diff_with_another_checkpoint(explored):
    here, there = rows_of(explored.checkpoint.load()), rows_of(Checkpoint.open(explored.other).load())
    mask = torch.tensor(explored.records.index.tokens["kept"])
    found = explored.post("/api/diff", **{"with": "other"})
    moved, length = (there - here).norm(dim=2), here.norm(dim=2)
    for place, layer in enumerate(found["layers"]):
        expected = (moved[:, place].square().sum() / length[:, place].square().sum()).sqrt()
        assert layer["relative"] == pytest.approx(float(expected), rel=1e-3)
        assert layer["different"] == int(mask.sum())
    share = (moved / length).amax(1).where(mask, 0)
    assert found["tokens"][0][0] == int(share.argmax())
    one = explored.post("/api/diff/token", **{"with": "other", "token": 300})["layers"][1]
    assert one["moved"] == pytest.approx(float(moved[300, 1]), rel=1e-3)
    assert one["lengths"] == pytest.approx([float(length[300, 1]), float(there[300, 1].norm())], rel=1e-3)
    memory = TokenMemory(explored.checkpoint.load())
    assert [t for t, _ in one["promoted"][0]] == [t for t, _ in memory.promoted(here[300, 1], count=12, mask=mask)]


def test_diff_with_the_edits_names_the_edited_token_alone(bench):
    assert bench.get("/api/state")["comparable"] == ["other", "store", "doubled.safetensors"]
    bench.post("/api/edit/apply", steps=[{"op": "scale_row", "token": 262, "layer": 1, "factor": 2}])
    name = bench.get("/api/state")["comparable"][-1]
    found = bench.post("/api/diff", **{"with": name})
    assert [token for token, _, _ in found["tokens"]] == [262]
    assert [layer["different"] for layer in found["layers"]] == [0, 1, 0]
    assert found["tokens"][0][1] == pytest.approx(1, rel=1e-3)
    assert "nothing called" in bench.refused("/api/diff", **{"with": "elsewhere"})


def test_a_patch_can_be_compared_and_a_foreign_one_not(explored, tmp_path):
    found = comparable(explored.patch, explored.checkpoint)
    assert isinstance(found, Patch)
    assert found.tokens == (262,)
    with pytest.raises(ValueError, match="was made for"):
        comparable(explored.patch, Checkpoint.open(explored.other))
    save_file({"x": torch.zeros(1)}, tmp_path / "none")
    with pytest.raises(ValueError, match="not a patch"):
        comparable(tmp_path / "none", explored.checkpoint)


def test_diff_with_a_store_is_what_its_codec_took_off(explored):
    store = ToLStore.open(explored.store)
    table = torch.empty(512, store.num_slices, store.hidden_size, dtype=store.decoded_dtype)
    DiskRows(store).gather(torch.arange(512), table)
    ours = rows_of(explored.checkpoint.load())[:, list(store.layers)]
    share = (table.float() - ours).norm(dim=2) / ours.norm(dim=2)
    found = explored.post("/api/diff", **{"with": "store"})
    assert [entry["layer"] for entry in found["layers"]] == [0, 2]
    mask = torch.tensor(explored.records.index.tokens["kept"])
    for entry, place in zip(found["layers"], (0, 1), strict=True):
        assert entry["largest"] == pytest.approx(float(share[mask, place].max()), rel=1e-3)
        assert entry["largest"] < 2**-8
    one = explored.post("/api/diff/token", **{"with": "store", "token": 300})["layers"]
    assert [entry["layer"] for entry in one] == [0, 2]
    assert one[1]["lengths"][1] == pytest.approx(float(table[300, 1].float().norm()), rel=1e-3)
    assert "layer 1 is not compared" in explored.refused("/api/diff/sizes", **{"with": "store", "layer": 1})


def test_sizes_are_what_the_overview_tells(explored):
    mask = torch.tensor(explored.records.index.tokens["kept"])
    for name in ("other", "store", "doubled.safetensors"):
        found, every = explored.post("/api/diff", **{"with": name}), sizes(explored, name)
        assert not every[~mask].any()
        assert int((every > 0).sum()) == found["changed"]
        for token, size, layer in found["tokens"][:20]:
            assert float(every[token]) == pytest.approx(size, rel=1e-3)
            assert float(sizes(explored, name, layer)[token]) == pytest.approx(size, rel=1e-3)
    assert "nothing called" in explored.refused("/api/diff/sizes", **{"with": "elsewhere"})


def test_diff_with_a_patch_or_with_edits_is_what_they_move(bench):
    base = rows_of(bench.live.model)
    edited = rows_of(Patch.load(bench.patch).apply(bench.live.model))
    share = (edited - base).norm(dim=2) / base.norm(dim=2)
    mask = torch.tensor(bench.records.index.tokens["kept"])
    expected = share.amax(1).where(mask, 0)
    bench.post("/api/edit/apply", patch="doubled.safetensors")
    for name in ("doubled.safetensors", "edits applied here"):
        torch.testing.assert_close(sizes(bench, name), expected, rtol=1e-3, atol=1e-6)
        layers = bench.post("/api/diff", **{"with": name})["layers"]
        assert [entry["different"] for entry in layers] == [int(mask.sum()), int(mask[262]), 0]
        relative = (edited - base).square().sum((0, 2)).sqrt() / base.square().sum((0, 2)).sqrt()
        assert [entry["relative"] for entry in layers] == pytest.approx(relative.tolist(), rel=1e-3)
    bench.post("/api/edit/apply", steps=[{"op": "scale_row", "token": 262, "layer": 2, "factor": 4}])
    assert float(sizes(bench, "edits applied here", 2)[262]) == pytest.approx(3, rel=1e-3), "as edits change"


def test_what_cannot_be_compared_is_refused(explored, tmp_path):
    shallow = write_checkpoint(tmp_path / "shallow", random_model(NANO["nano-base"]), text=TEXT)
    with pytest.raises(ValueError, match="must both have a memory"):
        comparable(shallow.path, explored.checkpoint)
    foreign = write_checkpoint(tmp_path / "foreign", random_model(NANO["nano-memory"]), text="other words")
    for path in (foreign.path, build_store(foreign, tmp_path / "stored").path):
        with pytest.raises(ValueError, match="another tokenizer"):
            comparable(path, explored.checkpoint)
    with pytest.raises(FileNotFoundError):
        comparable(tmp_path / "nothing", explored.checkpoint)
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "other").symlink_to(explored.other)
    with pytest.raises(ValueError, match="two things"):
        all_comparable([explored.other, tmp_path / "again" / "other"], explored.checkpoint)
