"""Prepared data holds every document and says what it holds; mistakes are answered and leave nothing behind."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from flexmemory.cli import main
from flexmemory.storage import read_json, sha256_file
from flexmemory.tokenizer import BOUNDARY, Tokenizer
from flexmemory.train import prepare as module
from flexmemory.train.data import TokenDataset
from flexmemory.train.documents import Document, Position
from flexmemory.train.prepare import prepare
from tests.train.corpora import documents, take_small_steps, write_jsonl


def split_ids(folder: Path, split: str) -> list[list[int]]:
    """The ids of each document of a split, after its boundary token."""
    manifest = read_json(folder / "manifest.json")
    files = [folder / shard["file"] for shard in manifest["splits"][split]["shards"]]
    arrays = [np.fromfile(file, dtype=np.dtype(manifest["dtype"]).newbyteorder("<")) for file in files]
    ids = np.concatenate([np.empty(0, dtype=np.int64), *arrays])
    starts = np.flatnonzero(ids == manifest["boundary_id"])
    assert len(ids) == 0 or starts[0] == 0
    return [part[1:].tolist() for part in np.split(ids, starts[1:])] if len(ids) else []


def split_texts(folder: Path, split: str) -> list[str]:
    tokenizer = Tokenizer.load(folder)
    return [tokenizer.decode(ids) for ids in split_ids(folder, split)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(documents(50), vocab_size=400)


@pytest.fixture
def small_steps(monkeypatch):
    take_small_steps(monkeypatch)


# What is written


def test_every_document_is_there_once(tmp_path, tokenizer):
    texts = documents(250)
    write_jsonl(tmp_path / "in" / "a.jsonl", texts[:120])
    write_jsonl(tmp_path / "in" / "b.jsonl", texts[120:])
    out = prepare([tmp_path / "in"], tmp_path / "out", tokenizer=tokenizer, shard_tokens=1000)
    held_out = [text for index, text in enumerate(texts) if index % 100 == 1]
    kept = [text for index, text in enumerate(texts) if index % 100 != 1]
    assert split_texts(out, "validation") == held_out
    assert split_texts(out, "train") == kept
    manifest = read_json(out / "manifest.json")
    for split, expected in (("train", kept), ("validation", held_out)):
        entry = manifest["splits"][split]
        assert entry["documents"] == len(expected)
        assert entry["bytes"] == sum(len(text.encode()) for text in expected)
        assert entry["tokens"] == sum(1 + len(tokenizer.encode(text)) for text in expected)
        assert entry["tokens"] == sum(shard["tokens"] for shard in entry["shards"])
        assert [shard["tokens"] for shard in entry["shards"][:-1]] == [1000] * (len(entry["shards"]) - 1)
        assert [shard["file"] for shard in entry["shards"]] == [
            f"{split}-{number:05d}.bin" for number in range(len(entry["shards"]))
        ]
        for shard in entry["shards"]:
            assert shard["sha256"] == sha256_file(out / shard["file"])
            assert (out / shard["file"]).stat().st_size == 2 * shard["tokens"]
    assert len(manifest["splits"]["train"]["shards"]) > 2
    assert {key: manifest[key] for key in manifest if key != "splits"} == {
        "format": "flexmemory-tokens",
        "format_version": 1,
        "dtype": "uint16",
        "vocab_size": tokenizer.vocab_size,
        "boundary_id": tokenizer.boundary_id,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "inputs": [str(tmp_path / "in")],
    }
    written = {shard["file"] for entry in manifest["splits"].values() for shard in entry["shards"]}
    assert {path.name for path in out.iterdir()} == {
        *written,
        "manifest.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert not (tmp_path / "out.partial").exists()


def test_the_dataset_opens_it(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", documents(20))
    dataset = TokenDataset.open(prepare([path], tmp_path / "out", tokenizer=tokenizer, shard_tokens=100))
    assert dataset.vocab_size == tokenizer.vocab_size
    assert dataset.tokenizer().fingerprint == tokenizer.fingerprint
    expected = [token for text in documents(20)[:1] for token in [tokenizer.boundary_id, *tokenizer.encode(text)]]
    assert dataset.train.read(0, len(expected)).tolist() == expected
    assert dataset.validation is not None


def test_large_vocabularies_take_four_bytes(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["low high"])
    written = {}
    for largest in (65_535, 65_536):
        core = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "low": 1, "high": largest}, unk_token="low"))
        core.pre_tokenizer = pre_tokenizers.Whitespace()
        out = prepare([path], tmp_path / str(largest), tokenizer=Tokenizer(core))
        written[read_json(out / "manifest.json")["dtype"]] = (out / "train-00000.bin").read_bytes()
    assert written == {"uint16": b"\0\0\1\0\xff\xff", "uint32": b"\0\0\0\0\1\0\0\0\0\0\1\0"}


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, []), (0.5, [1, 3, 5]), (0.3, [1, 4]), (0.2, [1])])
def test_the_held_out_share(tmp_path, tokenizer, fraction, expected):
    texts = [f"{number} fox" for number in range(6)]
    path = write_jsonl(tmp_path / "a.jsonl", [texts[0], "", *texts[1:]])
    out = prepare([path], tmp_path / "out", tokenizer=tokenizer, val_fraction=fraction)
    assert split_texts(out, "validation") == [texts[index] for index in expected]
    assert split_texts(out, "train") == [text for index, text in enumerate(texts) if index not in expected]


def test_one_document_goes_to_train(tmp_path, tokenizer, caplog):
    path = write_jsonl(tmp_path / "a.jsonl", ["the fox"])
    out = prepare([path], tmp_path / "out", tokenizer=tokenizer)
    assert split_texts(out, "train") == ["the fox"]
    assert read_json(out / "manifest.json")["splits"]["validation"]["shards"] == []
    assert "one document only, so none is held out" in caplog.text


def test_empty_documents_are_counted_and_left_out(tmp_path, tokenizer, caplog):
    for name, text in (("a.py", ""), ("b.py", "one"), ("c/__init__.py", ""), ("c/d.py", "two"), ("e.py", "")):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(text)
    with caplog.at_level(logging.INFO):
        out = prepare([tmp_path / "in"], tmp_path / "out", tokenizer=tokenizer)
    assert split_texts(out, "train") == ["one"]
    assert split_texts(out, "validation") == ["two"]
    assert "3 empty documents are left out" in caplog.text


def test_excluded_folders_are_left_out(tmp_path, tokenizer):
    for name in ("a.py", "tests/b.py", "c/tests/d.py"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(name)
    out = prepare([tmp_path / "in"], tmp_path / "out", tokenizer=tokenizer, exclude_dirs={"tests"})
    assert split_texts(out, "train") == ["a.py"]


def test_text_cannot_fake_a_boundary(tmp_path, tokenizer):
    text = f"one{BOUNDARY}two {BOUNDARY}"
    out = prepare([write_jsonl(tmp_path / "a.jsonl", [text])], tmp_path / "out", tokenizer=tokenizer)
    assert split_texts(out, "train") == [text]


def test_a_tokenizer_that_makes_boundaries_of_text_is_refused(tmp_path):
    core = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "fox": 1}, unk_token="[UNK]"))
    path = write_jsonl(tmp_path / "a.jsonl", ["crow"])
    with pytest.raises(ValueError, match=r"the tokenizer makes '\[UNK\]' of some text; take another --boundary"):
        prepare([path], tmp_path / "out", tokenizer=Tokenizer(core, boundary="[UNK]"))


# The tokenizer that is trained


def test_a_tokenizer_is_trained_on_training_documents(tmp_path):
    texts = ["fox crow " * 50, "東京 " * 50, "miller " * 50]
    out = prepare([write_jsonl(tmp_path / "a.jsonl", texts)], tmp_path / "out", vocab_size=300)
    trained = Tokenizer.load(out)
    assert trained.fingerprint == Tokenizer.train([texts[0], texts[2]], vocab_size=300).fingerprint
    assert len(trained.encode(" miller")) < len(trained.encode("東京"))
    assert read_json(out / "manifest.json")["tokenizer_fingerprint"] == trained.fingerprint


def test_a_tokenizer_is_trained_on_no_more_than_the_cap(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "TOKENIZER_CHARACTERS", 1000)
    texts = ["fox crow " * 50, "held out", "river lantern " * 50, "bishop " * 50]
    out = prepare([write_jsonl(tmp_path / "a.jsonl", texts)], tmp_path / "out", vocab_size=400)
    assert Tokenizer.load(out).fingerprint == Tokenizer.train([texts[0], texts[2]], vocab_size=400).fingerprint
    assert "the tokenizer is trained on the first 1150 characters only" in caplog.text


# Long documents


def metaspace_tokenizer() -> Tokenizer:
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    core.train_from_iterator(documents(50), trainers.BpeTrainer(special_tokens=["<s>"], show_progress=False))
    return Tokenizer(core)


LONG = {
    "lines": "".join(documents(60)),
    "paragraphs": "\n".join(documents(60)),
    "spaces": " \n \n\t".join(documents(60)),
    "one line": " ".join(documents(60)).replace("\n", ""),
    "newlines": "\n" * 5000,
}


@pytest.mark.parametrize("name", LONG)
def test_a_long_document_keeps_its_tokens(tmp_path, tokenizer, small_steps, name):
    text = LONG[name]
    path = tmp_path / "a.txt"
    path.write_text(text)
    out = prepare([path], tmp_path / "out", tokenizer=tokenizer, shard_tokens=100)
    assert split_ids(out, "train") == [tokenizer.encode(text)]


@pytest.mark.parametrize(("name", "cut"), [("lines", True), ("paragraphs", True), ("one line", False)])
def test_long_documents_are_cut_where_they_can_be(tokenizer, small_steps, name, cut):
    pieces = list(module._pieces([Document(LONG[name], Position(0, 1))], tokenizer, first=0, every=None))
    assert "".join(piece.text for piece in pieces) == LONG[name]
    assert [piece.starts for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece.after for piece in pieces] == [None] * (len(pieces) - 1) + [Position(0, 1)]
    assert (max(len(piece.text) for piece in pieces) < 1000) == cut


def test_a_tokenizer_that_sees_cuts_gets_none(small_steps):
    tokenizer = metaspace_tokenizer()
    assert [
        piece.text for piece in module._pieces([Document(LONG["lines"], Position(0, 1))], tokenizer, first=0, every=2)
    ] == [LONG["lines"]]


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": -0.1}, "val_fraction must be between 0 and 0.5, got -0.1"),
        ({"val_fraction": 0.6}, "val_fraction must be between 0 and 0.5, got 0.6"),
        ({"vocab_size": 256}, r"vocab_size must be at least 257 \(all bytes and the boundary\), got 256"),
        ({"shard_tokens": 0}, "shard_tokens must be positive, got 0"),
    ],
)
def test_impossible_options_are_refused(tmp_path, options, message):
    path = write_jsonl(tmp_path / "a.jsonl", documents(2))
    with pytest.raises(ValueError, match=message):
        prepare([path], tmp_path / "out", **options)
    assert not (tmp_path / "out.partial").exists()


def test_nothing_but_empty_documents_is_an_error(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", ["", ""])
    with pytest.raises(ValueError, match=r"no text in .*a\.jsonl: all of its documents \(2\) are empty"):
        prepare([path], tmp_path / "out", tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()


def test_a_bad_file_stops_the_work_and_can_be_mended(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", documents(5))
    whole = path.read_text()
    path.write_text(whole + '{"txt": "fox"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl line 6 has no field 'text'"):
        prepare([path], tmp_path / "out", tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()
    path.write_text(whole)
    assert split_texts(prepare([path], tmp_path / "out", tokenizer=tokenizer, val_fraction=0.0), "train") == documents(
        5
    )


# The command


def test_the_command_prepares_and_says_what(tmp_path, tokenizer, capsys):
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", documents(2, seed=seed)) for seed, name in enumerate("ab")]
    tokenizer.save(tmp_path)
    options = ["--out", tmp_path / "out", "--tokenizer", tmp_path / "tokenizer.json", "--val-fraction", "0.25"]
    assert main(["prepare", *map(str, [*paths, *options])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}/out: {tokenizer.vocab_size} ids, boundary 0, uint16"
    for line, split, count in ((lines[1], "train", 3), (lines[2], "validation", 1)):
        entry = read_json(tmp_path / "out" / "manifest.json")["splits"][split]
        assert (
            line.split()
            == f"{split} {count} documents {entry['tokens']} tokens {entry['bytes']} bytes 1 shards".split()
        )
    assert Tokenizer.load(tmp_path / "out").fingerprint == tokenizer.fingerprint


def test_the_command_trains_a_tokenizer(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", [json.dumps(text) for text in documents(5)])
    assert main(["prepare", str(path), "--out", str(tmp_path / "out"), "--vocab-size", "300"]) == 0
    assert "300 ids" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--boundary", "<s>"], "--boundary <s> names a token of --tokenizer, which is not given"),
        (["--tokenizer", "TOKENIZER", "--vocab-size", "300"], "--vocab-size is for a tokenizer to train"),
        (["--tokenizer", "TOKENIZER", "--boundary", "<s>"], "the tokenizer has no token <s>"),
        (["--tokenizer", "nothing/here/"], "no tokenizer at nothing/here/: no such file or folder, and the hub says"),
        (["--text-field", "body"], "a.jsonl line 1 has no field 'body', only 'text'; name the field of the text"),
    ],
)
def test_the_command_answers_mistakes(tmp_path, tokenizer, capsys, options, message):
    path = write_jsonl(tmp_path / "a.jsonl", ["fox"])
    tokenizer.save(tmp_path)
    options = [option.replace("TOKENIZER", str(tmp_path)) for option in options]
    assert main(["prepare", str(path), "--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
