"""A loaded model gives the same logits from every source of rows, and holds only the weights it needs."""

import pytest
import torch

from flexmemory.engine import engine as engine_module
from flexmemory.engine.loading import load_model
from flexmemory.engine.reference import generate
from flexmemory.model.accounting import count_parameters
from flexmemory.model.checkpoint import Checkpoint, save_checkpoint
from flexmemory.model.memory import ScaledRows
from flexmemory.storage import atomic_folder
from flexmemory.tol.build import build_store
from flexmemory.tol.disk import DiskRows
from flexmemory.tol.hot import HotRows
from flexmemory.tol.tiers import Where
from tests.conftest import VARIED, random_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PLACES: list[Where] = ["device", "host", "disk"]


@pytest.fixture(params=["nano-memory", "grouped-query", "ffn+table"])
def checkpoint(request, tmp_path):
    with atomic_folder(tmp_path / "checkpoint") as folder:
        save_checkpoint(folder, random_model(VARIED[request.param], dtype=torch.float32), None)
    return Checkpoint.open(tmp_path / "checkpoint")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("place", PLACES)
def test_rows_from_anywhere_give_the_computed_logits(checkpoint, tmp_path, tokens, device, place):
    store = build_store(checkpoint, tmp_path / "tol", codec="fp32", device=device)
    computed = load_model(checkpoint, device=device)
    looked_up = load_model(checkpoint, tol=store.path, rows=place, device=device)
    assert looked_up.row_source is not None
    ids = tokens(3, 20).to(device)
    with torch.no_grad():
        expected = computed.model(ids)
        torch.testing.assert_close(looked_up.model(ids, looked_up.row_source(ids)), expected, rtol=1e-4, atol=1e-5)
    texts = [
        list(generate(m.model, [1, 2, 3], row_source=m.row_source, max_new_tokens=30)) for m in (computed, looked_up)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("place", PLACES)
def test_fewer_layers_of_rows_are_read(checkpoint, tmp_path, tokens, place):
    """They add nothing, as if they were scaled by 0."""
    store = build_store(checkpoint, tmp_path / "tol", codec="fp32", layers=[2, 0, 1])
    loaded = load_model(checkpoint, tol=store.path, rows=place, keep_layers=2)
    assert loaded.tier is not None
    assert loaded.tier.layers == (2, 0)
    assert loaded.row_source is not None
    whole = load_model(checkpoint)
    ids = tokens(2, 20)
    with torch.no_grad():
        expected = whole.model(ids, ScaledRows(whole.model.rows(ids), [1.0, 0.0, 1.0]))
        torch.testing.assert_close(loaded.model(ids, loaded.row_source(ids)), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="give a ToL store"):
        load_model(checkpoint, keep_layers=2)


@pytest.mark.parametrize("device", DEVICES)
def test_bf16_decoding_stays_near_fp32(checkpoint, tmp_path, tokens, device):
    store = build_store(checkpoint, tmp_path / "tol", device=device)
    exact = load_model(checkpoint)
    rough = load_model(checkpoint, tol=store.path, rows="host", device=device, dtype=torch.bfloat16)
    assert rough.row_source is not None
    ids = tokens(2, 30)
    with torch.no_grad():
        expected = exact.model(ids)
        logits = rough.model(ids.to(device), rough.row_source(ids.to(device))).float().cpu()
    assert (logits - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("place", PLACES)
def test_rows_in_few_bits_are_near_the_computed(checkpoint, tmp_path, tokens, device, place):
    store = build_store(checkpoint, tmp_path / "tol", codec="int8", device=device)
    exact = load_model(checkpoint)
    coded = load_model(checkpoint, tol=store.path, rows=place, device=device)
    assert coded.row_source is not None
    ids = tokens(2, 30)
    with torch.no_grad():
        expected = exact.model(ids)
        logits = coded.model(ids.to(device), coded.row_source(ids.to(device))).cpu()
    assert (logits - expected).norm() < 0.02 * expected.norm()
    config = checkpoint.config
    held = config.vocab_size * config.num_layers * (config.hidden_size + 1)
    assert 0 <= coded.table_bytes - (0 if place == "disk" else held) <= 3 * config.vocab_size
    engine = coded.engine(max_sequences=2)
    tokens_of = [engine.generate([prompt], max_new_tokens=12)[0] for prompt in ([1, 2, 3], [4])]
    assert engine.generate([[1, 2, 3], [4]], max_new_tokens=12) == tokens_of


def test_a_budget_counts_rows_in_few_bits_as_they_are(checkpoint, tmp_path):
    store = build_store(checkpoint, tmp_path / "tol", codec="int4", counts=torch.arange(checkpoint.config.vocab_size))
    loaded = load_model(checkpoint, tol=store.path, rows="host", memory_budget=10**9)
    assert loaded.placement is not None
    assert loaded.placement.store is not None
    sizes = {item.name: item.nbytes for item in loaded.placement.items}
    assert sizes["rows"] == loaded.table_bytes < store.vocab_size * loaded.placement.store.row_bytes / 3
    assert 0 < sizes["decoder"] < 10**6


def test_what_is_in_memory_is_said(checkpoint, tmp_path):
    store = build_store(checkpoint, tmp_path / "tol")
    counts = count_parameters(checkpoint.config)
    computed, disk = load_model(checkpoint), load_model(checkpoint, tol=store.path)
    host = load_model(checkpoint, tol=store.path, rows="host")
    assert (computed.weight_bytes, computed.table_bytes) == (4 * counts.total, 0)
    assert (disk.weight_bytes, disk.table_bytes) == (4 * counts.resident, 0)
    assert (host.weight_bytes, host.table_bytes) == (4 * counts.resident, store.nbytes)
    assert "rows on disk" in disk.describe()
    assert "rows in host memory" in host.describe()
    assert "rows" not in computed.describe()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["nano-flex3", "untied"])
def test_embeddings_in_the_rows_are_not_loaded_twice(name, tmp_path, tokens, device, place):
    with atomic_folder(tmp_path / "checkpoint") as folder:
        save_checkpoint(folder, random_model(VARIED[name], dtype=torch.float32), None)
    checkpoint = Checkpoint.open(tmp_path / "checkpoint")
    plain = build_store(checkpoint, tmp_path / "plain", codec="fp32", device=device)
    store = build_store(checkpoint, tmp_path / "tol", codec="fp32", embedding=True, device=device)
    resident = count_parameters(checkpoint.config).resident
    embedding = checkpoint.config.vocab_size * checkpoint.config.hidden_size
    loaded = load_model(checkpoint, tol=store.path, rows=place, device=device)
    assert loaded.weight_bytes == 4 * (resident - (embedding if name == "untied" else 0))
    other = load_model(checkpoint, tol=plain.path, rows=place, device=device)
    assert other.weight_bytes == 4 * resident
    assert loaded.row_source is not None
    assert other.row_source is not None
    ids = tokens(3, 20).to(device)
    with torch.no_grad():
        assert torch.equal(loaded.model(ids, loaded.row_source(ids)), other.model(ids, other.row_source(ids)))
    texts = [list(generate(m.model, [1, 2], row_source=m.row_source, max_new_tokens=9)) for m in (loaded, other)]
    assert texts[0] == texts[1]
    assert f"{loaded.weight_bytes / 1e6:,.2f} MB of weights on {device}" in loaded.describe()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("part", ["head", "all"])
def test_int8_is_loaded_and_its_bytes_counted(checkpoint, tokens, part, device):
    exact, int8 = load_model(checkpoint, device=device), load_model(checkpoint, device=device, int8=part)
    plan = load_model(checkpoint, device=device, int8=part, memory_budget=10**9).placement
    assert plan is not None
    assert int8.weight_bytes == sum(i.nbytes for i in plan.items if i.name in ("weights", "embedding"))
    ids = tokens(1, 20).to(device)
    with torch.no_grad():
        expected = exact.model(ids)
        assert 0 < (int8.model(ids) - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("device", DEVICES)
def test_a_budget_decides_where_rows_are(checkpoint, tmp_path, tokens, monkeypatch, device, counted):
    counts = torch.arange(checkpoint.config.vocab_size) if counted else None
    store = build_store(checkpoint, tmp_path / "tol", codec="fp32", counts=counts)
    roomy = load_model(checkpoint, tol=store.path, device=device, memory_budget=10**9)
    assert roomy.placement is not None
    needed = roomy.placement.used("device") - (store.nbytes if device == "cuda" else 0)
    tight = load_model(checkpoint, tol=store.path, device=device, memory_budget=needed + 100_000, rows="disk")
    assert roomy.rows == ("disk" if device == "cpu" else "device")
    assert isinstance(tight.tier, DiskRows if device == "cpu" else HotRows)
    if isinstance(tight.tier, HotRows):
        assert tight.placement is not None
        assert len(tight.tier.hot) == (tight.placement.hot_rows if counted else 0)
        known = tight.tier.hot.ids
        monkeypatch.setattr(engine_module, "LEARN_TOKENS", 10)
        assert len(tight.engine(max_length=32).generate([[1, 2, 3]], max_new_tokens=20)[0]) == 20
        assert torch.equal(tight.tier.hot.ids, known) == counted  # learnt where it was not known
    ids = tokens(2, 20).to(device)
    expected = load_model(checkpoint, device=device).model
    for loaded in (roomy, tight):
        assert loaded.row_source is not None
        with torch.no_grad():
            logits = loaded.model(ids, loaded.row_source(ids))
            torch.testing.assert_close(logits, expected(ids), rtol=1e-4, atol=1e-5)


def test_budgets_that_cannot_be_kept_are_refused(checkpoint):
    with pytest.raises(ValueError, match="too small"):
        load_model(checkpoint, memory_budget=1000)
    with pytest.raises(ValueError, match="on a CPU there is one memory"):
        load_model(checkpoint, host_budget=10**9)
