"""The bench: previews are exact, what is applied answers, what is taken back leaves no trace."""

import base64

import pytest
import torch

from flexmemory.interpret.apply import apply_to_checkpoint
from flexmemory.interpret.kept import row_lengths
from flexmemory.interpret.patch import Patch, stack
from flexmemory.interpret.tkv import TokenMemory
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.serve.editing import MAX_PATCH_BYTES, Bench
from flexmemory.serve.fields import Fields
from flexmemory.serve.live import LiveModel
from tests.serve.conftest import rows_of

STEPS = {
    "scale_row": {"token": 300, "layer": 1, "factor": 0},
    "copy_row": {"token": 300, "other": 301, "layer": -1},
    "swap_rows": {"token": 300, "other": 301},
    "steer_row": {"token": 300, "other": 280, "layer": 2, "strength": 3},
    "rank_one": {"token": 300, "other": 280, "layer": 1, "strength": 1},
    "scale_value": {"layer": 0, "key": 5, "factor": 2},
    "scale_key": {"layer": 0, "key": 5, "factor": -1},
    "scale_key_for": {"layer": 0, "key": 5, "token": 300, "factor": 0},
    "suppress": {"tokens": [280, 281], "strength": 1, "count": 4},
}
ALONE = {"scale_row", "copy_row", "swap_rows", "steer_row", "scale_key_for"}
"""What changes named tokens' rows alone."""


@pytest.mark.parametrize("op", STEPS)
def test_a_preview_is_what_applying_does(bench, op):
    step = {"op": op, **STEPS[op]}
    before = rows_of(bench.live.model)
    text = "the red dog"
    found = bench.post("/api/edit/preview", steps=[step], text=text)
    continued = bench.post("/api/edit/continued", steps=[step], text=text, max_new_tokens=4)["continued"]
    assert continued[0] == bench.post("/api/generate", text=text, max_new_tokens=4)["text"]
    assert torch.equal(rows_of(bench.live.model), before), "a preview changes nothing"
    bench.post("/api/edit/apply", steps=[step])
    moved = (rows_of(bench.live.model) - before).norm(dim=2)  # (V, L)
    named = found["tokens"]
    others = [token for token in range(512) if token not in named]
    assert (found["others"] == 0) == (op in ALONE) == (not (moved[others] > 0).any())
    assert found["rows_only"] == (op in ALONE)
    for token, layer, size, length in found["about"]:
        assert size == pytest.approx(float(moved[token, layer]), rel=2e-3, abs=1e-4)
        assert length == pytest.approx(float(before[token, layer].norm()), rel=1e-3)
    for token, layer, size in found["worst"][:5]:
        assert size == pytest.approx(float(moved[token, layer]), rel=2e-3, abs=1e-4)
    now = bench.post("/api/prompt", text=text)["next"]
    assert now[0][0] == max(found["next"], key=lambda entry: entry[2])[0]
    assert bench.post("/api/generate", text=text, max_new_tokens=4)["text"] == continued[1]


def test_steering_raises_the_logit_and_copying_copies(bench):
    rows = rows_of(bench.live.model)
    bench.post("/api/edit/apply", steps=[{"op": "copy_row", **STEPS["copy_row"]}])
    torch.testing.assert_close(rows_of(bench.live.model)[300], rows[301])
    before = bench.live.memory.project(rows_of(bench.live.model)[300, 2])
    bench.post("/api/edit/apply", steps=[{"op": "steer_row", **STEPS["steer_row"]}])
    after = bench.live.memory.project(rows_of(bench.live.model)[300, 2])
    assert after[280] - after.mean() > before[280] - before.mean()


def test_taking_back_leaves_no_trace(bench):
    before = bench.post("/api/prompt", text="the red dog and")
    token = bench.get("/api/row/300")
    for op in ("scale_value", "steer_row"):
        bench.post("/api/edit/apply", steps=[{"op": op, **STEPS[op]}])
    assert bench.get("/api/row/300") != token, "rows on the vocabulary are the edited model's"
    assert bench.post("/api/prompt", text="the red dog and") != before
    assert len(bench.post("/api/edit/revert", count=1)["applied"]) == 1
    assert bench.post("/api/edit/revert", count=1)["applied"] == []
    assert bench.post("/api/prompt", text="the red dog and") == before
    assert bench.get("/api/row/300") == token


