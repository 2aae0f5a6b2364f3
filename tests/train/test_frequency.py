"""Counts of tokens: all of them, across shards and chunks."""

import numpy as np
import pytest
import torch

from flexmemory.train import frequency
from flexmemory.train.data import TokenStream
from flexmemory.train.frequency import token_counts


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_every_token_is_counted_once(chunk, monkeypatch):
    monkeypatch.setattr(frequency, "CHUNK_TOKENS", chunk)
    shards = [np.array([3, 1, 3, 7, 3], dtype="<u2"), np.array([7, 0, 3], dtype="<u2")]
    counts = token_counts(TokenStream(shards, vocab_size=8, num_bytes=0), vocab_size=10)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [1, 1, 0, 4, 0, 0, 0, 2, 0, 0]


def test_nothing_is_counted_in_nothing():
    assert token_counts(TokenStream([], vocab_size=8, num_bytes=0), vocab_size=3).tolist() == [0, 0, 0]


def test_ids_that_are_not_in_the_vocabulary_are_refused():
    stream = TokenStream([np.array([3, 9], dtype="<u2")], vocab_size=10, num_bytes=0, name="train of data")
    with pytest.raises(ValueError, match="train of data holds token id 9, expected ids below 9"):
        token_counts(stream, vocab_size=9)
