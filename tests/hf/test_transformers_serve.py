"""`transformers serve` as a server: a checkpoint answers OpenAI's API as `flexmemory generate` goes on.

It needs transformers' extra `serving` (fastapi, which nothing else here needs): `pip install fastapi`, then
`pytest -m slow tests/hf/test_transformers_serve.py`.
"""

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from flexmemory.cli.generate import main as generate
from tests.hf.conftest import MINI
from tests.hf.test_examples import EXAMPLES

pytest.importorskip("fastapi", reason="transformers serve needs fastapi, which nothing else here does")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
PROMPT, TOKENS = "The city of London", 16
BOUNDARY = "<|endoftext|>"
"""What `flexmemory generate` puts before a prompt, as documents began with it; transformers' tokenizer does not."""
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""A chat is its texts, so that it can be compared with a prompt."""
BATCHING = ("--continuous-batching", "--cb-num-blocks", "16", "--cb-max-batch-tokens", "64")
"""Without these numbers the process ends at the first request, on a CPU."""


@contextlib.contextmanager
def serving(folder: Path, log: Path, *options: str) -> Iterator[httpx.Client]:
    """A client of a server in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(EXAMPLES / "transformers_serve.py"), "serve", str(folder)]
    command += ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port), *options]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
            for _ in range(600):
                assert process.poll() is None, log.read_text()
                with contextlib.suppress(httpx.TransportError):
                    if client.get("/health").status_code == 200:
                        break
                time.sleep(0.5)
            yield client
    finally:
        process.terminate()
        process.wait(60)


def events(client: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The objects of a stream."""
    with client.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200, response.read()
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def posted(client: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("options", [(), BATCHING], ids=["generate", "continuous batching"])
@pytest.mark.parametrize("name", ["mini-memory", "mini-flex3"])
def test_it_answers_as_generate_goes_on(tmp_path, capsys, name, options):
    folder = tmp_path / name
    shutil.copytree(MINI / name, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    generate([str(MINI / name), "--prompt", PROMPT, "--max-tokens", str(TOKENS), "--device", "cpu", "--dtype", "fp32"])
    expected = capsys.readouterr().out
    expected = expected.removeprefix(PROMPT).removesuffix("\n")
    with serving(folder, tmp_path / "log", "--dtype", "float32", *options) as client:
        greedy = {"model": str(folder), "temperature": 0}
        completion = greedy | {"prompt": BOUNDARY + PROMPT, "max_tokens": TOKENS}
        chat = greedy | {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": TOKENS}
        answer = greedy | {"input": PROMPT, "max_output_tokens": TOKENS}
        found = posted(client, "/v1/completions", completion)
        assert found["choices"][0]["text"] == expected
        assert found["usage"]["completion_tokens"] == TOKENS
        assert posted(client, "/v1/chat/completions", chat)["choices"][0]["message"]["content"] == expected
        whole = posted(client, "/v1/responses", answer | {"stream": False})
        assert whole["output"][0]["content"][0]["text"] == expected
        parts = events(client, "/v1/completions", completion)
        assert "".join(part["choices"][0]["text"] for part in parts) == expected
        parts = events(client, "/v1/chat/completions", chat)
        assert "".join(part["choices"][0]["delta"].get("content", "") for part in parts) == expected
        parts = events(client, "/v1/responses", answer)
        assert "".join(part["delta"] for part in parts if part["type"] == "response.output_text.delta") == expected
