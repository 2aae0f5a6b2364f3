"""The bench: previews are exact, what is applied answers, what is taken back leaves no trace."""

import pytest
import torch
from safetensors.torch import save_file

from flexmemory.interpret.edit import Editor
from flexmemory.interpret.kept import row_lengths
from flexmemory.interpret.patch import Patch
from flexmemory.interpret.tkv import TokenMemory
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.serve.comparing import comparable
from flexmemory.serve.live import LiveModel

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


@pytest.fixture
def bench(explored):
    yield explored
    while explored.get("/api/state")["applied"]:
        explored.post("/api/edit/revert")


def rows_of(model):
    return model.compute_rows(torch.arange(512)).detach()


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
    assert bench.get("/api/state")["comparable"] == ["other"]
    bench.post("/api/edit/apply", steps=[{"op": "scale_row", "token": 262, "layer": 1, "factor": 2}])
    name = bench.get("/api/state")["comparable"][-1]
    found = bench.post("/api/diff", **{"with": name})
    assert [token for token, _, _ in found["tokens"]] == [262]
    assert [layer["different"] for layer in found["layers"]] == [0, 1, 0]
    assert found["tokens"][0][1] == pytest.approx(1, rel=1e-3)
    assert "nothing called" in bench.refused("/api/diff", **{"with": "elsewhere"})


def test_a_patch_can_be_compared_and_a_foreign_one_not(explored, tmp_path):
    editor = Editor(explored.live.memory, explored.checkpoint)
    editor.scale_row(5, layer=0, factor=0.0)
    editor.patch.save(tmp_path / "ours")
    found = comparable(tmp_path / "ours", explored.checkpoint)
    assert isinstance(found, Patch)
    assert found.fingerprint == editor.patch.fingerprint
    with pytest.raises(ValueError, match="was made for"):
        comparable(tmp_path / "ours", Checkpoint.open(explored.other))
    save_file({"x": torch.zeros(1)}, tmp_path / "none")
    with pytest.raises(ValueError, match="not a patch"):
        comparable(tmp_path / "none", explored.checkpoint)


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
