"""An export says what the server says."""

import dataclasses
import json

import pytest

from flexmemory.presets import PRESETS
from flexmemory.serve.export import LIMITS, SHARD, check_size, write_export
from tests.conftest import NANO


@pytest.fixture(scope="module")
def exported(explored, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "out"
    count = write_export(explored.records, explored.live, out, name="nano")
    assert count == sum(path.is_file() for path in out.rglob("*"))
    return out


def test_records_are_the_servers(explored, exported):
    for kind, last, parts in (
        ("token", 300, ()),
        ("row", 511, ()),
        ("key", explored.records.index.num_keys - 1, (1,)),
        ("similar", 0, (2,)),
    ):
        path = "/".join([kind, *map(str, parts)])
        shard = json.loads((exported / "api" / path / f"{last // SHARD}.json").read_text())
        ours, served = shard[last % SHARD], explored.get(f"/api/{path}/{last}")
        if kind == "row":  # computed with others
            for layer, expected in zip(ours.pop("layers"), served.pop("layers"), strict=True):
                for side, tokens in expected.items():
                    assert [token for token, _ in layer[side]] == [token for token, _ in tokens]
                    assert [x for _, x in layer[side]] == pytest.approx([x for _, x in tokens], rel=2e-3)
        assert ours == served
    for name in ("tokens", "layers", "clusters"):
        assert json.loads((exported / "api" / f"{name}.json").read_text()) == explored.get(f"/api/{name}.json")
    meta = json.loads((exported / "api/meta.json").read_text())
    assert meta == explored.get("/api/meta.json") | {"live": False, "shard": SHARD}
    for name in ("map/layer0", "map/embedding", "labels/2", "norms/1", "keys/0"):
        content = explored.client.get(f"/api/{name}.bin").content
        assert (exported / f"api/{name}.bin").read_bytes() == content
    assert (exported / "index.html").read_bytes() == explored.client.get("/").content


def test_an_existing_folder_is_left_alone(explored, exported):
    before = sorted(exported.rglob("*"))
    with pytest.raises(FileExistsError):
        write_export(explored.records, explored.live, exported, name="nano")
    assert sorted(exported.rglob("*")) == before


def test_a_failure_leaves_nothing(explored, tmp_path, monkeypatch):
    monkeypatch.setattr(explored.records, "key", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_export(explored.records, explored.live, tmp_path / "out", name="nano")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("field", LIMITS)
def test_large_models_are_refused(field):
    check_size(NANO["nano-memory"])
    large = dataclasses.replace(NANO["nano-memory"], **{field: LIMITS[field] + 1})
    with pytest.raises(ValueError, match=field):
        check_size(large)
    with pytest.raises(ValueError, match="small models"):
        check_size(PRESETS["1b-memory"].model)
