"""Streams interleaved in fixed shares: the shares hold everywhere, and an item's place is that of counting up to it."""

import random

import pytest

from flexmemory.train.interleave import Interleaving

WEIGHTS = [[1], [1, 1], [7, 3], [1, 1, 1], [3, 2, 1], [1000, 1], [999, 1, 1], [1, 2, 4, 8, 16, 32, 64], [5] * 12]


def random_weights(seed):
    rng = random.Random(seed)
    return [int(1.6 ** rng.uniform(0, 16)) for _ in range(rng.randint(2, 12))]


@pytest.mark.parametrize("weights", [*WEIGHTS, *map(random_weights, range(20))], ids=str)
def test_every_prefix_has_the_shares_and_every_stream_is_counted(weights):
    interleaving = Interleaving(weights)
    limit = 1 if len(weights) <= 3 else 2
    counts = [0] * len(weights)
    for number in range(2000):
        stream, before = interleaving.place(number)
        assert before == counts[stream]
        counts[stream] += 1
        wanted = [(number + 1) * weight / sum(weights) for weight in weights]
        assert max(abs(count - want) for count, want in zip(counts, wanted, strict=True)) < limit


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_shares_are_exact_after_the_sum_of_weights(weights):
    interleaving = Interleaving(weights)
    total = sum(weights)
    for start in (0, total, 10**15 * total):
        streams = [interleaving.place(number)[0] for number in range(start, start + total)]
        assert [streams.count(stream) for stream in range(len(weights))] == weights


def test_places_never_change_between_versions():
    interleaving = Interleaving([5, 2, 1])
    assert "".join(str(interleaving.place(number)[0]) for number in range(16)) == "0100201001002010"


def test_a_stream_without_weight_has_no_place():
    interleaving = Interleaving([0, 2, 0, 1, 0])
    assert {interleaving.place(number)[0] for number in range(100)} == {1, 3}
