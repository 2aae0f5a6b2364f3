"""Whatever is asked too much, or wrong, or by whom it should not be, gets one clear error and takes nothing."""

import concurrent.futures
import functools
import gc
import json
import os
import socket
import threading

import openai
import pytest

from flexmemory.engine.engine import Request
from flexmemory.serve import guard
from flexmemory.serve.errors import ApiError
from flexmemory.serve.parameters import Parameters, completion_prompts, wanted
from flexmemory.serve.scheduler import Job
from flexmemory.tol.disk import DiskRows
from tests.serve.api.conftest import NAME, run_server

KEY = "a-key-of-some-length"


def error_of(answer):
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"model": "nano", "prompt": "\xff"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[1]", "should be a JSON object, got a list of 1"),
        (b"{}", "prompt should be"),
        (b'{"prompt": "x"}', "model should be the name"),
        (b'{"model": "nano", "prompt": "\\ud800"}', "the prompt is no text"),
    ],
)
def test_bodies_that_are_none(server, body, reason):
    answer = server.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert reason in error_of(answer)["message"]
    assert error_of(answer)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"prompt": []}, "prompt should be"),
        ({"prompt": [[1], "x", 2.5]}, "prompt should be"),
        ({"prompt": [512]}, "token ids should be from 0 to 511"),
        ({"prompt": [True]}, "prompt should be"),
        ({"max_tokens": 0}, "max_tokens should be a whole number"),
        ({"max_tokens": 1.5}, "got 1.5"),
        ({"max_tokens": 199}, "199 are to follow, and the longest sequence is 200"),
        ({"prompt": [1] * 200}, "the prompt has 200 tokens"),
        ({"temperature": -1}, "temperature should be a number from 0 to 2"),
        ({"temperature": "hot"}, "got 'hot'"),
        ({"temperature": True}, "got true"),
        ({"top_p": 1.1}, "top_p should be a number from 0 to 1"),
        ({"seed": 2**63}, "seed should be a whole number"),
        ({"n": 5}, "5 choices are more than the 4 that run at once"),
        ({"prompt": ["a", "b", "c"], "n": 2}, "6 choices are more"),
        ({"logprobs": 21}, "logprobs should be a whole number from 0 to 20"),
        ({"stop": ["a", ""]}, "none empty"),
        ({"stop": ["a"] * 17}, "up to 16 texts"),
        ({"stop": 7}, "stop should be"),
        ({"stream": 1}, "stream should be true or false"),
        ({"stream_options": {"include_usage": True}}, "needs stream to be true"),
        ({"stream": True, "stream_options": {"all": 1}}, "include_usage alone"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "include_usage should be"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "not supported"),
        ({"echo": True}, "'echo' is not supported"),
        ({"best_of": 2}, "'best_of' is not supported"),
        ({"presence_penalty": 0.5}, "'presence_penalty' is not supported"),
        ({"logit_bias": {"5": 1}}, "'logit_bias' is not supported"),
        ({"top_logprobs": 3}, "'top_logprobs' is unknown"),
        ({"beam_width": 3}, "'beam_width' is unknown"),
    ],
)
def test_parameters_are_obeyed_or_refused(server, parameters, reason):
    answer = server.ask(**parameters)
    assert answer.status_code == 400, answer.text
    error = error_of(answer)
    assert reason in error["message"]
    assert error["param"] in (*parameters, "max_tokens", "n")


def test_what_asks_for_nothing_is_taken(server):
    neutral = {"echo": False, "best_of": 1, "presence_penalty": 0.0, "logit_bias": {}, "suffix": None, "user": "me"}
    assert server.ask(max_tokens=1, **neutral).status_code == 200


def test_chats_have_parameters_of_their_own():
    def asked(**values):
        return wanted(Parameters(json.dumps({"model": "m", **values}).encode()), chat=True)

    assert asked(max_tokens=5, max_completion_tokens=7).max_new_tokens == 7
    assert asked(logprobs=True, top_logprobs=2, response_format={"type": "text"}).alternatives == 2
    for values, reason in (
        ({"top_logprobs": 2}, "needs logprobs"),
        ({"logprobs": 2}, "true or false"),
        ({"tools": [{}]}, "'tools' is not supported"),
        ({"response_format": {"type": "json_object"}}, "'response_format' is not supported"),
    ):
        with pytest.raises(ApiError, match=reason):
            asked(**values)
    assert completion_prompts(Parameters(b'{"prompt": [[1, 2], "x"]}')) == [[1, 2], "x"]


