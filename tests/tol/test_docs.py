"""The reader in docs/tol-format.md reads what we write."""

import re
from pathlib import Path
from typing import Any

import torch

from flexmemory.presets import get_preset
from flexmemory.tol.build import build_store
from flexmemory.tol.layout import layout
from flexmemory.tol.tiers import open_rows
from flexmemory.tol.trellis import NOISE, SPREADS
from tests.tol.conftest import SIZES

PAGE = (Path(__file__).parents[2] / "docs" / "tol-format.md").read_text(encoding="utf-8")


def test_the_documented_reader_reads_a_store(stored, nano, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(code.split("def ")[1].splitlines()) <= 15
    scope: dict[str, Any] = {}
    exec(code, scope)
    subset = build_store(nano, tmp_path / "store", codec=stored.codec, layers=[2, 0], **SIZES)
    carrying = build_store(nano, tmp_path / "carrying", codec=stored.codec, layers=[2, 0], embedding=True, **SIZES)
    for store in (stored, subset, carrying):
        ids = torch.tensor([0, 127, 128, 511])
        tier = open_rows(store, "disk", device="cpu")
        expected = torch.empty(4, store.num_slices, 48, dtype=tier.dtype)
        tier.gather(ids, expected)
        for token, rows in zip(ids.tolist(), expected, strict=True):
            read = scope["read_rows"](store.path, token)
            assert list(read) == ["embedding"] * store.embedding + list(store.layers)
            for numbers, row in zip(read.values(), rows, strict=True):
                assert torch.equal(torch.from_numpy(numbers), row.float())


def test_the_documented_sizes_are_right():
    for size in ("250m", "750m", "1b"):
        manifest = layout(get_preset(f"{size}-memory").model)
        line = next(line for line in PAGE.splitlines() if line.startswith(f"| {manifest.hidden_size} |"))
        cells = [cell.split(" (")[0] for cell in line.strip("| ").split(" | ")]
        gigabytes = f"{manifest.nbytes / 1e9:.2f} GB"
        assert cells[1:] == [f"{manifest.row_bytes:,}", f"{manifest.stride_bytes:,}", gigabytes]
    assert f"bf16 {manifest.block_rows} rows, {128_256 // manifest.block_rows} blocks" in PAGE


def test_the_documented_trellis_is_that_of_the_code():
    spreads = ", ".join(f"{spread:.2f}" for spread in SPREADS.values())
    assert f"spread_b = {spreads} for b = {', '.join(map(str, SPREADS))}\n" in PAGE
    plans = (Path(__file__).parents[2] / "docs" / "tol-plan.md").read_text(encoding="utf-8")
    line = next(line for line in plans.splitlines() if line.startswith("| trellis, 12 bits | 0."))
    assert [float(cell) for cell in line.strip("| ").split(" | ")[1:]] == list(NOISE.values())
