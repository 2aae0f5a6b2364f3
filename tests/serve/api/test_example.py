"""The example starts a server, asks it and stops it."""

import subprocess
import sys

from tests.cli.conftest import REPOSITORY


def test_the_example_asks_a_server_of_its_own(checkpoint):
    prompts = ["The memory", "A token", "One row"]
    command = [sys.executable, REPOSITORY / "examples" / "serve.py", checkpoint.path, *prompts, "--tokens", "8"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    completed = said.split("\n---\n")
    assert [text.startswith(prompt) for text, prompt in zip(completed, prompts, strict=False)] == [True] * 3
    assert completed[3].strip()  # the stream
