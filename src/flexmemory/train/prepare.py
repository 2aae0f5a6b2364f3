"""Documents to token shards (docs/data.md): each document is the boundary token and then its tokens.

Work happens in `OUT.partial`, which is renamed when whole. Run again after an interruption, it goes on after the last
commit and ends with the bytes of a run that was not interrupted.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from flexmemory.storage import Progress, publish, write_json
from flexmemory.tokenizer import Tokenizer
from flexmemory.train.data import FORMAT, FORMAT_VERSION
from flexmemory.train.documents import Document, Position, Source, find_sources, read_documents
from flexmemory.train.shards import ShardWriter

VOCAB_SIZE = 32_768
SMALLEST_VOCAB = 257
"""All bytes and the boundary token."""
SHARD_TOKENS = 2**27
TOKENIZER_CHARACTERS = 2**30
"""Text that a tokenizer is trained on, at most; only counts of its words stay in memory."""
BATCH_CHARACTERS = 2**22
"""Text encoded at once; the library takes about 100 bytes for each."""
PIECE_CHARACTERS = 2**18
"""Longer documents are encoded in pieces of about this size."""
COMMIT_BYTES = 2**26
"""Text between two points to go on from."""
_CUT = re.compile(r"(?<=\S)(?=\n)|(?<=\n)(?=\S)")
_CUT_TRIES = 16
_CUT_CONTEXT = 256

logger = logging.getLogger(__name__)


class Piece(NamedTuple):
    """A document or a part of one."""

    text: str
    """Empty only for an empty document."""
    split: str
    starts: bool
    """Whether the document starts here."""
    after: Position | None
    """Where the stream goes on, if the document ends here."""


def prepare(
    inputs: Sequence[str | Path],
    out: Path,
    *,
    tokenizer: Tokenizer | None = None,
    vocab_size: int = VOCAB_SIZE,
    val_fraction: float = 0.01,
    text_field: str = "text",
    shard_tokens: int = SHARD_TOKENS,
    exclude_dirs: Collection[str] = (),
) -> Path:
    """Tokenise `inputs` into the new folder `out` and return it; run again after an interruption, it goes on.

    Args:
        inputs: Files, folders and `hf:OWNER/NAME[@REVISION][/CONFIG][:SPLIT]`.
        out: The folder to make.
        tokenizer: By default a byte-level BPE, trained on the first 2^30 characters of the training documents.
        vocab_size: Ids of that BPE, at most.
        val_fraction: Share of documents to hold out: with n = round(1 / val_fraction), documents 1, n + 1, 2 n + 1, ...
            counted from 0 without the empty ones. 0 holds none out.
        text_field: Field of the text in JSON lines, Parquet and hub data sets.
        shard_tokens: Tokens in one file, at most.
        exclude_dirs: Names of folders to leave out.

    Raises:
        FileExistsError: `out` exists.
        ImportError: an input needs an optional package.
        OSError: an input is missing or cannot be read, or the disk is full; nothing that was done is lost.
        ValueError: an input or option is bad, or `OUT.partial` holds unfinished work on other inputs or options.
    """
    if out.exists():
        raise FileExistsError(f"{out} already exists; choose another folder or remove it")
    if not 0 <= val_fraction <= 0.5:
        raise ValueError(f"val_fraction must be between 0 and 0.5, got {val_fraction}")
    if vocab_size < SMALLEST_VOCAB:
        raise ValueError(f"vocab_size must be at least {SMALLEST_VOCAB} (all bytes and the boundary), got {vocab_size}")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens must be positive, got {shard_tokens}")
    sources = find_sources(inputs, exclude_dirs=exclude_dirs)
    identity = {
        "inputs": [str(name) for name in inputs],
        "files": hashlib.sha256(json.dumps(sources).encode()).hexdigest(),
        "tokenizer": tokenizer.fingerprint if tokenizer else f"trained, at most {vocab_size} ids",
        "val_fraction": val_fraction,
        "text_field": text_field,
        "shard_tokens": shard_tokens,
    }
    partial = out.with_name(f"{out.name}.partial")
    try:
        with Progress.open(partial, identity) as progress:
            manifest = _fill(partial, progress, sources, identity, tokenizer=tokenizer, vocab_size=vocab_size)
            write_json(partial / "manifest.json", manifest)
            publish(partial, out)
            (out / Progress.NAME).unlink()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        message = f"{error.strerror}; {partial} keeps what is done: make room and run the same command again"
        raise OSError(error.errno, message) from error
    return out


def _fill(
    folder: Path,
    progress: Progress,
    sources: Sequence[Source],
    identity: dict[str, Any],
    *,
    tokenizer: Tokenizer | None,
    vocab_size: int,
) -> dict[str, Any]:
    """Do what is left to do in `folder`; returns its manifest."""
    text_field, val_fraction = identity["text_field"], identity["val_fraction"]
    every = round(1 / val_fraction) if val_fraction else None
    if progress.lines:
        tokenizer = _saved_tokenizer(folder, progress)
    else:
        tokenizer = tokenizer or _train_tokenizer(
            read_documents(sources, text_field=text_field), every=every, vocab_size=vocab_size
        )
        tokenizer.save(folder)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    writer = ShardWriter(
        folder,
        progress,
        tokenizer=tokenizer.fingerprint,
        dtype=dtype.newbyteorder("<"),
        shard_tokens=identity["shard_tokens"],
    )
    state = writer.state
    if state.documents:
        logger.info("%s: going on after %d documents", folder, state.documents)
    documents = read_documents(sources, text_field=text_field, start=state.position)
    _write(_batches(_pieces(documents, tokenizer, first=state.documents, every=every)), tokenizer, writer)
    inputs = ", ".join(identity["inputs"])
    if state.documents == 0:
        raise ValueError(f"no text in {inputs}: all of its documents ({state.empty}) are empty")
    if state.empty:
        logger.info("%s: %d empty documents are left out", inputs, state.empty)
    if every and state.documents == 1:
        logger.warning("%s: one document only, so none is held out for validation", inputs)
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "dtype": dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "boundary_id": tokenizer.boundary_id,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "splits": writer.describe(),
        "inputs": identity["inputs"],
    }


def _split(index: int, every: int | None) -> str:
    return "validation" if every and index % every == 1 else "train"


def _saved_tokenizer(folder: Path, progress: Progress) -> Tokenizer:
    tokenizer = Tokenizer.load(folder)
    if tokenizer.fingerprint != progress.lines[-1]["tokenizer"]:
        raise ValueError(f"{folder}/tokenizer.json is not as it was written; remove {folder} and start again")
    return tokenizer


def _train_tokenizer(documents: Iterable[Document], *, every: int | None, vocab_size: int) -> Tokenizer:
    def texts() -> Iterator[str]:
        used = 0
        for index, document in enumerate(document for document in documents if document.text):
            if _split(index, every) == "train":
                # A slice may halve a word; a whole giant document would take 100 times its size in memory.
                for start in range(0, len(document.text), PIECE_CHARACTERS):
                    yield document.text[start : start + PIECE_CHARACTERS]
                used += len(document.text)
            if used >= TOKENIZER_CHARACTERS:
                logger.warning("the tokenizer is trained on the first %d characters only", used)
                return

    logger.info("training a tokenizer of at most %d ids", vocab_size)
    return Tokenizer.train(texts(), vocab_size=vocab_size)


def _pieces(documents: Iterable[Document], tokenizer: Tokenizer, *, first: int, every: int | None) -> Iterator[Piece]:
    """Documents in pieces, whose tokens put together are the document's; `first` documents came before."""
    index = first
    for text, after in documents:
        *cuts, end = *_cuts(text, tokenizer), len(text)
        starts = [0, *cuts]
        for start, stop in zip(starts, [*cuts, end], strict=True):
            yield Piece(text[start:stop], _split(index, every), start == 0, after if stop == end else None)
        index += bool(text)


