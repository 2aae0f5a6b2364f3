"""A nano model with an index that has maps and clusters, and a client of its explorer."""

import dataclasses
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from starlette.testclient import TestClient

from flexmemory.interpret.index import IndexOptions, build_index
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.serve.explorer import create_app
from flexmemory.serve.live import LiveModel
from flexmemory.serve.records import Records
from tests.conftest import NANO, random_model
from tests.tol.conftest import write_checkpoint

TEXT = "the red dog and the blue cat sat on the green hill; two dogs ran, three cats slept. Red Dog! été 日本 "
OPTIONS = IndexOptions(clusters=4, cluster_layers=(0, 2), maps="pca")


@dataclasses.dataclass(frozen=True)
class Explored:
    checkpoint: Checkpoint
    records: Records
    live: LiveModel
    client: TestClient
    other: Path
    """A checkpoint of the same shape and tokenizer."""

    def get(self, path: str):
        response = self.client.get(path)
        assert response.status_code == 200, response.text
        return response.json()

    def post(self, path: str, **fields):
        response = self.client.post(path, json=fields)
        assert response.status_code == 200, response.text
        return response.json()

    def refused(self, path: str, status: int = 400, **fields) -> str:
        response = self.client.post(path, json=fields)
        assert response.status_code == status, response.text
        return response.json()["error"]


@pytest.fixture(scope="session")
def explored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Explored]:
    """An explorer of a fp32 nano model. Edits must be taken back."""
    folder = tmp_path_factory.mktemp("explored")
    config = NANO["nano-flex3"]
    checkpoint = write_checkpoint(folder / "model", random_model(config, dtype=torch.float32), text=TEXT)
    other = write_checkpoint(folder / "other", random_model(config, seed=1, dtype=torch.float32), text=TEXT)
    records = Records(build_index(checkpoint, folder / "index", options=OPTIONS))
    live = LiveModel(checkpoint, records)
    app = create_app(records, live, checkpoint=checkpoint, name="nano", compare=[other.path])
    with TestClient(app, base_url="http://127.0.0.1:8642") as client:
        yield Explored(checkpoint, records, live, client, other.path)


def find_chromium() -> str | None:
    import os

    named = os.environ.get("CHROMIUM")
    return named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def close(value: float, expected: float, *, relative: float = 2e-3) -> bool:
    """Equal to the rounding of fp16 and of four digits."""
    return math.isclose(value, expected, rel_tol=relative, abs_tol=2e-4)
