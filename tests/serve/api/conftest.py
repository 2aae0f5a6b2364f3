"""Servers of a small random model on a free port, its rows on disk, and a brake on its engine."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import tokenizers
import torch
import uvicorn

from flexmemory.engine.engine import Engine
from flexmemory.engine.loading import load_model
from flexmemory.engine.reference import generate
from flexmemory.model.checkpoint import Checkpoint, save_checkpoint
from flexmemory.serve.api import Served, create_app
from flexmemory.serve.chat import ChatTemplate
from flexmemory.serve.guard import LOOPBACK
from flexmemory.serve.listening import listen
from flexmemory.serve.scheduler import Scheduler
from flexmemory.storage import atomic_folder
from flexmemory.tokenizer import Tokenizer
from flexmemory.tol.build import build_store
from tests.conftest import NANO, random_model

NAME = "nano"
TEMPLATE = """{%- for message in messages %}
{%- if message.role == 'nobody' %}{{ raise_exception('nobody speaks') }}{% endif -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A random model with a tokenizer that knows the marks of chats."""
    text = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    core = Tokenizer.train([text], vocab_size=510).core
    core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    config = dataclasses.replace(NANO["nano-flex3"], max_seq_len=200)
    folder = tmp_path_factory.mktemp("serve") / NAME
    with atomic_folder(folder) as half:
        save_checkpoint(half, random_model(config, dtype=torch.float32), Tokenizer(core))
    build_store(Checkpoint.open(folder), folder.with_name("tol"), codec="fp32")
    return Checkpoint.open(folder)


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    return checkpoint.tokenizer()


class Brake:
    """Stands in for `Engine.step`: does so many steps, then none until it is let go."""

    def __init__(self, engine: Engine, *, steps: float) -> None:
        self.left, self._step = steps, engine.step

    def __call__(self) -> None:
        if self.left > 0:
            self.left -= 1
            self._step()
        else:
            time.sleep(0.001)


@dataclasses.dataclass(frozen=True)
class Running:
    """A server."""

    url: str
    scheduler: Scheduler
    brake: Brake
    engine: Engine
    client: openai.OpenAI
    http: httpx.Client

    def ask(self, **parameters: Any) -> httpx.Response:
        return self.http.post("/v1/completions", json={"model": NAME, "prompt": "The", **parameters})

    def metric(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.split()[0] == f"flexmemory_{name}")

    def wait(self, condition: Callable[[], bool]) -> None:
        """Until it holds; the test's time limit ends it otherwise."""
        while not condition():
            time.sleep(0.005)


@contextlib.contextmanager
def run_server(
    checkpoint: Checkpoint,
    *,
    template: str | None = None,
    steps: float = float("inf"),
    slots: int = 4,
    waiting: int = 64,
    timeout_s: float = 100.0,
    max_length: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Iterator[Running]:
    """A server in a thread of this process, its rows looked up on disk, stopped at the end."""
    tokenizer = checkpoint.tokenizer()
    loaded = load_model(checkpoint, tol=checkpoint.path.with_name("tol"), rows="disk", dtype=dtype, device=device)
    engine = loaded.engine(max_sequences=slots, max_length=max_length)
    brake = Brake(engine, steps=steps)
    engine.step = brake
    scheduler = Scheduler(engine, slots=slots, waiting=waiting, timeout_s=timeout_s)
    served = Served(
        name=NAME,
        fingerprint=checkpoint.fingerprint,
        tokenizer=tokenizer,
        vocab_size=checkpoint.config.vocab_size,
        template=None if template is None else ChatTemplate(template, tokenizer, bos=None, eos="<|im_end|>"),
        created=1,
    )
    started = threading.Event()
    app = create_app(served, scheduler, **{"hosts": LOOPBACK, "on_start": started.set, **options})
    with listen("127.0.0.1", 0) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none", timeout_graceful_shutdown=20))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        started.wait()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        key = options.get("api_key") or "none"
        try:
            with (
                openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client,
                httpx.Client(base_url=url, timeout=100, headers={"Authorization": f"Bearer {key}"}) as http,
            ):
                yield Running(url, scheduler, brake, engine, client, http)
        finally:
            brake.left = float("inf")
            server.should_exit = True
            thread.join()
    assert not engine.busy


@pytest.fixture(scope="session")
def server(checkpoint: Checkpoint) -> Iterator[Running]:
    """The one that most tests ask."""
    with run_server(checkpoint, template=TEMPLATE) as running:
        yield running


@pytest.fixture(scope="session")
def reference(checkpoint: Checkpoint, tokenizer: Tokenizer) -> Callable[..., list[int]]:
    """`reference(prompt, max_new_tokens, sampling=...)`: tokens by the loop that everything must equal."""
    loaded = load_model(checkpoint, tol=checkpoint.path.with_name("tol"), rows="disk", dtype=torch.float64)

    def continued(prompt: str | list[int], count: int, **options: Any) -> list[int]:
        ids = [tokenizer.boundary_id, *tokenizer.encode(prompt)] if isinstance(prompt, str) else prompt
        stop_ids = options.pop("stop_ids", {tokenizer.boundary_id, tokenizer.core.token_to_id("<|im_end|>")})
        return list(
            generate(
                loaded.model,
                ids,
                row_source=loaded.row_source,
                max_new_tokens=count,
                stop_ids=stop_ids,
                **options,
            )
        )

    return continued


def added(core: tokenizers.Tokenizer, text: str) -> list[int]:
    """Ids of a text in which special tokens are meant."""
    copy = tokenizers.Tokenizer.from_str(core.to_str())
    copy.encode_special_tokens = False
    return copy.encode(text, add_special_tokens=False).ids
