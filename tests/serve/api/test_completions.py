"""What OpenAI's client gets is what the reference loop gives, whole or in pieces, whoever else asks."""

import concurrent.futures
import json

import openai
import pytest

from flexmemory.engine.sampling import Likelihood, Sampling
from flexmemory.serve.forms import Choice
from flexmemory.serve.scheduler import Piece
from tests.serve.api.conftest import NAME


def text_of(tokenizer, ids):
    return "".join(tokenizer.decode_stream(ids))


def test_the_model_is_listed(server):
    (model,) = server.client.models.list().data
    assert (model.id, model.owned_by) == (NAME, "flexmemory")
    assert server.client.models.retrieve(NAME) == model
    with pytest.raises(openai.NotFoundError, match="no model 'other' here"):
        server.client.models.retrieve("other")


def test_a_greedy_completion_is_the_reference(server, reference, tokenizer):
    answer = server.client.completions.create(model=NAME, prompt="The rows", max_tokens=30, temperature=0)
    expected = reference("The rows", 30)
    (choice,) = answer.choices
    assert choice.text == text_of(tokenizer, expected)
    assert choice.finish_reason == ("length" if len(expected) == 30 else "stop")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 1 + len(tokenizer.encode("The rows"))
    assert answer.usage.completion_tokens == len(expected)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(expected)
    assert answer.system_fingerprint
    ids = [tokenizer.boundary_id, *tokenizer.encode("The rows")]
    same = server.client.completions.create(model=NAME, prompt=ids, max_tokens=30, temperature=0)
    assert same.choices[0].text == choice.text


def test_many_at_once_each_get_their_own(server, reference, tokenizer):
    prompts = [f"{word} {number}" for number in range(4) for word in ("Rows", "of the", "", "memory é👩")]

    def ask(place):
        prompt, settings = prompts[place], {"temperature": 0} if place % 2 else {"temperature": 0.8, "seed": place}
        count = 5 + place
        if place % 3:
            answer = server.client.completions.create(model=NAME, prompt=prompt, max_tokens=count, **settings)
            return answer.choices[0].text
        chunks = server.client.completions.create(model=NAME, prompt=prompt, max_tokens=count, stream=True, **settings)
        return "".join(chunk.choices[0].text for chunk in chunks)

    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        texts = list(pool.map(ask, range(len(prompts))))
    for place, text in enumerate(texts):
        sampling = Sampling() if place % 2 else Sampling(temperature=0.8, seed=place)
        assert text == text_of(tokenizer, reference(prompts[place], 5 + place, sampling=sampling))


def test_a_stream_is_the_whole_in_pieces(server):
    settings = {"model": NAME, "prompt": "A token", "max_tokens": 25, "temperature": 1.2, "seed": 3, "n": 2}
    whole = server.client.completions.create(**settings, logprobs=2)
    chunks = list(
        server.client.completions.create(**settings, logprobs=2, stream=True, stream_options={"include_usage": True})
    )
    *events, last = chunks
    assert last.choices == []
    assert last.usage == whole.usage
    assert all(event.usage is None for event in events)
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(events) > 4
    for index, choice in enumerate(whole.choices):
        mine = [event.choices[0] for event in events if event.choices[0].index == index]
        assert "".join(each.text for each in mine) == choice.text
        assert [each.finish_reason for each in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            parts = [part for each in mine if each.logprobs for part in getattr(each.logprobs, name)]
            assert parts == getattr(choice.logprobs, name)
    assert whole.choices[0].text != whole.choices[1].text
    plain = list(server.client.completions.create(**settings, stream=True))
    assert all(chunk.choices for chunk in plain)


def test_events_end_with_done(server):
    with server.http.stream("POST", "/v1/completions", json={"model": NAME, "prompt": "x", "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: "))["object"] == "text_completion" for line in lines[:-1])


def test_a_seed_gives_the_same_again(server, reference, tokenizer):
    settings = {"model": NAME, "prompt": "Seeds", "max_tokens": 12, "temperature": 1.5}
    first, again = (server.client.completions.create(**settings, seed=2**63 - 1, n=2) for _ in range(2))
    assert [c.text for c in first.choices] == [c.text for c in again.choices]
    for choice, seed in zip(first.choices, (2**63 - 1, -(2**63)), strict=True):
        sampling = Sampling(temperature=1.5, seed=seed)
        assert choice.text == text_of(tokenizer, reference("Seeds", 12, sampling=sampling))
    drawn = {server.client.completions.create(**settings).choices[0].text for _ in range(3)}
    assert len(drawn) > 1


