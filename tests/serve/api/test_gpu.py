"""A server whose engine runs on a GPU: the steps are CUDA graphs, the answers those of the reference loop."""

import concurrent.futures

import pytest
import torch

from tests.serve.api.conftest import NAME, run_server

pytestmark = pytest.mark.gpu


def test_many_at_once_get_what_the_reference_gives(checkpoint, reference, tokenizer):
    prompts = [f"The {word}" for word in ("rows", "memory of a token", "engine", "a", "budget of bytes", "layers")]
    with run_server(checkpoint, device="cuda", dtype=torch.float32) as server:

        def ask(prompt: str) -> str:
            answer = server.client.completions.create(model=NAME, prompt=prompt, max_tokens=24, temperature=0)
            return answer.choices[0].text

        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            found = list(pool.map(ask, prompts))
    assert found == ["".join(tokenizer.decode_stream(reference(prompt, 24))) for prompt in prompts]


def test_a_client_that_leaves_frees_its_slot(checkpoint):
    with run_server(checkpoint, device="cuda", dtype=torch.float32, slots=2) as server:
        for _ in range(4):
            stream = server.client.completions.create(model=NAME, prompt="The", max_tokens=150, stream=True)
            next(iter(stream))
            stream.close()
        assert server.ask(max_tokens=4).status_code == 200
        server.wait(lambda: server.metric("running_sequences") == 0)