def test_a_saved_patch_makes_the_model_that_answered(bench, tmp_path):
    for op in ("scale_value", "steer_row"):
        bench.post("/api/edit/apply", steps=[{"op": op, **STEPS[op]}])
    response = bench.client.post("/api/edit/patch", json={})
    assert response.headers["content-type"] == "application/octet-stream"
    (tmp_path / "p.safetensors").write_bytes(response.content)
    patch = Patch.load(tmp_path / "p.safetensors")
    assert patch.base == bench.checkpoint.fingerprint
    edited = patch.apply(bench.checkpoint.load())
    assert torch.equal(rows_of(edited), rows_of(bench.live.model))


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ({}, "lacks 'op'"),
        ({"op": "drop tables"}, "there is no edit"),
        ({"op": "scale_row", "token": 512, "factor": 0}, "out of range"),
        ({"op": "scale_row", "token": 10**30, "factor": 0}, "whole number"),
        ({"op": "suppress", "tokens": [10**30]}, "whole numbers"),
        ({"op": "scale_row", "token": 5, "layer": 9, "factor": 0}, "out of range"),
        ({"op": "scale_row", "token": 5, "factor": "0"}, "finite number"),
        ({"op": "scale_value", "layer": 0, "key": 128, "factor": 0}, "out of range"),
        ({"op": "swap_rows", "token": 5, "other": 5}, "itself"),
        ({"op": "suppress", "tokens": []}, "expected 1 to 64 token ids"),
        ({"op": "suppress", "tokens": list(range(65))}, "expected 1 to 64 token ids"),
        ({"op": "suppress", "tokens": [1], "count": 10**9}, "count should be"),
        ({"op": "suppress", "tokens": [1], "level": "all"}, "values or rows"),
        ({"op": "suppress", "tokens": [1], "strength": 2}, "strength"),
    ],
)
def test_edits_that_are_refused(bench, step, reason):
    for verb in ("preview", "apply"):
        assert reason in bench.refused(f"/api/edit/{verb}", steps=[step])
    assert bench.get("/api/state")["applied"] == []


def test_counts_of_steps_are_bounded(bench):
    step = {"op": "scale_row", **STEPS["scale_row"]}
    assert "1 to 16 steps" in bench.refused("/api/edit/preview", steps=[])
    assert "1 to 16 steps" in bench.refused("/api/edit/preview", steps=[step] * 17)
    assert "list of objects" in bench.refused("/api/edit/preview", steps="all")
    assert "no patch" in bench.refused("/api/edit/patch")
    assert "count" in bench.refused("/api/edit/revert", count=0)


def test_lengths_come_from_an_index_of_this_model(explored):
    """Means to four digits; edited tokens' own lengths exactly (above). What is of another model is computed."""
    live, records = explored.live, explored.records
    exact = rows_of(live.model).norm(dim=2)  # (V, L)
    step = {"op": "scale_row", "token": 300, "layer": -1, "factor": 0}
    found = explored.post("/api/edit/preview", steps=[step])["layers"]
    assert [each["row_length"] for each in found] == pytest.approx(exact.mean(0).tolist(), rel=1e-4)
    stored = torch.tensor(records.index.array("row_norms")[:, 1].astype("float64"))
    assert found[1]["row_length"] == pytest.approx(float(stored.mean()), rel=1e-12)
    other = LiveModel(Checkpoint.open(explored.other), records)  # an index of another model
    lengths = row_lengths(other.memory, layer=1, kept=other.kept)
    torch.testing.assert_close(lengths.float(), rows_of(other.model)[:, 1].norm(dim=1))


