"""An index answers as the model does, and nothing but a whole index of the right checkpoint is opened."""

import json
import shutil

import numpy as np
import pyarrow.parquet
import pytest
import torch

from flexmemory.interpret.index_format import FORMAT_VERSION, STATS
from flexmemory.interpret.reader import MemoryIndex
from flexmemory.interpret.tkv import TokenMemory
from tests.conftest import NANO, random_model
from tests.tol.conftest import flip_byte, write_checkpoint


@pytest.fixture(scope="module")
def memory(nano):
    return TokenMemory(nano.load())


@pytest.fixture
def copy(indexed, tmp_path):
    """An index of the test's own."""
    return shutil.copytree(indexed.path, tmp_path / "index")


@pytest.fixture
def mask(indexed):
    return torch.tensor(indexed.tokens["kept"])


def assert_same(stored, live):
    assert [item for item, _ in stored] == [item for item, _ in live]
    np.testing.assert_allclose([x for _, x in stored], [x for _, x in live], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_lookups_are_the_models_answers(sign, indexed, memory, mask):
    for layer, key in ((0, 0), (1, 77), (2, 127)):
        live = memory.top_tokens(layer=layer, key=key, sign=sign, mask=mask)
        assert_same(indexed.top_tokens(layer=layer, key=key, sign=sign), live)
        live = memory.promoted(memory.values(layer)[key], sign=sign, mask=mask)
        assert_same(indexed.value_tokens(layer=layer, key=key, sign=sign), live)
        stored, live = (source.top_keys(300, layer=layer) for source in (indexed, memory))
        assert [cell.name for cell in stored] == [cell.name for cell in live]
        np.testing.assert_allclose([cell.weight for cell in stored], [cell.weight for cell in live], rtol=1e-3)
        ours = [cell for cell in stored if sign * cell.coefficient > 0]
        assert indexed.top_keys(300, layer=layer, sign=sign) == ours


def test_neighbors_and_facts_are_the_models(indexed, memory, mask):
    assert_same(indexed.neighbors(5), memory.nearest_tokens(5, count=8, mask=mask))
    assert indexed.neighbors(5) != indexed.neighbors(5, embedding=True)
    facts = indexed.key(layer=1, key=9)
    column = memory.column(layer=1, key=9)[mask]
    assert facts.stats["max"] == pytest.approx(float(column.max()))
    assert facts.edges == pytest.approx((float(column.min()), float(column.max())))
    assert facts.histogram.sum() == indexed.manifest.mask.tokens
    norms = [float(memory.rows(torch.tensor([4]), layer=layer).norm()) for layer in range(3)]
    np.testing.assert_allclose(indexed.row_norms(4), norms, rtol=1e-3)
    assert [entry["layer"] for entry in indexed.layer_facts] == [0, 1, 2]
    largest = memory.coefficients(torch.arange(512), layer=2)[mask].abs().max()
    assert indexed.layer_facts[2]["largest"] == pytest.approx(float(largest))


def test_tables_can_be_queried(indexed):
    keys = pyarrow.parquet.read_table(indexed.path / "keys.parquet").to_pydict()
    assert keys["layer"] == sorted([0, 1, 2] * 128)
    assert keys["key"] == [*range(128)] * 3
    for place, name in enumerate(STATS):
        np.testing.assert_array_equal(np.array(keys[name], np.float32), indexed.array("key_stats")[..., place].ravel())
    assert set(indexed.tokens) == {
        "id", "text", "shown", "bytes", "kind", "count", "reachable", "undertrained", "kept",
    }  # fmt: skip


def test_arrays_are_mapped_and_cannot_be_written(indexed):
    array = indexed.array("row_norms")
    assert isinstance(array, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0


def test_what_is_out_of_range_is_said(indexed):
    with pytest.raises(ValueError, match="token id 512 is out of range"):
        indexed.neighbors(512)
    with pytest.raises(ValueError, match="key 128 is out of range"):
        indexed.key(layer=0, key=128)
    with pytest.raises(ValueError, match="layer 3 is not in the index, which has 0 1 2"):
        indexed.top_keys(0, layer=3)


def test_only_the_checkpoint_that_was_indexed_is_accepted(indexed, nano, tmp_path):
    assert MemoryIndex.open(indexed.path, checkpoint=nano).layers == (0, 1, 2)
    other = write_checkpoint(tmp_path / "other", random_model(NANO["nano-memory"], seed=1), text="one two two three")
    with pytest.raises(ValueError, match="is of another checkpoint"):
        MemoryIndex.open(indexed.path, checkpoint=other)
    other = write_checkpoint(tmp_path / "tokenizer", random_model(NANO["nano-memory"]), text="four")
    with pytest.raises(ValueError, match="is of another tokenizer"):
        MemoryIndex.open(indexed.path, checkpoint=other)


def edited(folder, **changes):
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_newer_and_other_formats_are_refused(copy):
    edited(copy, format_version=FORMAT_VERSION + 1)
    with pytest.raises(ValueError, match="index format 2; this version reads up to 1: update flexmemory"):
        MemoryIndex.open(copy)
    edited(copy, format="flexmemory-tol")
    with pytest.raises(ValueError, match="is not an index"):
        MemoryIndex.open(copy)
    edited(copy, format="flexmemory-index", format_version=1, surprise=1)
    with pytest.raises(ValueError, match=r"damaged .*surprise"):
        MemoryIndex.open(copy)


def test_damage_is_found(copy):
    index = MemoryIndex.open(copy)
    index.verify()
    flip_byte(copy / "key_stats.npy", 2000)
    with pytest.raises(ValueError, match=r"key_stats\.npy does not match its checksum"):
        index.verify()
    array = np.load(copy / "row_norms.npy")
    np.save(copy / "row_norms.npy", array.view(np.uint16))
    with pytest.raises(ValueError, match="holds uint16"):
        MemoryIndex.open(copy)
    np.save(copy / "row_norms.npy", array)
    flip_byte(copy / "row_norms.npy", 0)
    with pytest.raises(ValueError, match="cannot be read"):
        MemoryIndex.open(copy)
    (copy / "row_norms.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"row_norms\.npy has 0 bytes, expected"):
        MemoryIndex.open(copy)
    (copy / "tokens.parquet").unlink()
    with pytest.raises(ValueError, match=r"tokens\.parquet is missing"):
        MemoryIndex.open(copy)


def test_a_damaged_table_is_said(copy):
    path = copy / "tokens.parquet"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(ValueError, match="damaged: build the index again"):
        _ = MemoryIndex.open(copy).tokens


def test_what_is_no_index_is_said(copy, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; expected a folder written by `flexmemory index`"):
        MemoryIndex.open(tmp_path / "none")
    (copy / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no manifest\.json"):
        MemoryIndex.open(copy)
    copy.rename(tmp_path / "x.partial")
    with pytest.raises(FileNotFoundError, match=r"not whole yet, see x\.partial"):
        MemoryIndex.open(tmp_path / "x")
