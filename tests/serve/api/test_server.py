"""The command: it listens, serves, and stops as it should."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest

from flexmemory.cli import main
from flexmemory.serve.listening import listen
from flexmemory.serve.server import read_key

REPOSITORY = Path(__file__).parents[3]
# One engine step a hundredth of a second: a request of 150 tokens lasts long enough to be stopped in between.
SLOW = """
import sys, time
import torch
from flexmemory.engine.engine import Engine
from flexmemory.cli import main
torch.set_num_threads(1)
step = Engine.step
def slow(engine):
    time.sleep(0.01)
    step(engine)
Engine.step = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def command(checkpoint):
    """`command(*options)`: the server as a process, and where it is."""
    processes = []

    def start(*options, target=checkpoint.path):
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW, "serve", str(target), "--port", "0", "--device", "cpu", *options],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY / "src")},
        )
        processes.append(process)
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if found := re.search(r"served at (http://\S+)/v1 ", line):
                return process, found[1], said
        raise AssertionError(said)

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stderr.close()


def test_the_guide_is_true_and_sigterm_lets_running_requests_finish(command):
    """Its command serves, its requests are answered as it says; new ones are refused once it is to stop."""
    guide = (REPOSITORY / "docs" / "serving.md").read_text(encoding="utf-8")
    assert "flexmemory serve models/mini-memory " in guide
    process, url, said = command(target=REPOSITORY / "models" / "mini-memory")
    assert "mini-memory is served at" in said
    assert "warning" not in said
    (request,) = re.findall(r"-d '(\{.*?\})'", guide)
    answer = httpx.post(f"{url}/v1/completions", json=json.loads(request), timeout=100)
    assert answer.json()["choices"][0]["text"]
    (block,) = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    exec(compile(block.replace("http://127.0.0.1:8000", url), "serving.md", "exec"), {})
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        chunks = iter(client.completions.create(model="mini-memory", prompt="x", max_tokens=150, stream=True))
        next(chunks)
        process.send_signal(signal.SIGTERM)
        closed = False
        while not closed:
            try:
                httpx.get(f"{url}/health")
                time.sleep(0.01)
            except httpx.TransportError:
                closed = True
        *_, last = chunks
        assert last.choices[0].finish_reason in ("length", "stop")
    assert process.wait() == 0


def test_what_does_not_finish_in_time_is_ended(command, checkpoint, tmp_path):
    (tmp_path / "key").write_text("a-key-of-some-length\n")
    (tmp_path / "key").chmod(0o600)
    process, url, said = command(
        "--tol", str(checkpoint.path.with_name("tol")), "--name", "mine", "--host", "0.0.0.0", "--grace", "0",
        "--api-key-file", str(tmp_path / "key"),
    )  # fmt: skip
    assert "rows on disk" in said
    assert "warning: reachable from other machines, unencrypted;" in said
    with openai.OpenAI(base_url=f"{url}/v1", api_key="a-key-of-some-length", max_retries=0) as client:
        chunks = iter(client.completions.create(model="mine", prompt=[5], max_tokens=150, stream=True, temperature=0))
        next(chunks)
        process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(chunks)
    assert process.wait() == 0


def test_mistakes_are_one_sentence(checkpoint, tmp_path, capsys):
    def refused(*options):
        assert main(["serve", str(checkpoint.path), "--device", "cpu", *options]) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    short = tmp_path / "key"
    short.write_text("short")
    assert "16 or more printable ASCII characters" in refused("--api-key-file", str(short))
    assert "No such file" in refused("--api-key-file", str(tmp_path / "none"))
    assert "--max-sequences must be positive" in refused("--max-sequences", "0")
    assert "--queue must not be negative" in refused("--queue", "-1")
    assert "max_length must be 2 to 200" in refused("--max-tokens", "201", "--port", "0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "choose another --port" in refused("--port", str(taken.getsockname()[1]))


def test_keys_that_others_can_read_are_warned_of(tmp_path, caplog):
    path = tmp_path / "key"
    path.write_text("  a-key-of-some-length \n")
    path.chmod(0o644)
    assert read_key(path) == "a-key-of-some-length"
    assert "chmod 600" in caplog.text


def test_ipv6():
    try:
        listening = listen("::1", 0)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with listening:
        assert listening.getsockname()[1] > 0
