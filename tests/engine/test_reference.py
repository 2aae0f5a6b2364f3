"""The reference loop equals the full forward pass, from either source of rows."""

import pytest
import torch

from flexmemory.engine.reference import generate
from flexmemory.engine.sampling import Sampling
from flexmemory.model.memory import MemoryRows, unique_ids
from tests.conftest import VARIED, random_model

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def by_full_forward(model, prompt, count):
    """Greedy continuation without a cache: the whole sequence again for every token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def looked_up(model):
    """Rows from a table of the whole vocabulary, computed ahead."""
    with torch.no_grad():
        table = model.compute_rows(torch.arange(model.config.vocab_size))

    def source(token_ids):
        unique, index = unique_ids(token_ids)
        return MemoryRows(table[unique], index)

    return source


@pytest.mark.parametrize("name", VARIED)
def test_greedy_equals_the_full_forward(name):
    model = random_model(VARIED[name])
    assert list(generate(model, PROMPT, max_new_tokens=20)) == by_full_forward(model, PROMPT, 20)


@pytest.mark.parametrize("name", ["nano-memory", "nano-flex3", "ffn+table"])
def test_lookups_generate_the_same_tokens_without_ffn_weights(name):
    model = random_model(VARIED[name])
    expected = list(generate(model, PROMPT, max_new_tokens=30))
    source = looked_up(model)
    model.drop_memory()
    assert list(generate(model, PROMPT, row_source=source, max_new_tokens=30)) == expected


def test_sampling_is_reproducible():
    model = random_model(VARIED["nano-memory"])

    def draw(seed):
        return list(generate(model, PROMPT, sampling=Sampling(temperature=1.0, seed=seed), max_new_tokens=20))

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def test_stops_before_a_stop_id():
    model = random_model(VARIED["nano-base"])
    free = list(generate(model, PROMPT, max_new_tokens=12))
    stopped = list(generate(model, PROMPT, max_new_tokens=12, stop_ids={free[5]}))
    assert stopped == free[: free.index(free[5])]


def test_stops_at_the_longest_sequence():
    model = random_model(VARIED["nano-base"])
    assert len(list(generate(model, PROMPT, max_new_tokens=1000))) == model.config.max_seq_len - len(PROMPT)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "0 tokens; expected 1 to 63"), ([1] * 64, "64 tokens; expected 1 to 63"), ([512], "token id 512 is out of")],
)
def test_bad_prompts(prompt, message):
    with pytest.raises(ValueError, match=message):
        generate(random_model(VARIED["nano-base"]), prompt, max_new_tokens=4)  # at the call, before the first token
