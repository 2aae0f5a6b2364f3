"""Records say what the model says, slowly asked."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from flexmemory.interpret.tkv import TokenMemory
from flexmemory.serve.records import rounded
from tests.serve.conftest import close


@pytest.fixture(scope="module")
def memory(explored):
    return TokenMemory(explored.checkpoint.load())


def test_a_token(explored, memory):
    record = explored.get("/api/token/300")
    assert record["id"] == 300
    for layer in range(3):
        row = memory.rows(torch.tensor([300]), layer=layer)[0]
        assert close(record["norms"][layer], float(row.norm()))
        cells = memory.top_keys(300, layer=layer)
        assert [key for key, _, _ in record["keys"][layer]] == [cell.key for cell in cells]
        for (_, c, weight), cell in zip(record["keys"][layer], cells, strict=True):
            assert close(c, cell.coefficient)
            assert close(weight, cell.weight)
    assert set(record["clusters"]) == {"0", "2"}


def test_nearest_tokens(explored, memory):
    mask = torch.tensor(explored.records.index.tokens["kept"])
    record = explored.get("/api/token/260")
    assert [t for t, _ in record["near"]] == [t for t, _ in memory.nearest_tokens(260, count=8, mask=mask)]
    embeddings = F.normalize(memory.model.embed(torch.arange(512)).detach(), dim=1)
    cosines = (embeddings @ embeddings[260]).masked_fill(~mask, -2)
    cosines[260] = -2
    assert [t for t, _ in record["near_embedding"]] == cosines.topk(8).indices.tolist()


def test_a_key(explored, memory):
    mask = torch.tensor(explored.records.index.tokens["kept"])
    record = explored.get("/api/key/1/17")
    column = memory.column(layer=1, key=17)[mask]
    assert [t for t, _ in record["positive"]] == [t for t, _ in memory.top_tokens(layer=1, key=17, mask=mask)]
    assert [t for t, _ in record["negative"]] == [t for t, _ in memory.top_tokens(layer=1, key=17, sign=-1, mask=mask)]
    value = memory.values(1)[17]
    for name, sign in (("promoted", 1), ("suppressed", -1)):
        assert [t for t, _ in record[name]] == [t for t, _ in memory.promoted(value, sign=sign, mask=mask)]
    assert sum(record["histogram"]) == len(column)
    assert close(record["edges"][0], float(column.min()))
    assert close(record["edges"][1], float(column.max()))
    names = explored.get("/api/meta.json")["statistics"]
    assert close(record["statistics"][names.index("mean")], float(column.mean()))
    assert close(record["statistics"][names.index("value_norm")], float(value.norm()))


def test_layers_are_over_tokens_that_the_mask_keeps(explored, memory):
    mask = torch.tensor(explored.records.index.tokens["kept"])
    found = explored.get("/api/layers.json")
    norms = memory.rows(torch.arange(512), layer=2).norm(dim=1)
    here = found["layers"][2]
    assert close(here["norms"][found["quantiles"].index(100)], float(norms[mask].max()))
    assert close(here["norms"][found["quantiles"].index(50)], float(norms[mask].quantile(0.5)), relative=5e-3)
    assert here["longest"][0][0] == int(norms.where(mask, 0).argmax())
    largest = memory.coefficients(torch.arange(512), layer=2)[mask].abs().amax(0)
    assert here["extreme"][0][0] == int(largest.argmax())


def test_tokens_say_what_the_mask_keeps(explored):
    meta, tokens = explored.get("/api/meta.json"), explored.get("/api/tokens.json")
    assert tokens["kept"].count("1") == meta["mask"]["tokens"]
    assert 0 < meta["mask"]["tokens"] < meta["vocab_size"] == len(tokens["shown"]) == len(tokens["kind"])
    table = explored.records.index.tokens
    assert [tokens["kinds"][kind] for kind in tokens["kind"]] == table["kind"]


def test_arrays_are_the_index_in_bytes(explored):
    index = explored.records.index

    def read(path, dtype):
        return np.frombuffer(explored.client.get(f"/api/{path}.bin").content, dtype)

    np.testing.assert_array_equal(read("map/layer0", "<u2"), index.array("map_layer0").ravel())
    np.testing.assert_array_equal(read("labels/2", "<u2"), index.array("cluster_labels")[1])
    np.testing.assert_array_equal(read("norms/1", "<f4"), index.array("row_norms")[:, 1].astype("<f4"))
    np.testing.assert_array_equal(read("keys/1", "<f4"), index.array("key_stats")[1].ravel())


@pytest.mark.parametrize(
    "path",
    ["token/512", "token/99999999999999999999", "key/3/0", "key/0/128", "row/512", "similar/0/128", "map/none.bin",
     "labels/1.bin", "norms/x.bin", "none.json", "map/..%2f..%2fmanifest.bin", "token/-1"],
)  # fmt: skip
def test_what_does_not_exist_is_404_with_a_reason(explored, path):
    response = explored.client.get(f"/api/{path}")
    assert response.status_code == 404
    assert response.json()["error"]


def test_numbers_are_short_and_what_is_not_finite_is_null():
    assert rounded(np.array([[1.23456, np.nan], [np.inf, -1e-9]])) == [[1.235, None], [None, -1e-9]]
