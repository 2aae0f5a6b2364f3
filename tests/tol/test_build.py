"""Building: what is computed, and what interruptions, full disks and bad weights leave behind."""

import dataclasses
import fcntl
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from flexmemory.model.transformer import Transformer
from flexmemory.tol.build import build_store
from flexmemory.tol.format import partial_folder
from flexmemory.tol.tiers import DeviceRows
from tests.conftest import NANO, WITH_MEMORY, random_model
from tests.tol.conftest import SIZES, files, flip_byte, write_checkpoint


def interrupt_after(monkeypatch, chunks: int) -> None:
    """Make the computation of rows fail after some chunks."""
    compute, calls = Transformer.compute_rows, []

    def failing(self, token_ids):
        if len(calls) == chunks:
            raise KeyboardInterrupt
        calls.append(token_ids)
        return compute(self, token_ids)

    monkeypatch.setattr(Transformer, "compute_rows", failing)


def interrupted(checkpoint, out, *, chunks: int, **arguments) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, chunks)
        with pytest.raises(KeyboardInterrupt):
            build_store(checkpoint, out, **{**SIZES, **arguments})
    assert not out.exists()


def run_building(nano, out, *, prelude: str) -> subprocess.CompletedProcess[str]:
    """Build a store in another process after running `prelude` there."""
    script = textwrap.dedent(prelude) + textwrap.dedent(f"""
        from pathlib import Path
        from flexmemory.model.checkpoint import Checkpoint
        from flexmemory.tol.build import build_store
        build_store(Checkpoint.open({str(nano.path)!r}), Path({str(out)!r}), **{SIZES!r})
    """)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["nano-memory", "nano-flex1", "table", "ffn+table"])
def test_rows_are_the_models(name, checkpoint_of, tmp_path):
    checkpoint = checkpoint_of(WITH_MEMORY[name])
    store = build_store(checkpoint, tmp_path / "store", codec="fp32")
    exact = random_model(WITH_MEMORY[name], dtype=torch.float32).double()
    ids = torch.arange(512)
    with torch.no_grad():
        expected = exact.compute_rows(ids)
    table = DeviceRows(store, device="cpu").table
    torch.testing.assert_close(table.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rows_are_computed_in_at_least_fp32(dtype, checkpoint_of, tmp_path, monkeypatch):
    seen = []
    compute = Transformer.compute_rows
    monkeypatch.setattr(Transformer, "compute_rows", lambda self, ids: seen.append(compute(self, ids)) or seen[-1])
    build_store(checkpoint_of(dtype=dtype), tmp_path / "store", **SIZES)
    assert {rows.dtype for rows in seen} == {torch.promote_types(dtype, torch.float32)}
    assert max(len(rows) for rows in seen) == SIZES["chunk_tokens"]


@pytest.mark.parametrize("chunks", [0, 3, 7, 15])
def test_a_resumed_build_has_the_bytes_of_a_straight_one(chunks, nano, store, tmp_path):
    out = tmp_path / "resumed"
    interrupted(nano, out, chunks=chunks)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 16 - chunks)  # fails if a chunk is computed again
        build_store(nano, out, **SIZES)
    assert files(out) == files(store.path)
    assert not partial_folder(out).exists()