def test_settings_of_sampling_are_those_of_the_engine(server, reference, tokenizer):
    sampling = Sampling(temperature=0.9, top_k=5, top_p=0.7, seed=9)
    answer = server.client.completions.create(
        model=NAME, prompt="Top", max_tokens=20, temperature=0.9, top_p=0.7, seed=9, extra_body={"top_k": 5}
    )
    assert answer.choices[0].text == text_of(tokenizer, reference("Top", 20, sampling=sampling))
    greedy = server.client.completions.create(model=NAME, prompt="Top", max_tokens=20, top_p=0)
    assert greedy.choices[0].text == text_of(tokenizer, reference("Top", 20))


def test_several_prompts(server, reference, tokenizer):
    answer = server.client.completions.create(model=NAME, prompt=["one", "two"], max_tokens=6, temperature=0, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    expected = [text_of(tokenizer, reference(prompt, 6)) for prompt in ("one", "one", "two", "two")]
    assert [choice.text for choice in answer.choices] == expected


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_and_is_not_given(server, reference, tokenizer, stream):
    text = text_of(tokenizer, reference("Stop", 60))
    stop = text[20:23]
    server.wait(lambda: server.scheduler.live == 0)
    answer = server.client.completions.create(
        model=NAME, prompt="Stop", max_tokens=60, temperature=0, stop=[stop, "never there"], stream=stream
    )
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
    assert choices[-1].finish_reason == "stop"
    server.wait(lambda: server.scheduler.live == 0)  # it does not go on behind


def test_stops_and_characters_over_the_edges_of_tokens(tokenizer):
    def piece(token, finish=None):
        return Piece(index=0, tokens=(token,), likelihoods=(), finish=finish, at=0.0)

    ids = tokenizer.encode("é👩 ends")
    choice = Choice(tokenizer, ["👩 end"])
    assert [choice.take(piece(token)).text for token in ids][:2] == ["", "é"]
    assert choice.finish == "stop"
    assert choice.take(piece(ids[0])).empty
    held = Choice(tokenizer, ["sX"])
    *_, last = [held.take(piece(token, "length" if token == ids[-1] else None)) for token in ids]
    assert last.text.endswith("s")  # held back as the beginning of a stop, given when nothing followed
    late = Choice(tokenizer, [])
    late.take(piece(ids[0]))
    assert late.take(Piece(index=0, tokens=(), likelihoods=(), finish="stop", at=0.0)).finish == "stop"


def test_logprobs_are_of_the_model(server, reference, tokenizer):
    settings = {"model": NAME, "prompt": "Log", "max_tokens": 8, "temperature": 0}
    (choice,) = server.client.completions.create(**settings, logprobs=3).choices
    ids = reference("Log", 8)
    assert choice.logprobs.tokens == [tokenizer.token(token) for token in ids]
    for token, logprob, top in zip(
        choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True
    ):
        assert len(top) == 3
        assert top[token] == logprob == max(top.values()) < 0
    (bare,) = server.client.completions.create(**settings, logprobs=0).choices
    assert bare.logprobs.token_logprobs == choice.logprobs.token_logprobs
    assert bare.logprobs.top_logprobs is None
    assert choice.logprobs.text_offset[0] == 0
    assert server.client.completions.create(**settings).choices[0].logprobs is None


def test_a_chosen_token_is_named_beside_likelier_ones(server):
    answer = server.client.completions.create(
        model=NAME, prompt="Log", max_tokens=30, temperature=2, seed=1, logprobs=1
    )
    logprobs = answer.choices[0].logprobs
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert top[token] == logprob
        assert len(top) <= 2


def test_likelihoods_follow_the_tokens_of_a_cut_piece(tokenizer):
    ids = tokenizer.encode("ab cd")
    likelihoods = tuple(Likelihood(-1.0 - i, ()) for i in range(len(ids)))
    choice = Choice(tokenizer, ["b"])
    delta = choice.take(Piece(index=0, tokens=tuple(ids), likelihoods=likelihoods, finish="length", at=0.0))
    assert (delta.text, delta.finish) == ("a", "stop")
    assert [token for token, _ in delta.tokens] == ids[: choice.num_tokens]
