"""`flexmemory prepare INPUT... --out DIR`: text to token shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from flexmemory.storage import read_json
from flexmemory.tokenizer import Tokenizer
from flexmemory.train.prepare import SHARD_TOKENS, VOCAB_SIZE, prepare


def prepare_text(
    inputs: Annotated[tuple[str, ...], tyro.conf.Positional],
    /,
    *,
    out: Path,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    boundary: str | None = None,
    val_fraction: float = 0.01,
    text_field: str = "text",
    shard_tokens: int = SHARD_TOKENS,
) -> None:
    """Tokenise text into a new folder; run again, it goes on where it was interrupted.

    Args:
        inputs: Files or folders of .txt, .md, .py, .jsonl (also .gz, .xz, .bz2, .zst) or .parquet, or
            hf:OWNER/NAME[@REVISION][/CONFIG][:SPLIT].
        out: The folder to make.
        tokenizer: A tokenizer.json (also .gz or .xz), a folder that holds one, or a hub repository; by default a
            byte-level BPE is trained on the input.
        vocab_size: Ids of the trained tokenizer, at most; 32768 if not given.
        boundary: The token of --tokenizer that starts each document; by default the well-known one that it has.
        val_fraction: Share of documents to hold out for validation.
        text_field: Field of the text in JSON lines, Parquet and hub data sets.
        shard_tokens: Tokens in one file, at most.
    """
    if tokenizer is None and boundary is not None:
        raise ValueError(f"--boundary {boundary} names a token of --tokenizer, which is not given")
    if tokenizer is not None and vocab_size is not None:
        raise ValueError("--vocab-size is for a tokenizer to train; leave out it or --tokenizer")
    folder = prepare(
        inputs,
        out,
        tokenizer=None if tokenizer is None else _find_tokenizer(tokenizer, boundary),
        vocab_size=VOCAB_SIZE if vocab_size is None else vocab_size,
        val_fraction=val_fraction,
        text_field=text_field,
        shard_tokens=shard_tokens,
    )
    print(describe(folder))


def describe(folder: Path) -> str:
    """The text that `flexmemory prepare` prints."""
    manifest = read_json(folder / "manifest.json")
    lines = [f"{folder}: {manifest['vocab_size']:,} ids, boundary {manifest['boundary_id']}, {manifest['dtype']}"]
    for name, split in manifest["splits"].items():
        lines.append(
            f"  {name:<12}{split['documents']:>12,} documents {split['tokens']:>16,} tokens "
            f"{split['bytes']:>18,} bytes {len(split['shards']):>6,} shards"
        )
    return "\n".join(lines)


def _find_tokenizer(name: str, boundary: str | None) -> Tokenizer:
    load = Tokenizer.load if Path(name).exists() else Tokenizer.from_hub
    return load(name, boundary=boundary)


def main(argv: list[str]) -> int:
    """Entry point of the verb."""
    tyro.cli(prepare_text, args=argv, prog="flexmemory prepare")
    return 0
