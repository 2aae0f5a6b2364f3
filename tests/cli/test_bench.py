"""`flexmemory bench` measures every kind of model and rows on a CPU; what it cannot do it says."""

import json
import math

import pytest

from tests.cli.conftest import run

DECODE = ("--context", "32", "--tokens", "10", "--device", "cpu")


def figures(path):
    content = json.loads(path.read_text())
    assert content["provenance"]["torch"]
    return content["entries"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("nano-base", "--batch", "1", "3"),
        ("nano-memory", "--int8", "head"),
        ("nano-flex3", "--rows", "host", "--hot-rows", "64", "--dtype", "bf16"),
        ("nano-memory", "--rows", "disk", "--hot-rows", "10000"),
    ],
    ids=" ".join,
)
def test_decoding_a_preset(tmp_path, arguments):
    text = run("bench", "decode", *arguments, *DECODE, "--json", tmp_path / "figures.json")
    entries = figures(tmp_path / "figures.json")
    assert [entry["batch"] for entry in entries] == ([1, 3] if "3" in arguments else [1])
    assert len(text.splitlines()) == 2 + len(entries)
    for entry in entries:
        assert entry["steps"] == 10
        assert abs(entry["context"] - 32) <= 2
        assert math.isclose(entry["tokens_per_s"], 1e3 * entry["batch"] / entry["ms_per_token"])
        assert math.isclose(entry["bound_share"], entry["bound_ms"] / entry["ms_per_token"])


def test_decoding_a_checkpoint_of_text(walkthrough, tmp_path):
    checkpoint, tol, data = (walkthrough / f"runs/{name}" for name in ("flex3", "tol", "data"))
    options = ("--data", data, "--json", tmp_path / "figures.json", *DECODE)
    run("bench", "decode", checkpoint, *options)
    run("bench", "decode", checkpoint, "--tol", tol, *options)
    (entry,) = figures(tmp_path / "figures.json")
    assert entry["first_token_ms"] > 0


def test_prompts(tmp_path):
    text = run(
        "bench", "prefill", "nano-memory", "--prompt", "100", "--chunk", "30", "--json", tmp_path / "figures.json"
    )
    (entry,) = figures(tmp_path / "figures.json")
    assert entry["prompt"] == 100  # more than the preset's longest
    assert math.isclose(entry["tokens_per_s"], 1e5 / entry["ms"])
    assert len(text.splitlines()) == 3


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_rows(walkthrough, tmp_path, place):
    options = ["--rows", place, "--device", "cpu", "--json", tmp_path / "figures.json"]
    run("bench", "rows", "--tol", walkthrough / "runs/tol", *options)
    entries = figures(tmp_path / "figures.json")
    assert [entry["rows"] for entry in entries] == [1, 8, 64, 512]  # of 512
    assert all((entry["cached_share"] is not None) == (place == "disk") for entry in entries)


def test_cold_rows(walkthrough, tmp_path):
    run("bench", "rows", "--tol", walkthrough / "runs/tol", "--cold", "--json", tmp_path / "figures.json")
    entries = figures(tmp_path / "figures.json")
    assert [entry["cold"] for entry in entries] == [False] * 4 + [True] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("decode", "nano-memry"), "did you mean 'nano-memory'"),
        (("decode", "nano-base", "--rows", "disk"), "a dense preset has no rows"),
        (("decode", "nano-memory", "--hot-rows", "5"), "give --rows host or disk"),
        (("decode", "nano-memory", "--hot-rows", "-1", "--rows", "host"), "must not be negative"),
        (("decode", "nano-memory", "--tol", "somewhere"), "leave out --tol"),
        (("decode", "nano-base", "--context", "4", "--tokens", "10"), "too short"),
        (("decode", "nano-base", "--context", "32", "--tokens", "15"), "a multiple of 10"),
        (("decode", "nano-base", "--context", "64", "--tokens", "10"), "max_length must be"),
        (("decode", "nano-base", "--batch", "0", *DECODE), "a batch of 1 or more"),
        (("prefill", "nano-base", "--prompt", "0"), "must be positive"),
        (("rows", "--tol", "nowhere"), "does not exist"),
        (("rows", "--tol", "nowhere", "--rows", "host", "--cold"), "is for rows on disk"),
    ],
)
def test_mistakes(refused, arguments, message):
    assert message in refused("bench", *arguments)


def test_data_of_another_vocabulary(walkthrough, tmp_path, refused):
    text = walkthrough / "README.md"
    run("prepare", text, "--out", tmp_path / "data", "--vocab-size", "600")
    assert "give data of the model's tokenizer" in refused("bench", "decode", "nano-base", "--data", tmp_path / "data")
