"""What a token is."""

import pytest
import tokenizers
import torch
from tokenizers import models

from flexmemory.interpret.vocabulary import KINDS, Vocabulary, kind_of, show
from flexmemory.tokenizer import BOUNDARY, Tokenizer

TEXT = ["The cat sat on the mat, and the dog 12 times. " * 20 + "Z\u00fcrich \u043c\u0438\u0440 NASA\n\tx1"] * 3


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXT, vocab_size=330)


def test_bytes_are_those_of_the_text(tokenizer):
    vocabulary = Vocabulary.of(tokenizer)
    assert len(vocabulary) == tokenizer.vocab_size
    for text in (TEXT[0], "na\u00efve \U0001f600 \u2026\r\n", "\x00\x7f"):
        assert b"".join(vocabulary.raw[i] for i in tokenizer.encode(text)) == text.encode()
    assert len({vocabulary.raw[i] for i in range(1, len(vocabulary))}) == len(vocabulary) - 1


def test_kinds_and_what_is_shown(tokenizer):
    vocabulary = Vocabulary.of(tokenizer)
    assert set(vocabulary.kind) <= set(KINDS)
    of = {
        raw: (kind, shown) for raw, kind, shown in zip(vocabulary.raw, vocabulary.kind, vocabulary.shown, strict=True)
    }
    assert of[b" the"] == ("word", "\u2423the")
    assert of[b"\n"] == ("space", "\\n")
    assert of[b"\xff"] == ("bytes", "<0xFF>")
    assert of[BOUNDARY.encode()] == ("special", BOUNDARY)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (" The", "capitalised word"), ("The", "capitalised piece"), ("ing", "piece"), (" NASA", "capitals"),
        (" I", "capitalised word"), ("12", "digits"), (" ...", "punctuation"), ("$", "punctuation"), (" \n", "space"),
        (" x1", "mixed"), ("\u043c\u0438\u0440", "other script"),
        ("Z\u00fcrich", "capitalised piece"), ("n't", "mixed"), ("\u0301", "mixed"),
    ],
)  # fmt: skip
def test_kind(text, kind):
    assert kind_of(text.encode()) == kind


def test_show_makes_everything_visible():
    assert show(" a\u00a0\x07".encode()) == "\u2423a\\u{a0}\\u{7}"


def test_reachable_tokens_are_those_that_their_text_gives(tokenizer):
    vocabulary = Vocabulary.of(tokenizer, vocab_size=tokenizer.vocab_size + 5)
    assert not vocabulary.reachable[-5:].any()
    assert vocabulary.text[-1] == ""
    assert vocabulary.reachable[tokenizer.boundary_id]  # every document begins with it
    for token_id in range(1, tokenizer.vocab_size):
        text = vocabulary.text[token_id]
        expected = "\ufffd" in text or tokenizer.encode(text) == [token_id]
        assert bool(vocabulary.reachable[token_id]) == expected, text
    assert torch.equal(vocabulary.mask, vocabulary.reachable)
    assert "counted" not in vocabulary.mask_rule


def test_tokens_that_a_text_lacks_are_left_out(tokenizer):
    counts = torch.ones(tokenizer.vocab_size, dtype=torch.int64)
    counts[[5, 9]] = 0
    vocabulary = Vocabulary.of(tokenizer, counts=counts)
    assert vocabulary.undertrained.nonzero()[:, 0].tolist() == [5, 9]
    assert not vocabulary.mask[[5, 9]].any()
    assert "counted text lacks" in vocabulary.mask_rule


def test_a_tokenizer_that_is_not_of_bytes():
    core = tokenizers.Tokenizer(models.WordLevel({BOUNDARY: 0, "hello": 1, "world": 3}, unk_token=BOUNDARY))
    vocabulary = Vocabulary.of(Tokenizer(core))
    assert vocabulary.raw == (BOUNDARY.encode(), b"hello", b"", b"world")
    assert vocabulary.reachable.tolist() == [True, True, False, True]


def test_sizes_are_checked(tokenizer):
    with pytest.raises(ValueError, match="counts are of 3 ids"):
        Vocabulary.of(tokenizer, counts=torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="the vocabulary only 10"):
        Vocabulary.of(tokenizer, vocab_size=10)