def test_a_build_that_only_lacks_its_manifest_computes_nothing(nano, store, tmp_path, monkeypatch):
    out = tmp_path / "resumed"

    def fail(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("flexmemory.tol.build.publish", fail)
        with pytest.raises(KeyboardInterrupt):
            build_store(nano, out, **SIZES)
    monkeypatch.setattr(Transformer, "compute_rows", fail)
    build_store(nano, out, **SIZES)
    assert files(out) == files(store.path)


def test_a_killed_build_goes_on(nano, store, tmp_path):
    out = tmp_path / "killed"
    process = run_building(
        nano,
        out,
        prelude="""
        import os, signal
        from flexmemory.tol import build
        original, calls = build._write_chunk, []
        def dying(*args):
            original(*args)
            calls.append(args)
            if len(calls) == 6:  # its bytes are written, but not recorded
                os.kill(os.getpid(), signal.SIGKILL)
        build._write_chunk = dying
        """,
    )
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    progress = partial_folder(out) / "progress.jsonl"
    assert len(progress.read_text().splitlines()) == 1 + 5
    with progress.open("a") as file:
        file.write('["half a line')  # what a crash of the machine can leave
    build_store(nano, out, **SIZES)
    assert files(out) == files(store.path)


def test_a_full_disk_loses_nothing(nano, store, tmp_path):
    out = tmp_path / "full"
    prelude = """
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    """
    process = run_building(nano, out, prelude=prelude)
    last = process.stderr.strip().splitlines()[-1]
    assert last == (
        f"OSError: cannot write {partial_folder(out)} (File too large); free some space and run the same build again: "
        "it goes on at token 64 of 512"
    )
    assert not out.exists()
    interrupted(nano, out, chunks=1)  # it does go on: one chunk, then this
    assert len((partial_folder(out) / "progress.jsonl").read_text().splitlines()) == 1 + 3
    build_store(nano, out, **SIZES)
    assert files(out) == files(store.path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"codec": "fp32"}, "codec"),
        ({"layers": [2, 0]}, "layers"),
        ({"chunk_tokens": 16}, "chunk_rows"),
        ({"shard_bytes": 20_000}, "shards"),
    ],
)
def test_another_build_in_the_partial_folder_is_refused(change, named, nano, tmp_path):
    out = tmp_path / "store"
    interrupted(nano, out, chunks=2)
    before = files(partial_folder(out))
    with pytest.raises(ValueError, match=f"unfinished work of another kind .*{named}.* differ.*; finish that, remove"):
        build_store(nano, out, **{**SIZES, **change})
    assert files(partial_folder(out)) == before


def test_an_unfinished_build_of_another_checkpoint_is_refused(nano, checkpoint_of, tmp_path):
    out = tmp_path / "store"
    interrupted(nano, out, chunks=2)
    with pytest.raises(ValueError, match=r"\(checkpoint_fingerprint, tokenizer_fingerprint differ\)"):
        build_store(checkpoint_of(seed=1), out, **SIZES)


def test_a_partial_folder_of_something_else_is_refused(nano, tmp_path):
    partial = partial_folder(tmp_path / "store")
    partial.mkdir()
    (partial / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not unfinished work"):
        build_store(nano, tmp_path / "store", **SIZES)
    assert files(partial) == {"notes.txt": b"mine"}


def test_two_builds_of_one_store_at_once_are_refused(nano, tmp_path):
    out = tmp_path / "store"
    interrupted(nano, out, chunks=2)
    with (partial_folder(out) / "progress.jsonl").open("a") as progress:
        fcntl.flock(progress, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is writing to"):
            build_store(nano, out, **SIZES)


def test_a_partial_folder_that_was_changed_is_refused(nano, tmp_path):
    out = tmp_path / "store"
    interrupted(nano, out, chunks=7)
    shard = partial_folder(out) / "rows-00001.safetensors"
    flip_byte(shard, 4096 + 16 * 288)
    with pytest.raises(ValueError, match=r"changed since it was written \(tokens 144 to 159 in rows-00001"):
        build_store(nano, out, **SIZES)
    shard.unlink()
    with pytest.raises(OSError, match=r"rows-00001.safetensors.*remove it and build again"):
        build_store(nano, out, **SIZES)


@pytest.mark.parametrize(
    ("value", "codec", "shown"),
    [(float("nan"), "bf16", "nan"), (float("inf"), "fp32", "inf"), (3.4e38, "bf16", r"3\.39\d*e\+38")],
)
def test_rows_that_are_not_finite_are_refused(value, codec, shown, tmp_path):
    config = dataclasses.replace(NANO["nano-memory"], memory_kind="table", intermediate_size=0)
    model = random_model(config, dtype=torch.float32)
    with torch.no_grad():
        table = model.memories[2].table
        assert table is not None
        table.weight[300, 7] = value
    checkpoint = write_checkpoint(tmp_path / "checkpoint", model)
    message = rf"row of token 300 in layer 2 is not finite \({shown} at 7, in codec {codec}\)"
    with pytest.raises(ValueError, match=message):
        build_store(checkpoint, tmp_path / "store", codec=codec, **SIZES)
    assert not (tmp_path / "store").exists()


def test_an_existing_folder_is_refused(nano, tmp_path):
    with pytest.raises(FileExistsError, match="already exists; choose another folder or remove it"):
        build_store(nano, tmp_path)


def test_a_dense_checkpoint_is_refused(checkpoint_of, tmp_path):
    with pytest.raises(ValueError, match="dense model has no memory to look up"):
        build_store(checkpoint_of(NANO["nano-base"]), tmp_path / "store")
    assert not partial_folder(tmp_path / "store").exists()
