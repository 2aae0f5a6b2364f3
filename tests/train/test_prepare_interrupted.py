"""Neither interruption nor a full disk changes what is prepared, and no work is lost, mixed or half-made."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from flexmemory.cli import main
from flexmemory.storage import Progress, read_json
from flexmemory.tokenizer import Tokenizer
from flexmemory.train import prepare as module
from flexmemory.train.prepare import prepare
from flexmemory.train.shards import ShardWriter
from tests.train.corpora import digests, documents, take_small_steps, write_jsonl


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    take_small_steps(monkeypatch)


@pytest.fixture
def corpus(tmp_path) -> Path:
    texts = documents(90)
    write_jsonl(tmp_path / "in" / "a.jsonl", [*texts[:40], "", *texts[40:60]])
    write_jsonl(tmp_path / "in" / "b" / "c.jsonl", texts[60:])
    (tmp_path / "in" / "a.txt").write_text("\n".join(texts))
    (tmp_path / "in" / "e.txt").write_text("")
    return tmp_path / "in"


OPTIONS: dict[str, Any] = {"vocab_size": 350, "val_fraction": 0.1, "shard_tokens": 500}


def committed_bytes(folder: Path) -> int:
    *_, last, _ = (folder / "progress.jsonl").read_text().split("\n")  # what follows the last line end never counted
    return sum(split["bytes"] for split in json.loads(last).get("splits", {}).values())


def resume(corpus: Path, out: Path, monkeypatch) -> None:
    """Finish `out`, and check that all of the text that was not committed is encoded, and no more."""
    encoded: list[str] = []
    encode_batch = Tokenizer.encode_batch

    def record(self, texts):
        encoded.extend(texts)
        return encode_batch(self, texts)

    committed = committed_bytes(out.with_name("out.partial"))
    monkeypatch.setattr(Tokenizer, "encode_batch", record)
    prepare([corpus], out, **OPTIONS)
    splits = read_json(out / "manifest.json")["splits"].values()
    assert sum(len(text.encode()) for text in encoded) == sum(split["bytes"] for split in splits) - committed
    assert not out.with_name("out.partial").exists()


@pytest.mark.parametrize(
    ("owner", "step", "call", "when"),
    [
        (Tokenizer, "train", 1, "before"),
        (Tokenizer, "train", 1, "after"),
        (Tokenizer, "save", 1, "after"),
        (ShardWriter, "append", 1, "after"),
        (ShardWriter, "append", 23, "before"),
        (ShardWriter, "append", 23, "after"),
        (ShardWriter, "append", 75, "after"),  # in the middle of the long document
        (ShardWriter, "commit", 1, "after"),
        (ShardWriter, "commit", 12, "before"),
        (ShardWriter, "commit", 12, "after"),
        (ShardWriter, "describe", 1, "before"),
        (module, "publish", 1, "before"),
    ],
)
def test_an_interrupted_run_goes_on(tmp_path, corpus, monkeypatch, owner, step, call, when):
    straight = digests(prepare([corpus], tmp_path / "straight", **OPTIONS))
    original = getattr(owner, step)
    calls = 0

    def interrupt(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls < call or when == "after":
            original(*args, **kwargs)
        if calls == call:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare([corpus], tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()
    resume(corpus, tmp_path / "out", monkeypatch)
    assert digests(tmp_path / "out") == straight


def run_python(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    """Run `code` with small steps."""
    setup = """
        import os, resource, signal, sys
        from pathlib import Path
        from flexmemory.cli import main
        from flexmemory.train import prepare as module
        from flexmemory.train.shards import ShardWriter
        module.BATCH_CHARACTERS, module.PIECE_CHARACTERS, module.COMMIT_BYTES = 400, 300, 1
    """
    command = [sys.executable, "-c", textwrap.dedent(setup) + textwrap.dedent(code), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_killed_run_goes_on(tmp_path, corpus, monkeypatch):
    straight = digests(prepare([corpus], tmp_path / "straight", **OPTIONS))
    code = """
        append, calls = ShardWriter.append, 0
        def kill(*args):
            global calls
            append(*args)
            calls += 1
            if calls == 75:
                os.kill(os.getpid(), signal.SIGKILL)
        ShardWriter.append = kill
        module.prepare([sys.argv[1]], Path(sys.argv[2]), vocab_size=350, val_fraction=0.1, shard_tokens=500)
    """
    killed = run_python(code, corpus, tmp_path / "out")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "out").exists()
    assert committed_bytes(tmp_path / "out.partial") > 0
    resume(corpus, tmp_path / "out", monkeypatch)
    assert digests(tmp_path / "out") == straight


def test_a_full_disk_loses_nothing(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", documents(800))
    tokenizer = Tokenizer.train(documents(50), vocab_size=400)
    tokenizer.save(tmp_path)
    prepare([path], tmp_path / "straight", tokenizer=tokenizer)
    limit = 40_000
    assert (tmp_path / "straight" / "tokenizer.json").stat().st_size < limit
    assert (tmp_path / "straight" / "train-00000.bin").stat().st_size > limit
    code = f"""
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        sys.exit(main(["prepare", *sys.argv[1:]]))
    """
    options = (path, "--out", tmp_path / "out", "--tokenizer", tmp_path)
    full = run_python(code, *options)
    assert full.returncode == 2, full.stderr
    assert f"flexmemory: error: [Errno 27] File too large; {tmp_path}/out.partial keeps what is done" in full.stderr
    assert not (tmp_path / "out").exists()
    committed = committed_bytes(tmp_path / "out.partial")
    assert committed > limit
    assert main(["prepare", *map(str, options)]) == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "straight")


def interrupted(corpus: Path, out: Path, monkeypatch, *, commits: int) -> Path:
    """The partial folder of a run that ended after some commits."""
    with monkeypatch.context() as patch:
        commit = ShardWriter.commit
        left = iter(range(commits))

        def stop(self):
            if next(left, None) is None:
                raise KeyboardInterrupt
            commit(self)

        patch.setattr(ShardWriter, "commit", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare([corpus], out, **OPTIONS)
    return out.with_name(f"{out.name}.partial")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"val_fraction": 0.2}, "val_fraction"),
        ({"vocab_size": 351}, "tokenizer"),
        ({"shard_tokens": 501}, "shard_tokens"),
        ({"text_field": "body"}, "text_field"),
        ({"exclude_dirs": ["b"]}, "files"),
        ({"tokenizer": Tokenizer.train(["a"], vocab_size=300)}, "tokenizer"),
    ],
)
def test_other_work_is_refused(tmp_path, corpus, monkeypatch, change, named):
    partial = interrupted(corpus, tmp_path / "out", monkeypatch, commits=3)
    before = digests(partial)
    message = (
        rf"{partial} is unfinished work of another kind \({named} differ\); "
        rf"finish that, remove {partial}, or choose another --out"
    )
    with pytest.raises(ValueError, match=message):
        prepare([corpus], tmp_path / "out", **(OPTIONS | change))
    assert digests(partial) == before


def test_changed_files_are_other_work(tmp_path, corpus, monkeypatch):
    interrupted(corpus, tmp_path / "out", monkeypatch, commits=3)
    os.utime(corpus / "a.txt", ns=(1, 1))
    with pytest.raises(ValueError, match=r"\(files differ\)"):
        prepare([corpus], tmp_path / "out", **OPTIONS)
    with pytest.raises(ValueError, match=r"\(inputs, files differ\)"):
        prepare([corpus / "a.txt"], tmp_path / "out", **OPTIONS)


def test_work_that_had_not_begun_is_no_obstacle(tmp_path, corpus):
    with Progress.open(tmp_path / "out.partial", {"inputs": "others"}):
        pass
    straight = digests(prepare([corpus], tmp_path / "straight", **OPTIONS))
    assert digests(prepare([corpus], tmp_path / "out", **OPTIONS)) == straight


def test_a_line_cut_short_never_counted(tmp_path, corpus, monkeypatch):
    partial = interrupted(corpus, tmp_path / "out", monkeypatch, commits=5)
    with (partial / "progress.jsonl").open("a") as file:
        file.write('{"position": [')
    straight = digests(prepare([corpus], tmp_path / "straight", **OPTIONS))
    assert digests(prepare([corpus], tmp_path / "out", **OPTIONS)) == straight


@pytest.mark.parametrize("name", ["train-00000.bin", "tokenizer.json"])
def test_work_that_was_damaged_is_refused(tmp_path, corpus, monkeypatch, name):
    partial = interrupted(corpus, tmp_path / "out", monkeypatch, commits=5)
    if name == "tokenizer.json":
        Tokenizer.train(["a"], vocab_size=300).save(partial)
    else:
        os.truncate(partial / name, 10)
    with pytest.raises(ValueError, match=f"{partial}/{name} is not as it was written; remove {partial} and start"):
        prepare([corpus], tmp_path / "out", **OPTIONS)


def test_shards_that_grew_behind_our_back_are_refused(tmp_path, corpus, monkeypatch):
    def tamper(self):
        with (tmp_path / "out.partial" / "train-00000.bin").open("ab") as file:
            file.write(b"more")
        return describe(self)

    describe = ShardWriter.describe
    monkeypatch.setattr(ShardWriter, "describe", tamper)
    with pytest.raises(ValueError, match=r"train-00000\.bin is not as it was written"):
        prepare([corpus], tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_two_runs_at_once_are_refused(tmp_path, corpus):
    (tmp_path / "out.partial").mkdir()
    with (
        Progress.open(tmp_path / "out.partial", {}),
        pytest.raises(ValueError, match=r"another process is writing to .*out\.partial; wait for it or stop it"),
    ):
        prepare([corpus], tmp_path / "out", **OPTIONS)


def test_a_folder_of_others_is_left_alone(tmp_path, corpus):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"out\.partial exists and is not unfinished work; finish that, remove"):
        prepare([corpus], tmp_path / "out", **OPTIONS)
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "precious"
    with pytest.raises(FileExistsError, match="in already exists; choose another folder or remove it"):
        prepare([corpus], corpus, **OPTIONS)
