"""Every way to read documents gives the same documents, and what cannot be read is named."""

import bz2
import gzip
import itertools
import json
import logging
import lzma
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from flexmemory.train.documents import Position, find_sources, read_documents

TEXTS = ["one\r\ntwo\n", "", "naïve 東京\n\n", "last"]
ROWS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
PACKERS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstandard.compress}


def read(*inputs: str | Path, text_field: str = "text") -> list[str]:
    return [document.text for document in read_documents(find_sources(inputs), text_field=text_field)]


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("packing", PACKERS)
def test_a_text_file_is_one_document(tmp_path, packing):
    for suffix in (".txt", ".md", ".py", ".TXT"):
        path = write(tmp_path / f"file{suffix}{packing}", PACKERS[packing](TEXTS[2].encode()))
        assert read(path) == [TEXTS[2]]


@pytest.mark.parametrize("packing", PACKERS)
def test_a_line_of_json_is_one_document(tmp_path, packing):
    path = write(tmp_path / f"file.jsonl{packing}", PACKERS[packing](lines(ROWS).replace(b"\n", b"\n\n")))
    assert read(path) == TEXTS


@pytest.mark.parametrize("packing", PACKERS)
def test_parts_packed_one_after_the_other_are_one_file(tmp_path, packing):
    parts = [lines([row] * 1000) for row in ROWS]
    path = write(tmp_path / f"file.jsonl{packing}", b"".join(map(PACKERS[packing], parts)))
    assert read(path) == [text for text in TEXTS for _ in range(1000)]


def test_a_row_of_parquet_is_one_document(tmp_path):
    path = tmp_path / "file.parquet"
    pq.write_table(pa.table({"id": range(2000), "body": TEXTS * 500}), path, row_group_size=300)
    assert read(path, text_field="body") == TEXTS * 500


