"""Requests in batches equal requests one at a time."""

import numpy as np
import pytest
import torch

from flexmemory.evaluate.likelihood import Continuations, Pair, Request, encode_requests
from flexmemory.evaluate.probes import scaled_ffn
from flexmemory.model.transformer import Transformer
from flexmemory.tokenizer import Tokenizer
from tests.conftest import VARIED, random_model


def naive(model: Transformer, pair: Pair) -> tuple[float, bool]:
    """One request alone: its tokens one after the other, all logits, the last `max_seq_len` tokens before each cut."""
    tokens = [*pair.context, *pair.continuation]
    first = max(0, len(tokens) - model.config.max_seq_len - 1)  # nothing further left is seen
    total, greedy = 0.0, True
    for place in range(len(pair.context), len(tokens)):
        with torch.no_grad():
            logits = model(torch.tensor([tokens[first:place]]))[0, -1]
        total += float(logits.log_softmax(dim=0)[tokens[place]])
        greedy &= int(logits.argmax()) == tokens[place]
    return total, greedy


def some_pairs(model: Transformer) -> list[Pair]:
    """Random requests of all lengths, among them equal inputs, beginnings of others, and ones that do not fit."""
    rng = np.random.default_rng(0)
    draw = lambda count: rng.integers(0, model.config.vocab_size, count).tolist()  # noqa: E731 - short
    pairs = [Pair(draw(context), draw(size)) for context, size in ((1, 1), (9, 4), (3, 20), (60, 4), (61, 9), (80, 3))]
    context, continuation = map(list, pairs[1])
    pairs += [
        Pair(context, [*continuation[:-1], 5]),  # the same input
        Pair(context, continuation[:2]),  # the beginning of one
        Pair(context[:4], context[4:] + continuation),  # one text, cut elsewhere
        Pair(draw(2), draw(64)),  # as long as the model takes
        pairs[0],
    ]
    with torch.no_grad():
        context = draw(7)
        likeliest = int(model(torch.tensor([context]))[0, -1].argmax())
    return [*pairs, Pair(context, [likeliest])]


@pytest.mark.parametrize("name", ["nano-base", "nano-memory", "nano-flex2", "untied"])
@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
def test_equals_one_request_at_a_time(name, batch_tokens):
    model = random_model(VARIED[name])
    pairs = some_pairs(model)
    answers = Continuations.of(pairs, max_len=64, batch_tokens=batch_tokens).score(model)
    log_probs, greedy = zip(*(naive(model, pair) for pair in pairs), strict=True)
    np.testing.assert_allclose(answers.log_probs, log_probs, rtol=1e-10)
    assert answers.greedy.tolist() == list(greedy)
    assert 0 < sum(greedy) < len(greedy)


@pytest.mark.gpu
def test_a_gpu_answers_the_same():
    model = random_model(VARIED["nano-flex2"])
    requests = Continuations.of(some_pairs(model), max_len=64, batch_tokens=100)
    expected = requests.score(model)
    device = torch.device("cuda")
    for placed in (requests, requests.to(device)):
        found = placed.score(model.to(device))
        np.testing.assert_allclose(found.log_probs, expected.log_probs, rtol=1e-9)
        assert found.greedy.tolist() == expected.greedy.tolist()


def test_rows_come_from_the_source():
    model = random_model(VARIED["nano-flex1"])
    pairs = some_pairs(model)
    requests = Continuations.of(pairs, max_len=64)
    with scaled_ffn(model, (0.3, 0.0, 1.0)) as source:
        scaled = requests.score(model, row_source=source)
    assert np.abs(scaled.log_probs - requests.score(model).log_probs).min() > 1e-6


def test_what_is_a_beginning_of_another_is_not_computed_again():
    requests = Continuations.of([Pair([1, 2], [3]), Pair([1, 2], [4]), Pair([1], [2, 3, 9]), Pair([2], [3])], max_len=8)
    (batch,) = requests.batches
    assert batch.token_ids.tolist() == [[1, 2, 3], [2, 0, 0]]


def test_batches_hold_no_more_tokens_than_asked():
    pairs = [Pair([size] * size, [1]) for size in range(1, 30)]
    requests = Continuations.of(pairs, max_len=64, batch_tokens=60)
    assert all(batch.token_ids.numel() <= 60 for batch in requests.batches)
    assert len(requests.batches) < 15


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "no request to score"),
        ([Pair([1], [2]), Pair([], [2])], "request 1 has 0 tokens of context and 1 of continuation"),
        ([Pair([1], [])], "expected at least 1, and 1 to 8"),
        ([Pair([1], [2] * 9)], "and 9 of continuation"),
    ],
)
def test_bad_requests(pairs, message):
    with pytest.raises(ValueError, match=message):
        Continuations.of(pairs, max_len=8)


def test_cut_where_the_context_ends_but_for_its_spaces(names_tokenizer: Tokenizer):
    ids = names_tokenizer.encode
    pairs = encode_requests([Request("He works ", "with iron"), Request("", " iron"), Request("a b\n", "c")],
                            names_tokenizer)  # fmt: skip
    assert pairs[0] == ([names_tokenizer.boundary_id, *ids("He works")], ids(" with iron"))
    assert pairs[1] == ([names_tokenizer.boundary_id], ids(" iron"))
    assert pairs[2] == ([names_tokenizer.boundary_id, *ids("a b")], ids("a b\nc")[len(ids("a b")) :])