def _cuts(text: str, tokenizer: Tokenizer) -> Iterator[int]:
    """Places by line ends where `text` can be cut and keep its tokens; none where the tokenizer has no such places."""
    for start in range(PIECE_CHARACTERS, len(text) - PIECE_CHARACTERS, PIECE_CHARACTERS):
        tries = itertools.islice(_CUT.finditer(text, start, start + PIECE_CHARACTERS), _CUT_TRIES)
        places = (match.start() for match in tries)
        place = next((place for place in places if _cuts_cleanly(text, place, tokenizer)), None)
        if place is not None:
            yield place


def _cuts_cleanly(text: str, place: int, tokenizer: Tokenizer) -> bool:
    left, right = text[max(0, place - _CUT_CONTEXT) : place], text[place : place + _CUT_CONTEXT]
    return tokenizer.encode(left + right) == tokenizer.encode(left) + tokenizer.encode(right)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text) + 1
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write(batches: Iterator[list[Piece]], tokenizer: Tokenizer, writer: ShardWriter) -> None:
    """Encode each batch while a thread reads the next, append its tokens, and commit from time to time."""
    state = writer.state
    committed = state.bytes
    with (
        ThreadPoolExecutor(max_workers=1, thread_name_prefix="documents") as pool,
        tqdm(desc="preparing", unit="B", unit_scale=True, initial=state.bytes, disable=None) as bar,
    ):
        ahead = pool.submit(next, batches, None)
        while batch := ahead.result():
            ahead = pool.submit(next, batches, None)
            _append(batch, tokenizer.encode_batch([piece.text for piece in batch]), tokenizer, writer)
            if batch[-1].after and state.bytes >= committed + COMMIT_BYTES:
                writer.commit()
                committed = state.bytes
            bar.set_postfix(documents=state.documents, tokens=state.tokens, refresh=False)
            bar.update(state.bytes - bar.n)
    writer.commit()


def _append(batch: Sequence[Piece], encoded: Sequence[list[int]], tokenizer: Tokenizer, writer: ShardWriter) -> None:
    state = writer.state
    for name, split in state.splits.items():
        found = [(piece, ids) for piece, ids in zip(batch, encoded, strict=True) if piece.text and piece.split == name]
        starts = sum(piece.starts for piece, _ in found)
        ids = [[tokenizer.boundary_id] * piece.starts + ids for piece, ids in found]
        tokens = np.fromiter(itertools.chain.from_iterable(ids), dtype=np.uint32)  # (N,)
        if np.count_nonzero(tokens == tokenizer.boundary_id) != starts:
            raise ValueError(f"the tokenizer makes {tokenizer.boundary!r} of some text; take another --boundary")
        split.documents += starts
        split.bytes += sum(len(piece.text.encode()) for piece, _ in found)
        writer.append(name, tokens)
    state.empty += sum(not piece.text for piece in batch)
    state.position = next((piece.after for piece in reversed(batch) if piece.after), state.position)