def test_a_row_of_a_hub_data_set_is_one_document(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load(path, name=None, *, split, revision, streaming):
        assert streaming
        asked.append((path, name, split, revision))
        return datasets.Dataset.from_list(ROWS).to_iterable_dataset(num_shards=2)

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", load)
    for name in (
        "hf:owner/name", "hf:owner/name/config", "hf:owner/name@v2/config:test", "hf:owner/name:test", "hf:old",
    ):  # fmt: skip
        assert read(name) == TEXTS
    assert asked == [
        ("owner/name", None, "train", None),
        ("owner/name", "config", "train", None),
        ("owner/name", "config", "test", "v2"),
        ("owner/name", None, "test", None),
        ("old", None, "train", None),
    ]
    with pytest.raises(ValueError, match="hf:owner/name file 0 row 1 has no field 'body', only 'id', 'text'"):
        read("hf:owner/name", text_field="body")


@pytest.fixture
def hub(monkeypatch):
    """A hub data set of 4 files with 3 rows each; a list of the (file, row) that were read."""
    datasets = pytest.importorskip("datasets")
    seen = []

    def rows(files):
        for file in files:
            for row in range(3):
                seen.append((file, row))
                yield {"text": f"{file}.{row}"}

    def load(*_, **__):
        return datasets.IterableDataset.from_generator(rows, gen_kwargs={"files": list(range(4))})

    monkeypatch.setattr(datasets, "load_dataset", load)
    return seen


def test_a_hub_data_set_is_read_as_it_is_used(hub):
    documents = read_documents(find_sources(["hf:owner/name"]))
    assert [next(documents).text for _ in range(4)] == ["0.0", "0.1", "0.2", "1.0"]
    assert max(hub) <= (1, 1)


def test_a_hub_data_set_starts_anywhere_without_the_files_before(hub):
    sources = find_sources(["hf:owner/name"])
    documents = list(read_documents(sources))
    assert [document.text for document in documents] == [f"{file}.{row}" for file in range(4) for row in range(3)]
    for number, document in enumerate(documents, 1):
        hub.clear()
        assert list(read_documents(sources, start=document.after)) == documents[number:]
        assert min(hub) == (document.after.part, 0)


def test_a_source_that_became_shorter_is_refused(hub, tmp_path):
    message = "has changed: it holds 3 documents where 4 were read before"
    with pytest.raises(ValueError, match=f"hf:owner/name {message}"):
        list(read_documents(find_sources(["hf:owner/name"]), start=Position(0, 4, 2)))
    path = write(tmp_path / "a.jsonl", lines(ROWS[:3]))
    with pytest.raises(ValueError, match=f"a.jsonl {message}"):
        list(read_documents(find_sources([path]), start=Position(0, 4)))


def test_a_hub_data_set_that_cannot_be_opened_is_named(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(OSError, match=r"cannot open hf:owner/name \(no route\); expected hf:OWNER/NAME"):
        read("hf:owner/name")


def test_a_byte_order_mark_is_not_text(tmp_path):
    assert read(write(tmp_path / "a.txt", b"\xef\xbb\xbfone")) == ["one"]
    assert read(write(tmp_path / "b.jsonl", b"\xef\xbb\xbf" + lines(ROWS))) == TEXTS


def test_a_folder_is_walked_in_order_and_the_rest_is_logged(tmp_path, caplog):
    for name in (
        "b/2.txt",
        "b/1.md",
        "a.py",
        "b.txt",
        "b/test/no.py",
        "b/x.bin",
        "b/y.txt.bin",
        "b/noname",
        ".git/z.gz",
    ):
        write(tmp_path / name, name.encode())
    (tmp_path / "b" / "gone.txt").symlink_to(tmp_path / "nowhere")
    with caplog.at_level(logging.INFO):
        sources = find_sources([tmp_path], exclude_dirs=["test"])
    assert [document.text for document in read_documents(sources)] == ["a.py", "b/1.md", "b/2.txt", "b.txt"]
    left_out = "5 files are of other types and left out (.bin 2, .gz 1, .txt 1, no suffix 1)"
    assert caplog.messages == [f"{tmp_path}: {left_out}"]


def test_inputs_keep_their_order(tmp_path):
    write(tmp_path / "z.txt", b"z")
    write(tmp_path / "a" / "a.txt", b"a")
    assert read(tmp_path / "z.txt", tmp_path / "a") == ["z", "a"]


def test_reading_can_start_after_any_document(tmp_path):
    write(tmp_path / "a.jsonl", lines(ROWS))
    write(tmp_path / "b.txt", b"b")
    write(tmp_path / "c.jsonl.zst", zstandard.compress(lines(ROWS)))
    sources = find_sources([tmp_path])
    documents = list(read_documents(sources))
    assert [document.after[:2] for document in documents] == [
        (0, 1),
        (0, 2),
        (0, 3),
        (0, 4),
        (1, 1),
        (2, 1),
        (2, 2),
        (2, 3),
        (2, 4),
    ]
    for number, document in enumerate(documents, 1):
        assert list(read_documents(sources, start=document.after)) == documents[number:]
    assert list(read_documents(sources, start=Position(0, 4))) == documents[4:]


def test_files_before_the_start_are_not_opened(tmp_path):
    sources = find_sources([write(tmp_path / "a.txt", b"a"), write(tmp_path / "b.txt", b"b")])
    (tmp_path / "a.txt").unlink()
    assert [document.text for document in read_documents(sources, start=Position(1, 0))] == ["b"]


def test_reading_is_lazy(tmp_path):
    path = write(tmp_path / "a.jsonl", lines(ROWS) + b"broken")
    documents = read_documents(find_sources([path]))
    assert [document.text for document in itertools.islice(documents, 4)] == TEXTS
    with pytest.raises(ValueError, match="line 5 is not JSON"):
        next(documents)


def test_what_cannot_be_found_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no such file or folder: {tmp_path}/nothing.txt"):
        find_sources([tmp_path / "nothing.txt"])
    with pytest.raises(ValueError, match=f"no documents in {tmp_path}; expected .txt, .md, .py, .jsonl"):
        find_sources([tmp_path])
    with pytest.raises(ValueError, match="no documents in no input"):
        find_sources([])
    with pytest.raises(ValueError, match=r"empty\.txt is empty"):
        find_sources([write(tmp_path / "empty.txt", b"")])
    for name in ("a.bin", "a.gz", "a.txt.zip", "a.parquet.gz", "name"):
        with pytest.raises(ValueError, match=f"{name} is of an unknown type; expected .txt, .md, .py, .jsonl"):
            find_sources([write(tmp_path / name, b"text")])


def test_a_file_named_twice_is_refused(tmp_path):
    path = write(tmp_path / "a.txt", b"a")
    with pytest.raises(ValueError, match=f"{path} is in the inputs 2 times; name it once"):
        find_sources([tmp_path, path])


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"text\0", r"a\.txt is binary \(byte 4 is NUL\), expected UTF-8 text"),
        ("a.txt", "naïve".encode("latin-1"), r"a\.txt is not UTF-8 text \(invalid continuation byte at byte 2\)"),
        ("a.txt.gz", gzip.compress(b"\xff", mtime=0), r"a\.txt\.gz is not UTF-8 text \(invalid start byte at byte 0\)"),
        ("a.jsonl", lines(ROWS) + b'{"text": "a\xff"}', r"a\.jsonl line 5 is not UTF-8 text \(.* at byte 11\)"),
        ("a.jsonl", lines(ROWS) + b'{"text": ', r"a\.jsonl line 5 is not JSON \("),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl line 1 is not JSON \("),
        ("a.jsonl", b"[]\n", r"a\.jsonl line 1 should be a JSON object, got list"),
        ("a.jsonl", b'{"body": "a", "id": 1}', r"line 1 has no field 'text', only 'body', 'id'; name the field of the"),
        ("a.jsonl", b"{}", r"line 1 has no field 'text', only none"),
        ("a.jsonl", b'{"text": null}', r"a\.jsonl line 1: field 'text' should be a string, got NoneType"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl line 1: field 'text' is no Unicode text"),
        ("a.parquet", b"PAR1 and more", r"a\.parquet is cut short or damaged"),
    ],
)
def test_bad_content_is_named(tmp_path, name, data, message):
    path = write(tmp_path / name, data)
    with pytest.raises(ValueError, match=message):
        read(path)


@pytest.mark.parametrize("packing", [".gz", ".xz", ".bz2", ".zst"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_a_broken_compressed_file_is_named(tmp_path, kind, packing):
    data = PACKERS[packing](lines(ROWS * 1000))
    flipped = bytes([*data[:2], data[2] ^ 255, *data[3:]])
    for broken in (data[:-1], data[: len(data) // 2], data + data[:9], flipped):
        path = write(tmp_path / f"a.{kind}{packing}", broken)
        with pytest.raises(ValueError, match=rf"a\.{kind}{packing} is cut short or damaged"):
            read(path)


def test_a_broken_parquet_file_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXTS * 500}), path, row_group_size=300, compression="zstd")
    with pytest.raises(ValueError, match="has no field 'body', only 'text'"):
        read(path, text_field="body")
    data = path.read_bytes()
    for broken in (data[:-10], data[:100] + b"\xff" * 200 + data[300:]):
        with pytest.raises(ValueError, match=r"a\.parquet is cut short or damaged"):
            read(write(path, broken))
    pq.write_table(pa.table({"text": ["a", None]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet row 2: field 'text' should be a string, got NoneType"):
        read(path)


@pytest.mark.parametrize(
    ("name", "package"), [("a.txt.zst", "zstandard"), ("a.parquet", "pyarrow"), ("hf:owner/name", "datasets")]
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    path = name if name.startswith("hf:") else write(tmp_path / name, b"any")
    with pytest.raises(ImportError, match=rf"{path} needs {package}.*pip install 'flexmemory\[train\]'"):
        read(path)


def test_an_unreadable_folder_is_an_error(tmp_path, monkeypatch):
    def fail(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", fail)
    with pytest.raises(PermissionError, match="Permission denied"):
        find_sources([tmp_path])
