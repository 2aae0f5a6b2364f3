"""The decode benchmark runs whole on small models, and the README's tables are made of what it writes."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from flexmemory.cli import main

REPOSITORY = Path(__file__).parents[2]


def script(name: str) -> ModuleType:
    spec = spec_from_file_location(name, REPOSITORY / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def decode() -> Callable[..., dict[str, Any]]:
    """`decode(folder, *options)`: what the benchmark writes, run as a program of its own."""

    def run(folder: Path, *options: str) -> dict[str, Any]:
        out = folder / "decode.json"
        command = [sys.executable, REPOSITORY / "benchmarks/decode.py", "--quick", "--out", out, "--device", "cpu"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY / "src")}
        subprocess.run([*command, "--folder", folder / "scratch", *options], check=True, env=environment)
        assert not (folder / "scratch").exists()
        return json.loads(out.read_text())

    return run


@pytest.fixture(scope="module")
def results(decode, tmp_path_factory) -> dict[str, Any]:
    return decode(tmp_path_factory.mktemp("decode"))


def test_every_entry_is_measured(results):
    errors = [entry["error"] for entry in results["entries"] if "error" in entry]
    assert errors == []
    kinds = [entry["bench"] for entry in results["entries"]]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "device": 1, "store": 1, "decode": 27, "prefill": 5, "gather": 4, "memory": 2, "hugging face": 2,
    }  # fmt: skip
    assert all(entry["batch"] * 1e3 / entry["ms_per_token"] > 0 for entry in results["entries"] if "batch" in entry)


def test_the_page_cache_is_reported(results):
    disk = [entry for entry in results["entries"] if "cache" in entry]
    assert [entry["cache"] for entry in disk] == ["warm", "warm", "cold"]
    assert all(0 <= entry["cached_share_before"] <= 1 for entry in disk)


def test_a_run_out_of_time_says_so(decode, tmp_path):
    entries = decode(tmp_path, "--limit", "0")["entries"]
    assert len(entries) == 42
    assert all(entry["error"].startswith("not begun") for entry in entries)


def test_some_entries_alone(decode, tmp_path):
    only = r"^(device|store)$|(decode|prefill) memory (device|host)( batch=3)?$|int4"
    entries = decode(tmp_path, "--only", only)["entries"]
    calls = [f"{entry['bench']} {entry['call']}".strip() for entry in entries]
    assert calls == [
        "device", "store", "decode memory device", "decode memory host", "prefill memory device", "prefill memory host",
        "decode memory device batch=3", "decode memory host batch=3", "decode memory int4 device",
        "decode memory int4 host", "decode memory int4 host batch=3", "prefill memory int4 host",
    ]  # fmt: skip
    steps = {call: entry["step_bytes"] for call, entry in zip(calls, entries, strict=True) if "step_bytes" in entry}
    assert steps["decode memory int4 device"] == steps["decode memory int4 host"] < steps["decode memory device"]


def test_a_failing_entry_is_recorded():
    module = script("decode")

    def out_of_memory():
        raise module.torch.OutOfMemoryError("CUDA out of memory")

    assert module.attempt(out_of_memory, limit_s=5) == {"error": "OutOfMemoryError: CUDA out of memory"}


def test_the_table_has_every_entry(results):
    table = script("readme").decode_table(results)
    lines = table.splitlines()
    assert sum(line.startswith("| ") for line in lines) == 2 + 27 + 2 + 2 + 5
    assert "Not measured" not in table
    assert "| memory, planned rows in host memory | 3 |" in table
    assert "| memory, rows on disk, hot set, 0% of them in the page cache | 1 |" in table
    partial = copy.deepcopy(results)
    partial["entries"][2:4] = [{"bench": "decode", "call": "base", "error": "OutOfMemoryError"}] * 2
    assert "Not measured in this run: decode base; decode base." in script("readme").decode_table(partial)


def test_a_stream_of_ranks(tmp_path):
    """The most frequent token of the training split is 0, and held-out tokens are those of the data."""
    text = tmp_path / "text.txt"
    text.write_text("a rose is a rose is a rose\n" * 400)
    many = [text, *(tmp_path / f"{i}.txt" for i in range(20))]
    for path in many[1:]:
        path.write_text(f"the rose of {path.stem}\n" * 100)
    data = tmp_path / "data"
    inputs = [str(path) for path in many]
    assert main(["prepare", *inputs, "--out", str(data), "--vocab-size", "300", "--val-fraction", "0.3"]) == 0
    stream = script("stream").ranked_stream(data, 50)
    assert stream.dtype == np.uint32
    assert len(stream) == 50
    assert stream.max() < 300