def test_unknown_models_paths_and_methods(server):
    with pytest.raises(openai.NotFoundError, match="no model 'gpt' here; it is 'nano'"):
        server.client.completions.create(model="gpt", prompt="x")
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("PUT", "/v1/completions", 405),
        ("OPTIONS", "/v1/completions", 405),
    ):
        answer = server.http.request(method, path)
        assert answer.status_code == status
        assert error_of(answer)["message"]


def test_pages_of_others_are_refused(server):
    body = {"content": b'{"model": "nano", "prompt": "x"}'}
    for headers, status in (
        ({"Host": "evil.example"}, 403),
        ({"Origin": "http://evil.example", "Content-Type": "application/json"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Content-Type": "application/json"}, 403),
        ({"Content-Type": "text/plain"}, 415),
    ):
        answer = server.http.post("/v1/completions", headers=headers, **body)
        assert answer.status_code == status
        error_of(answer)


def test_the_api_key(checkpoint):
    with run_server(checkpoint, api_key=KEY) as server:
        assert server.client.completions.create(model=NAME, prompt="x", max_tokens=1).choices
        for given in ("", "Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", KEY, "Bearer \xe9"):
            for path in ("/v1/models", "/metrics", "/nothing"):
                answer = server.http.get(path, headers=[(b"Authorization", given.encode())])
                assert answer.status_code == 401
                assert error_of(answer)["code"] == "invalid_api_key"
        assert server.http.get("/health", headers={"Authorization": ""}).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            server.client.with_options(api_key="wrong").models.list()


def test_bodies_are_bounded(checkpoint, monkeypatch):
    monkeypatch.setattr(guard, "BODY_S", 0.2)
    with run_server(checkpoint, max_body_bytes=1000) as server:
        assert server.ask(prompt="a" * 900, max_tokens=199).status_code == 400
        for content in (b" " * 1001, iter([b" " * 600] * 2)):  # announced, and in chunks
            answer = server.http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
            assert answer.status_code == 413
            assert "larger than 1000 bytes" in error_of(answer)["message"]
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        with socket.create_connection(address) as slow:
            slow.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 9\r\n\r\n{"
            )
            assert slow.recv(100).startswith(b"HTTP/1.1 408")


def test_the_queue_is_bounded_and_served_in_order(checkpoint):
    with (
        run_server(checkpoint, steps=0, slots=1, waiting=2) as server,
        concurrent.futures.ThreadPoolExecutor(3) as pool,
    ):
        ended = []

        def ask(place):
            answer = server.ask(prompt=f"{place}", max_tokens=3, temperature=0)
            ended.append(place)
            return answer.status_code

        asked = []
        for place in range(3):
            asked.append(pool.submit(ask, place))
            server.wait(lambda place=place: server.scheduler.live == place + 1)
        answer = server.ask()
        assert answer.status_code == 429
        assert error_of(answer)["code"] == "queue_full"
        assert answer.headers["retry-after"] == "1"
        with pytest.raises(openai.RateLimitError):
            server.client.completions.create(model=NAME, prompt="x")
        assert server.metric("waiting_sequences") == 3
        server.brake.left = 1
        server.wait(lambda: server.metric("running_sequences") == 1)
        server.brake.left = float("inf")
        assert [each.result() for each in asked] == [200] * 3
        assert ended == [0, 1, 2]
        assert server.ask(max_tokens=1).status_code == 200


@pytest.mark.parametrize("steps", [0, 3])
def test_time_is_bounded(checkpoint, steps):
    with run_server(checkpoint, steps=steps, timeout_s=0.3) as server:
        answer = server.ask(max_tokens=50, temperature=0)
        assert answer.status_code == 503
        assert error_of(answer)["code"] == "timeout"
        assert error_of(answer)["type"] == "server_error"
        assert answer.headers["x-should-retry"] == "false"
        stream = server.client.completions.create(model=NAME, prompt="x", max_tokens=50, stream=True)
        with pytest.raises(openai.APIError, match=r"not done within 0\.3 s"):
            list(stream)
        server.brake.left = float("inf")
        server.wait(lambda: server.scheduler.live == 0 and not server.engine.busy)
        assert server.metric('sequences_total{reason="timeout"}') == 2


@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_frees_the_slot(checkpoint, stream, steps):
    with run_server(checkpoint, steps=steps, slots=1) as server:
        body = json.dumps({"model": NAME, "prompt": "x", "max_tokens": 150, "stream": stream, "n": 1}).encode()
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        with socket.create_connection(address) as client:
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
            server.wait(lambda: server.scheduler.live == 1 and server.brake.left == 0)
            if stream:
                assert client.recv(20).startswith(b"HTTP/1.1 200")
        server.wait(lambda: server.scheduler.live == 0)
        assert server.metric('sequences_total{reason="cancelled"}') == 1
        server.brake.left = float("inf")
        assert server.ask(max_tokens=2).status_code == 200


def test_a_failing_disk_ends_the_requests_that_need_it_alone(checkpoint, reference, tokenizer, tmp_path, caplog):
    with run_server(checkpoint) as server:
        prompt = reference([1], 1)
        source = server.engine._prefill._row_source
        assert isinstance(source, functools.partial)
        (tier,) = source.args
        assert isinstance(tier, DiskRows)
        (shard,) = tier.store.manifest.shards
        copy = tmp_path / "shard"
        copy.write_bytes((tier.store.path / shard.file).read_bytes())
        os.close(tier._descriptors[0])
        tier._descriptors[0] = os.open(copy, os.O_RDONLY)
        lost = max(prompt[0], 1) + 1  # rows from here on are gone
        os.truncate(copy, shard.data_offset + lost * tier.store.manifest.stride_bytes)
        answer = server.ask(prompt=[lost])
        assert answer.status_code == 500
        assert error_of(answer)["code"] == "engine_error"
        assert "log" in error_of(answer)["message"]  # and no path of the server's
        assert "rows could not be read" in caplog.text
        assert server.ask(prompt=[1], max_tokens=1, temperature=0).status_code == 200
        assert server.http.get("/health").json() == {"status": "ok"}


def test_a_failing_engine_ends_all_requests_and_says_so(checkpoint, caplog, monkeypatch):
    failed = threading.Event()
    with run_server(checkpoint, steps=0) as server:
        server.scheduler.on_failure = failed.set
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(server.ask) for _ in range(3)]
            server.wait(lambda: server.scheduler.live == 3)
            monkeypatch.setattr(server.engine, "step", lambda: 1 / 0)
            assert [each.result().status_code for each in asked] == [500] * 3
        assert failed.wait()
        assert "ZeroDivisionError" in caplog.text
        assert server.http.get("/health").json() == {"status": "failed"}
        assert server.ask().status_code == 503
        for request in (*server.engine._queue, *server.engine._filling, *server.engine._running.values()):
            server.engine.cancel(request)


def test_metrics_add_up(checkpoint):
    with run_server(checkpoint) as server:
        answers = [server.ask(max_tokens=count, temperature=0).json() for count in (1, 5)]
        server.ask(max_tokens=0)
        server.http.get("/nothing")
        usage = [answer["usage"] for answer in answers]
        assert server.metric("prompt_tokens_total") == sum(each["prompt_tokens"] for each in usage)
        assert server.metric("generated_tokens_total") == sum(each["completion_tokens"] for each in usage)
        assert server.metric('requests_total{path="/v1/completions",status="200"}') == 2
        assert server.metric('requests_total{path="/v1/completions",status="400"}') == 1
        assert server.metric('requests_total{path="other",status="404"}') == 1
        assert server.metric("first_token_seconds_count") == 2
        assert server.metric("token_gap_seconds_count") == 3  # the first two of five came at once
        assert server.metric('request_seconds_bucket{le="+Inf"}') == server.metric("request_seconds_count") == 3
        assert server.metric("running_sequences") == server.metric("waiting_sequences") == 0
        assert server.http.get("/metrics").headers["content-type"].startswith("text/plain; version=0.0.4")


def test_nothing_is_kept_of_requests_that_have_ended(checkpoint):
    with run_server(checkpoint) as server:
        for stream in (True, False):
            assert server.ask(max_tokens=3, n=2, logprobs=1, stream=stream).status_code == 200
        server.ask(max_tokens=0)
        server.wait(lambda: server.scheduler.live == 0 and not server.engine.busy)
        server.http.get("/health")

        def kept():
            gc.collect()
            return [each for each in gc.get_objects() if type(each) in (Job, Request)]

        server.wait(lambda: not kept())
