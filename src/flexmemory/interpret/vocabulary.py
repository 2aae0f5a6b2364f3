"""What a token is, apart from any model: its text, kind and count, and whether text can give it.

Tokens that no text gives, or that the training text did not hold, have rows that mean nothing: statements about the
vocabulary leave them out by `Vocabulary.mask` and say so by `mask_rule`.
"""

from __future__ import annotations

import dataclasses
import json
import unicodedata

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from flexmemory.tokenizer import Tokenizer

KINDS = (
    "special", "bytes", "space", "digits", "punctuation", "word", "capitalised word", "capitals", "piece",
    "capitalised piece", "other script", "mixed",
)  # fmt: skip
"""`word` begins with a space, `piece` does not; `bytes` is no whole UTF-8 text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The tokens of a tokenizer, by id."""

    text: tuple[str, ...]
    """As it stands in a text; undecodable bytes as U+FFFD, empty where the tokenizer has no such id."""
    raw: tuple[bytes, ...]
    """Bytes of UTF-8."""
    shown: tuple[str, ...]
    """For reading: spaces and line ends visible, bytes that are no text in hexadecimal."""
    kind: tuple[str, ...]
    """One of `KINDS`."""
    counts: Int64[Tensor, " V"] | None
    """Occurrences in a text."""
    reachable: Bool[Tensor, " V"]
    """Whether the token's own text is encoded to it; true where that cannot be tried (parts of characters)."""
    undertrained: Bool[Tensor, " V"]
    """Whether the counted text lacks it; nowhere true without counts."""
    mask: Bool[Tensor, " V"]
    """The tokens that statements are about."""

    @property
    def mask_rule(self) -> str:
        """Which tokens `mask` leaves out."""
        rule = "tokens that their own text does not give"
        return rule if self.counts is None else f"{rule}, and those that the counted text lacks"

    def __len__(self) -> int:
        return len(self.text)

    @classmethod
    def of(
        cls, tokenizer: Tokenizer, *, vocab_size: int | None = None, counts: Int64[Tensor, " V"] | None = None
    ) -> Vocabulary:
        """Describe every id.

        Args:
            tokenizer: Whose tokens.
            vocab_size: Ids of the model, where it has more than the tokenizer; those are unreachable.
            counts: Occurrences in the training text, or a sample of it.

        Raises:
            ValueError: `counts` or `vocab_size` are of another size.
        """
        size = vocab_size or tokenizer.vocab_size
        if size < tokenizer.vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids, the vocabulary only {size}")
        if counts is not None and len(counts) != size:
            raise ValueError(f"counts are of {len(counts)} ids, expected {size}")
        special = {i for i, token in tokenizer.core.get_added_tokens_decoder().items() if token.special}
        raw = tuple(_raw_bytes(tokenizer, size))
        text = tuple(each.decode("utf-8", errors="replace") for each in raw)
        whole = [each.decode("utf-8", errors="ignore").encode() == each for each in raw]
        reachable = torch.tensor([bool(each) for each in raw])
        tried = [i for i in range(size) if raw[i] and whole[i] and i not in special]
        encoded = tokenizer.encode_batch([text[i] for i in tried])
        reachable[tried] = torch.tensor([ids == [i] for i, ids in zip(tried, encoded, strict=True)], dtype=torch.bool)
        reachable[[i for i in special if i < size and i != tokenizer.boundary_id]] = False
        undertrained = torch.zeros(size, dtype=torch.bool) if counts is None else counts == 0
        return cls(
            text=text,
            raw=raw,
            shown=tuple(show(each) for each in raw),
            kind=tuple("special" if i in special or not raw[i] else kind_of(raw[i]) for i in range(size)),
            counts=counts,
            reachable=reachable,
            undertrained=undertrained,
            mask=reachable & ~undertrained,
        )


def show(raw: bytes) -> str:
    """A token for reading: `\N{OPEN BOX}` for a space, escapes for control characters, `<0xE2 0x96>` for no text."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return f"<{' '.join(f'0x{byte:02X}' for byte in raw)}>"
    escapes = {" ": "\N{OPEN BOX}", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return "".join(
        escapes.get(c, c if c.isprintable() else f"\\u{{{ord(c):x}}}")  # a no-break space is not printable
        for c in text
    )


def kind_of(raw: bytes) -> str:
    """The kind of string that a token is, one of `KINDS` other than `special`."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes"
    body = text.strip()
    if not body:
        return "space"
    if body.isdigit():
        return "digits"
    if all(unicodedata.category(c)[0] in "PS" for c in body):
        return "punctuation"
    letters = [c for c in body if c.isalpha()]
    if not letters or not all(c.isalpha() or unicodedata.category(c)[0] == "M" for c in body):
        return "mixed"
    if not all(unicodedata.name(c, "").startswith("LATIN") for c in letters):
        return "other script"
    if len(body) > 1 and body.isupper():
        return "capitals"
    place = "word" if text[0].isspace() else "piece"
    return f"capitalised {place}" if body[0].isupper() else place


def _raw_bytes(tokenizer: Tokenizer, size: int) -> list[bytes]:
    """Bytes of every token; none where there is no such id."""
    core = tokenizer.core
    added = core.get_added_tokens_decoder()
    byte_level = '"ByteLevel"' in json.dumps(json.loads(core.to_str()).get("decoder"))
    alphabet = _byte_of_character() if byte_level else {}
    found = []
    for token_id in range(size):
        name = core.id_to_token(token_id)
        if name is None:
            found.append(b"")
        elif token_id in added or not all(c in alphabet for c in name):
            found.append((name if token_id in added else core.decode([token_id])).encode())
        else:
            found.append(bytes(alphabet[c] for c in name))
    return found


def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable bytes stand for themselves, others for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
