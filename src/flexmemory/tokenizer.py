"""Text to token ids and back, over the `tokenizers` library.

Every document starts with one boundary token, in training as in prompts, so a model knows where text begins. Text
never encodes to it: a literal `<|endoftext|>` in a text is the characters that it is made of.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import lzma
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from flexmemory.storage import read_json, write_json

BOUNDARY = "<|endoftext|>"
_KNOWN_BOUNDARIES = ("<|begin_of_text|>", BOUNDARY, "<s>", "<bos>", "[BOS]", "<|bos|>")


class Tokenizer:
    """A `tokenizers` tokenizer and the token that marks document boundaries."""

    def __init__(self, core: tokenizers.Tokenizer, *, boundary: str | None = None) -> None:
        """Wrap `core`; without `boundary`, the first well-known boundary token of its vocabulary is taken.

        `core` is set to encode whole texts, as nothing but text: no truncation, padding or special tokens.

        Raises:
            ValueError: the boundary token is not in the vocabulary, or none is known.
        """
        known = (boundary,) if boundary else _KNOWN_BOUNDARIES
        ids = ((token, core.token_to_id(token)) for token in known)
        found = next(((token, token_id) for token, token_id in ids if token_id is not None), None)
        if found is None:
            raise ValueError(f"the tokenizer has no token {' or '.join(known)}; name its document boundary token")
        self.core = core
        self.boundary, self.boundary_id = found
        core.no_truncation()
        core.no_padding()
        core.encode_special_tokens = True
        added = core.get_added_tokens_decoder().get(self.boundary_id)
        if added is None or not added.special:
            core.add_special_tokens([self.boundary])

    @classmethod
    def load(cls, source: str | Path, *, boundary: str | None = None) -> Tokenizer:
        """Read a `tokenizer.json` (plain, `.gz` or `.xz`), or the folder that holds one.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a tokenizer.
        """
        path = Path(source)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer at {path}")
        settings = path.with_name("tokenizer_config.json")
        if boundary is None and settings.is_file():
            token = read_json(settings).get("bos_token")
            boundary = token if isinstance(token, str) else None
        opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
        try:
            with opener(path, "rb") as file:
                core = tokenizers.Tokenizer.from_buffer(file.read())
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path} is not a tokenizer.json ({error})") from error
        return cls(core, boundary=boundary)

    @classmethod
    def from_hub(cls, name: str, *, boundary: str | None = None) -> Tokenizer:
        """Fetch the tokenizer of the hub repository `name`, or take it from the hub's cache on this machine.

        Raises:
            FileNotFoundError: the hub has no such tokenizer, or cannot be reached.
        """
        try:
            core = tokenizers.Tokenizer.from_pretrained(name)
        except Exception as error:  # of many types: the network's, the hub's, the library's
            raise FileNotFoundError(
                f"no tokenizer at {name}: no such file or folder, and the hub says: {error}"
            ) from error
        return cls(core, boundary=boundary)

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
        """Train a byte-level BPE of at most `vocab_size` ids on `texts`."""
        core = tokenizers.Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        core.post_processor = processors.ByteLevel(trim_offsets=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[BOUNDARY],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        core.train_from_iterator(texts, trainer)
        return cls(core)

    @property
    def vocab_size(self) -> int:
        """V: one more than the largest id."""
        return max(self.core.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what defines the mapping from text to ids."""
        content = json.dumps([json.loads(self.core.to_str()), self.boundary], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without a boundary token."""
        return self.core.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        return [item.ids for item in self.core.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids`; boundary tokens are left out."""
        return self.core.decode([int(token) for token in token_ids], skip_special_tokens=True)

    def decode_stream(self, token_ids: Iterable[int]) -> Iterator[str]:
        """Text of `token_ids` in pieces, each as soon as it is complete UTF-8."""
        step = self.decode_steps()
        for token in token_ids:
            if piece := step(token):
                yield piece

    def decode_steps(self) -> Callable[[int], str]:
        """`decode_stream` for who is given tokens: a function of one after the other, to what text it completes."""
        stream = decoders.DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(self.core, token) or ""

    def token(self, token_id: int) -> str:
        """The readable form of one token: its text, or its raw name where it is no whole text."""
        text = self.core.decode([token_id], skip_special_tokens=False)
        return text if text and "\ufffd" not in text else str(self.core.id_to_token(token_id))

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` (the names that transformers reads)."""
        (folder / "tokenizer.json").write_text(self.core.to_str(), encoding="utf-8")
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.boundary,
            "eos_token": self.boundary,
        }
        write_json(folder / "tokenizer_config.json", settings)


def until_stop(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """Pass text on as it comes, up to the first of `stops`; a possible beginning of one is held back."""
    watch = StopWatch(stops)
    for piece in pieces:
        if text := watch.push(piece):
            yield text
        if watch.stopped:
            return
    if watch.held:
        yield watch.held


class StopWatch:
    """`until_stop` for who is given text."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Watch for the first of `stops`."""
        self._stops = stops
        self.held = ""
        """What may be the beginning of a stop: text, where nothing follows."""
        self.stopped = False
        """Whether a stop came; what follows is not passed on."""

    def push(self, piece: str) -> str:
        """Take the next piece; what can be passed on."""
        text = self.held + piece
        found = [text.index(stop) for stop in self._stops if stop in text]
        if found:
            self.held, self.stopped = "", True
            return text[: min(found)]
        keep = max((n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]
