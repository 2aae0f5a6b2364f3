"""A short stream of real text to decode with random weights, each token written as its rank by frequency.

    flexmemory prepare TEXT... --tokenizer LLAMA3_TOKENIZER_JSON --out runs/llama
    python benchmarks/stream.py --data runs/llama --out runs/stream.bin

Ranks are by the training split (0 the most frequent), the tokens the first of the validation split: which rows are
frequent is learnt on other text than the one that asks for them. Random weights do not mind what an id is called, and
so the rows of the N most frequent tokens are a table of N rows. The file is little-endian uint32.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from flexmemory.tol.counts import most_frequent
from flexmemory.train.data import TokenDataset
from flexmemory.train.frequency import token_counts


def ranked_stream(data: Path, count: int) -> np.ndarray:
    """The first `count` held-out tokens, as ranks."""
    dataset = TokenDataset.open(data)
    order = most_frequent(token_counts(dataset.train, vocab_size=dataset.vocab_size), dataset.vocab_size).numpy()
    ranks = np.empty(dataset.vocab_size, np.uint32)
    ranks[order] = np.arange(dataset.vocab_size, dtype=np.uint32)
    held_out = dataset.validation
    if held_out is None or len(held_out) < count:
        raise SystemExit(f"{data} holds too little out for {count} tokens")
    return ranks[held_out.read(0, count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="what `flexmemory prepare` wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=100_000)
    args = parser.parse_args()
    stream = ranked_stream(args.data, args.tokens)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    stream.astype("<u4").tofile(args.out)
    for hot in (1024, 4096, 8192, 16_384, 40_000):
        print(f"{(stream < hot).mean():.1%} of {len(stream):,} tokens are among the {hot:,} most frequent")


if __name__ == "__main__":
    main()
