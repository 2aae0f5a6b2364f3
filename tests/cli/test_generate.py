"""`flexmemory generate`: the same text from every source of rows, and FFN-M left on disk."""

import re

import pytest

from flexmemory.cli import main
from flexmemory.engine.decoder import EagerDecoder
from flexmemory.model.accounting import count_parameters
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.tol.disk import DiskRows
from tests.cli.conftest import run

PROMPT = "The memory of a token"


@pytest.fixture
def generate(walkthrough):
    def text(*options):
        return run("generate", walkthrough / "runs/flex3", "--prompt", PROMPT, "--max-tokens", "24", *options)

    return text


@pytest.mark.parametrize("sampling", [(), ("--temperature", "1.0", "--top-p", "0.9", "--seed", "3")])
def test_every_source_of_rows_writes_the_same(generate, exact_store, sampling):
    computed = generate(*sampling)
    assert computed.startswith(PROMPT)
    assert len(computed) > len(PROMPT) + 5
    for place in ("device", "host", "disk"):
        assert generate("--tol", exact_store, "--rows", place, *sampling) == computed


def test_memory_weights_are_not_loaded(walkthrough, exact_store, caplog):
    caplog.set_level("INFO")
    counts = count_parameters(Checkpoint.open(walkthrough / "runs/flex3").config)
    for options, resident in (((), counts.total), (("--tol", exact_store), counts.resident)):
        caplog.clear()
        run("generate", walkthrough / "runs/flex3", "--max-tokens", "2", *options)
        shown = re.search(r"([\d.]+) MB of weights", caplog.text)
        assert shown is not None
        assert float(shown[1]) == pytest.approx(resident * 4 / 1e6, abs=0.006)
    assert "were not loaded), rows on disk" in caplog.text


def test_several_prompts_run_together_and_print_in_order(walkthrough, exact_store, monkeypatch):
    together = []
    launch = EagerDecoder.launch
    monkeypatch.setattr(EagerDecoder, "launch", lambda self, n: together.append(n) or launch(self, n))

    def text(*prompts, stop=()):
        options = [option for prompt in prompts for option in ("--prompt", prompt)]
        options += [option for word in stop for option in ("--stop", word)]
        return run("generate", walkthrough / "runs/flex3", "--tol", exact_store, "--max-tokens", "12", *options)

    first, second = text(PROMPT), text("A row is")
    assert set(together) == {1}
    assert text(PROMPT, "A row is", PROMPT) == first + second + first
    assert max(together) == 3
    end = first[len(PROMPT) : len(PROMPT) + 1]
    assert text(PROMPT, "A row is", stop=[end]).startswith(f"{PROMPT}\nA row is")


def test_a_budget_prints_its_plan(generate, exact_store, refused, walkthrough, caplog):
    caplog.set_level("INFO")
    expected = generate("--tol", exact_store)
    assert "total" not in caplog.text
    assert generate("--tol", exact_store, "--memory-budget", "20MB") == expected
    assert re.search(r"^total +device +[\d.]+ KB  of 20.00 MB$", caplog.text, flags=re.MULTILINE)
    command = ("generate", walkthrough / "runs/flex3", "--tol", exact_store)
    too_small = refused(*command, "--memory-budget", "10KiB")
    assert re.search(r"the memory budget of 10\.24 KB is too small: weights .* make [\d.]+ KB; raise it", too_small)
    assert "'2 gigs' is no size; expected" in refused(*command, "--memory-budget", "2 gigs")
    assert "on a CPU there is one memory" in refused(*command, "--host-budget", "1GB")


def test_a_budget_has_room_for_every_prompt(walkthrough, caplog):
    caplog.set_level("INFO")
    command = ("generate", walkthrough / "runs/flex3", "--memory-budget", "1GB", "--max-tokens", "2")
    cached = []
    for prompts in (("--prompt", "a"), ("--prompt", "a", "--prompt", "b")):
        caplog.clear()
        run(*command, *prompts)
        cached += re.findall(r"^KV cache +device +([\d.]+) KB", caplog.text, flags=re.MULTILINE)
    assert float(cached[1]) == pytest.approx(2 * float(cached[0]), abs=0.02)


def test_int8_takes_fewer_bytes(generate, caplog):
    caplog.set_level("INFO")
    for part in ("head", "all"):
        assert generate("--int8", part).startswith(PROMPT)
    exact = generate()
    assert exact.startswith(PROMPT)
    head, every, none = (float(size) for size in re.findall(r"([\d.]+) MB of weights", caplog.text))
    assert every < head
    assert every < none


def test_a_disk_that_fails_while_generating(walkthrough, exact_store, monkeypatch, capsys):
    gather = DiskRows.gather
    left = iter(range(5))

    def failing(self, token_ids, out):
        if next(left, None) is None:
            raise OSError("cannot read rows-00000.safetensors at byte 4096 (Input/output error)")
        gather(self, token_ids, out)

    monkeypatch.setattr(DiskRows, "gather", failing)
    command = ["generate", walkthrough / "runs/flex3", "--tol", exact_store, "--prompt", PROMPT]
    assert main([str(part) for part in command]) == 2
    shown = capsys.readouterr()
    assert shown.out.startswith(PROMPT)
    assert shown.out.endswith("\n")
    expected = "flexmemory: error: cannot read rows-00000.safetensors at byte 4096 (Input/output error)\n"
    assert shown.err.endswith(expected)


def test_seed_and_stop(generate):
    assert generate("--temperature", "1.0", "--seed", "1") != generate("--temperature", "1.0", "--seed", "2")
    free = generate()[len(PROMPT) :]
    middle = free[4:6]
    assert generate("--stop", middle)[len(PROMPT) :].rstrip("\n") == free[: free.index(middle)]


def test_without_a_prompt_a_document_begins(walkthrough):
    options = ("--temperature", "1.0", "--max-tokens", "8")
    assert len(run("generate", walkthrough / "runs/flex3", *options).strip()) > 3


def test_rows_and_store_must_go_together(walkthrough, exact_store, refused):
    run_folder = walkthrough / "runs/flex3"
    assert "rows from 'disk' need a ToL store" in refused("generate", run_folder, "--rows", "disk")
    assert "need no ToL store" in refused("generate", run_folder, "--tol", exact_store, "--rows", "compute")


def test_store_of_another_checkpoint(walkthrough, exact_store, tmp_path, refused):
    data = walkthrough / "runs/data"
    tiny = ("--total-tokens", "512", "--eval-tokens", "256")
    run("train", "nano-flex3", "--data", data, "--out", tmp_path / "other", "--seed", "5", *tiny)
    assert "another checkpoint" in refused("generate", tmp_path / "other", "--tol", exact_store)
    run("train", "nano-base", "--data", data, "--out", tmp_path / "dense", *tiny)
    assert "is a dense model" in refused("generate", tmp_path / "dense", "--tol", exact_store)


def test_mistakes(walkthrough, tmp_path, refused):
    run_folder = walkthrough / "runs/flex3"
    assert "does not exist" in refused("generate", tmp_path / "none")
    assert re.search(
        r"the prompt has \d+ tokens; expected 1 to 63", refused("generate", run_folder, "--prompt", "x" * 500)
    )
    assert "temperature must not be negative" in refused("generate", run_folder, "--temperature", "-1")
    assert "--max-tokens must be positive" in refused("generate", run_folder, "--max-tokens", "0")
    assert "there is no device 'tpu'" in refused("generate", run_folder, "--device", "tpu")
