"""Text survives tokens, tokens never lie about boundaries, and what is saved is what is loaded."""

import gzip
import json
import lzma
from pathlib import Path

import huggingface_hub.constants
import pytest
import tokenizers
from tokenizers import models

from flexmemory.tokenizer import BOUNDARY, Tokenizer, until_stop

TEXT = "The cache holds rows. Nothing is lost, nothing is added: a row is a row is a row.\n" * 20
STRANGE = [
    "",
    " ",
    "\r\n\ttabs and  spaces \n\n",
    "naïve café, 東京, Ελλάδα, עברית",
    "👩‍🚀🏳️‍🌈 \U0010ffff \x00 \x7f \u200d \ufeff",
    "e\u0301 is not \u00e9",
    "".join(map(chr, range(256))),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT], vocab_size=280)


def changed(tokenizer: Tokenizer, **changes: object) -> tokenizers.Tokenizer:
    """The core of `tokenizer` with other entries in its JSON."""
    return tokenizers.Tokenizer.from_str(json.dumps(json.loads(tokenizer.core.to_str()) | changes))


@pytest.mark.parametrize("text", STRANGE)
def test_text_survives(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(tokenizer.decode_stream(ids)) == text


def test_a_batch_is_its_texts(tokenizer):
    assert tokenizer.encode_batch([*STRANGE, TEXT]) == [tokenizer.encode(text) for text in [*STRANGE, TEXT]]


def test_training_learns_merges_within_the_size(tokenizer):
    assert tokenizer.vocab_size == 280
    assert len(tokenizer.encode(TEXT)) < 0.8 * len(TEXT)


def test_a_stream_gives_whole_characters_only(tokenizer):
    ids = tokenizer.encode("é👩")
    assert len(ids) == 6
    pieces = [list(tokenizer.decode_stream(ids[:count])) for count in range(7)]
    assert pieces == [[], [], ["é"], ["é"], ["é"], ["é"], ["é", "👩"]]


def test_decoding_leaves_boundaries_out(tokenizer):
    ids = [tokenizer.boundary_id, *tokenizer.encode("row"), tokenizer.boundary_id, *tokenizer.encode(" is")]
    assert tokenizer.decode(ids) == "row is"
    assert "".join(tokenizer.decode_stream(ids)) == "row is"


def test_a_token_has_a_readable_form(tokenizer):
    assert tokenizer.token(tokenizer.boundary_id) == BOUNDARY
    assert tokenizer.token(tokenizer.encode("a")[0]) == "a"
    assert "\ufffd" not in tokenizer.token(tokenizer.encode("é")[0])


@pytest.mark.parametrize("added", ["as trained", "not special", "not listed"])
def test_text_never_becomes_the_boundary(tokenizer, added):
    (token,) = json.loads(tokenizer.core.to_str())["added_tokens"]
    lists = {"as trained": [token], "not special": [token | {"special": False}], "not listed": []}
    other = Tokenizer(changed(tokenizer, added_tokens=lists[added]))
    text = f"row{BOUNDARY}row {BOUNDARY} {BOUNDARY}"
    for ids in (other.encode(text), other.encode_batch([text])[0]):
        assert other.boundary_id not in ids
        assert other.decode(ids) == text
        assert other.decode([other.boundary_id, *ids]) == text


def test_long_texts_are_not_cut_and_short_ones_not_padded(tokenizer):
    core = changed(tokenizer)
    core.enable_truncation(4)
    core.enable_padding(length=8)
    other = Tokenizer(core)
    assert other.encode(TEXT) == tokenizer.encode(TEXT)
    assert other.encode_batch(["a", TEXT]) == [tokenizer.encode("a"), tokenizer.encode(TEXT)]


def test_the_boundary_is_found_or_named():
    core = tokenizers.Tokenizer(models.WordLevel({"<s>": 3, "<|begin_of_text|>": 7, "[SEP]": 5}))
    assert Tokenizer(core).boundary_id == 7
    assert Tokenizer(core, boundary="<s>").boundary_id == 3
    assert Tokenizer(core).vocab_size == 8
    with pytest.raises(ValueError, match="has no token </s>; name its document boundary token"):
        Tokenizer(core, boundary="</s>")
    with pytest.raises(ValueError, match=r"no token <\|begin_of_text\|> or .*name its document boundary"):
        Tokenizer(tokenizers.Tokenizer(models.WordLevel({"[SEP]": 5})))


def test_saving_keeps_the_fingerprint(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for source in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = Tokenizer.load(source)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
    assert Tokenizer.train([TEXT], vocab_size=281).fingerprint != tokenizer.fingerprint


def test_training_is_deterministic(tokenizer):
    assert Tokenizer.train([TEXT], vocab_size=280).fingerprint == tokenizer.fingerprint


def test_a_folder_remembers_its_boundary(tmp_path):
    core = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "[SEP]": 1}))
    saved = Tokenizer(core, boundary="[SEP]")
    saved.save(tmp_path)
    assert Tokenizer.load(tmp_path).boundary_id == 1
    assert Tokenizer.load(tmp_path, boundary="<s>").boundary_id == 0
    assert Tokenizer.load(tmp_path, boundary="<s>").fingerprint != saved.fingerprint


@pytest.mark.parametrize(("suffix", "module"), [(".gz", gzip), (".xz", lzma)])
def test_a_compressed_file_is_read(tokenizer, tmp_path, suffix, module):
    path = tmp_path / f"tokenizer.json{suffix}"
    path.write_bytes(module.compress(tokenizer.core.to_str().encode()))
    assert Tokenizer.load(path).fingerprint == tokenizer.fingerprint
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
        Tokenizer.load(path)


@pytest.mark.parametrize("content", ["", "{}", "no json"])
def test_another_file_is_no_tokenizer(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{path} is not a tokenizer.json"):
        Tokenizer.load(path)


@pytest.mark.parametrize("name", ["", "tokenizer.json"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"no tokenizer at {tmp_path}"):
        Tokenizer.load(tmp_path / name)


def test_the_hub_is_asked(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no tokenizer at owner/name: no such file or folder, and the hub says"):
        Tokenizer.from_hub("owner/name")
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    Path(repository, "refs").mkdir()
    Path(repository, "refs", "main").write_text(snapshot.name)
    tokenizer.save(snapshot)
    assert Tokenizer.from_hub("owner/name").fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    ("pieces", "stops", "text"),
    [
        (["ab", "cd"], [], "abcd"),
        (["ab", "cd"], ["c"], "ab"),
        (["ab", "cd", "ef"], ["de"], "abc"),
        (["a", "b", "c", "d"], ["bcx"], "abcd"),
        (["aab", "aac"], ["aac", "ba"], "aa"),
        (["x\n", "\n", "y"], ["\n\n"], "x"),
        (["abc"], ["abc"], ""),
    ],
)
def test_until_stop(pieces, stops, text):
    assert "".join(until_stop(pieces, stops)) == text


def test_until_stop_holds_back_no_more_than_needed():
    assert list(until_stop(["ab", "c", "d"], ["cx"])) == ["ab", "cd"]
