"""Plans fit their budget to the byte, put rows as near as they fit, and say what would make a refused one fit."""

import dataclasses

import pytest
import torch

from flexmemory.engine.int8 import quantize
from flexmemory.engine.placement import Budget, CodedFacts, StoreFacts, format_size, parse_size, place, weight_bytes
from flexmemory.model.accounting import count_parameters, kv_cache_bytes
from flexmemory.presets import get_preset
from tests.conftest import VARIED, random_model

CONFIG = get_preset("1b-memory").model
BF16 = torch.bfloat16
ROW = 2 * 25 * 2048
COUNTS = torch.arange(CONFIG.vocab_size, 0, -1)
STORE = StoreFacts(
    row_bytes=ROW, disk_bytes=CONFIG.vocab_size * ROW, vocab_size=CONFIG.vocab_size, embedding=True, counts=COUNTS
)
GB = 10**9


def planned(device=140 * GB, host: int | None = 100 * GB, **options):
    return place(CONFIG, budget=Budget(device=device, host=host), **({"dtype": BF16, "store": STORE} | options))


@pytest.mark.parametrize("name", VARIED)
@pytest.mark.parametrize("int8", [None, "head", "all"])
def test_weight_bytes_are_those_of_the_model(name, int8):
    config = VARIED[name]
    model = random_model(config, dtype=BF16)
    model.drop_memory()
    if int8:
        quantize(model, int8)
    tensors = [*model.parameters(), *model.buffers()]
    assert sum(weight_bytes(config, dtype=BF16, int8=int8, memory=False, embedding=True)) == sum(
        tensor.nbytes for tensor in tensors
    )


def test_rows_go_as_near_as_they_fit():
    assert planned().rows == "device"
    assert planned(device=10 * GB).rows == "host"
    assert planned(device=10 * GB, host=2 * GB).rows == "disk"
    for plan in (planned(), planned(device=10 * GB), planned(device=10 * GB, host=2 * GB)):
        assert plan.used("device") <= plan.budget.device
        assert plan.used("host") <= (plan.budget.host or 0)
    assert planned().hot_rows == 0


def test_rows_in_few_bits_fit_where_numbers_do_not_and_hot_rows_are_numbers():
    coded = CodedFacts(row_bytes=ROW // 12, table_bytes=CONFIG.vocab_size * (ROW // 14), decoder_bytes=80_000_000)
    few = dataclasses.replace(STORE, coded=coded, disk_bytes=coded.table_bytes)
    assert planned(device=4 * GB, host=GB).rows == "disk"
    plan = planned(device=4 * GB, host=GB, store=few)
    sizes = {item.name: item.nbytes for item in plan.items}
    assert (plan.rows, sizes["rows"], sizes["decoder"]) == ("device", coded.table_bytes, 80_000_000)
    assert sizes["workspace"] == next(i.nbytes for i in planned().items if i.name == "workspace") + 2048 * (ROW // 12)
    hot = planned(device=3 * GB, host=GB, store=few, rows="host")
    assert next(item.nbytes for item in hot.items if item.name == "hot rows") == hot.hot_rows * ROW + 4 * len(COUNTS)
    staged = planned(device=3 * GB, host=GB, store=few, rows="disk")
    assert next(item.nbytes for item in staged.items if item.name == "staging") == 2 * 2048 * (ROW // 12)
    assert plan.used("device") <= 4 * GB


def test_the_choice_of_a_place_is_respected_or_refused():
    for where in ("device", "host", "disk"):
        assert planned(rows=where).rows == where
    with pytest.raises(ValueError, match=r"device takes 13\.13 GB of .* another place for rows"):
        planned(device=10 * GB, rows="device")
    with pytest.raises(ValueError, match=r"host takes 13\.13 GB of 1\.00 GB"):
        planned(host=GB, rows="host")
    with pytest.raises(ValueError, match=r"device takes .*, host takes .*, disk takes .*; give more host memory"):
        planned(device=10 * GB, host=0)
    with pytest.raises(ValueError, match="rows on disk need a ToL store"):
        planned(store=None, rows="disk")


def test_hot_rows_fill_the_device_to_the_last_row():
    plan = planned(device=3 * GB, rows="host")
    assert plan.hot_rows > 0
    assert plan.budget.device - ROW < plan.used("device") <= plan.budget.device
    assert plan.hot_share == pytest.approx(float(COUNTS[: plan.hot_rows].sum()) / float(COUNTS.sum()))


def test_tokens_that_never_occur_are_not_hot():
    seen = dataclasses.replace(STORE, counts=(torch.arange(CONFIG.vocab_size) < 100).long())
    plan = planned(rows="host", store=seen)
    assert (plan.hot_rows, plan.hot_share) == (100, 1.0)
    unknown = planned(rows="host", store=dataclasses.replace(STORE, counts=None))
    assert (unknown.hot_rows, unknown.hot_share) == (CONFIG.vocab_size, None)


def test_every_part_is_counted():
    plan = planned(sequences=3, length=100, store=dataclasses.replace(STORE, embedding=False))
    sizes = {item.name: item.nbytes for item in plan.items}
    counts = count_parameters(CONFIG)
    assert sizes["weights"] == 2 * (counts.active + counts.head)
    assert sizes["embedding"] == 2 * counts.embedding
    assert sizes["KV cache"] == 3 * kv_cache_bytes(CONFIG, context=100, bytes_per_number=2)
    assert sizes["rows"] == CONFIG.vocab_size * ROW
    assert "embedding" not in {item.name for item in planned().items}
    computed = planned(store=None)
    assert computed.rows is None
    assert sum(item.nbytes for item in computed.items if item.name in ("weights", "embedding")) == 2 * counts.total


def test_what_cannot_fit_is_refused_with_what_would_make_it_fit():
    with pytest.raises(ValueError, match="too small") as refusal:
        planned(device=GB, store=None)
    text = str(refusal.value)
    needed = planned(store=None).used("device")
    assert f"make {format_size(needed)}" in text
    assert all(word in text for word in ("weights", "KV cache", "int8 weights (saves", "a ToL store (saves"))
    assert planned(device=needed, store=None).used("device") == needed
    with pytest.raises(ValueError, match="too small"):
        planned(device=needed - 1, store=None)


def test_on_a_cpu_there_is_one_memory_and_rows_stay_on_disk():
    plan = planned(host=None)
    assert (plan.rows, plan.hot_rows, plan.used("host")) == ("disk", 0, 0)
    assert planned(host=None, rows="host").used("device") == planned(host=None, rows="device").used("device")
    with pytest.raises(ValueError, match="no room for rows"):
        planned(device=5 * GB, host=None, rows="host")


def test_the_table_names_every_part_and_the_totals():
    plan = planned(device=3 * GB, rows="host")
    lines = plan.table().splitlines()
    assert [line.split("  ")[0] for line in lines[:-2]] == [item.name for item in plan.items]
    assert lines[-2].split() == ["total", "device", "3.00", "GB", "of", "3.00", "GB"]
    assert f"{plan.hot_rows:,} rows, {plan.hot_share:.1%} of tokens" in plan.table()
    assert len({line.index("B", 20) for line in lines}) == 1


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("0", 0), ("123", 123), ("800MB", 800_000_000), ("2GiB", 2**31), ("1.5 gb", 1_500_000_000), ("4KiB", 4096)],
)
def test_sizes(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1", "2 gigs", "1e9", "2GBs"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError, match="is no size; expected"):
        parse_size(text)