def test_after_an_edit_a_preview_is_of_the_edited_model(bench):
    for op in ("rank_one", "scale_value", "scale_row"):
        step = {"op": op, **STEPS[op]}
        bench.post("/api/edit/preview", steps=[step])
        bench.post("/api/edit/apply", steps=[step])
        again = bench.post("/api/edit/preview", steps=[{**step, "factor": 3, "strength": 2}])
        before = rows_of(bench.live.model)
        bench.post("/api/edit/apply", steps=[{**step, "factor": 3, "strength": 2}])
        moved = (rows_of(bench.live.model) - before).norm(dim=2)
        (layer,) = again["layers"]
        assert layer["row_length"] == pytest.approx(float(before[:, layer["layer"]].norm(dim=1).mean()), rel=1e-3)
        for token, at, size in again["worst"][:5]:
            assert size == pytest.approx(float(moved[token, at]), rel=2e-3, abs=1e-4)
        bench.post("/api/edit/revert", count=1)


def in_base64(path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def test_a_patch_file_is_tried_applied_and_taken_back(bench):
    sent = {"file": in_base64(bench.patch), "name": "doubled.safetensors"}
    found = bench.post("/api/edit/preview", **sent, text="the red dog")
    assert found == bench.post("/api/edit/preview", patch="doubled.safetensors", text="the red dog")
    assert found["what"] == ["set rows of tokens 262 in layer 1", "set one of the values, 5 of layer 0"]
    assert [entry["layer"] for entry in found["layers"]] == [0, 1]
    assert found["tokens"] == [262]
    assert found["others"] > 0
    before = rows_of(bench.live.model)
    bench.post("/api/edit/apply", **sent)
    expected = Patch.load(bench.patch).apply(bench.checkpoint.load())
    assert torch.equal(rows_of(bench.live.model), rows_of(expected))
    moved = (rows_of(expected) - before).norm(dim=2)
    for token, layer, size in found["worst"][:5]:
        assert size == pytest.approx(float(moved[token, layer]), rel=2e-3, abs=1e-4)
    bench.post("/api/edit/apply", steps=[{"op": "scale_row", **STEPS["scale_row"]}])
    bench.post("/api/edit/revert", count=2)
    assert torch.equal(rows_of(bench.live.model), before)


def test_patches_that_do_not_fit_are_refused_with_the_reason(bench, tmp_path):
    other = Checkpoint.open(bench.other)
    for name, checkpoint in (("foreign", other), ("nobody's", None)):
        with TokenMemory(other.load()).edit(checkpoint) as edit:
            edit.scale_row(5, layer=0, factor=0.0)
        edit.patch.save(tmp_path / name)
    whole = bench.patch.read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-10])
    (tmp_path / "large").write_bytes(bytes(MAX_PATCH_BYTES + 1))
    for name, reason in {
        "foreign": f"was made for checkpoint {other.fingerprint[:12]}, not for that of model",
        "nobody's": "a model that was in memory only",
        "cut": "cut cannot be read as a patch",
        "large": f"at most {MAX_PATCH_BYTES}",
    }.items():
        for verb in ("preview", "apply", "continued"):
            file = in_base64(tmp_path / name)
            assert reason in bench.refused(f"/api/edit/{verb}", file=file, name=name, text=""), name
    assert "not in base64" in bench.refused("/api/edit/preview", file="...")
    assert "no patch called 'elsewhere'" in bench.refused("/api/edit/preview", patch="elsewhere")
    assert bench.get("/api/state")["applied"] == []


def test_a_patch_for_the_model_before_edits_fits_too(explored, tmp_path):
    edited = apply_to_checkpoint(explored.checkpoint, [Patch.load(explored.patch)], tmp_path / "edited")
    bench = Bench(LiveModel(edited, explored.records), explored.records, edited, patches={})
    bench.apply(Fields({"steps": [{"op": "scale_row", **STEPS["scale_row"]}]}))
    bench.apply(Fields({"file": in_base64(explored.patch)}))
    assert stack(bench.applied).base == edited.fingerprint
