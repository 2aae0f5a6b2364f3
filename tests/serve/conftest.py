"""A nano model with an index that has maps and clusters, and a client of its explorer."""

import dataclasses
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from jaxtyping import Float
from starlette.testclient import TestClient
from torch import Tensor

from flexmemory.interpret.index import IndexOptions, build_index
from flexmemory.interpret.tkv import TokenMemory
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.model.transformer import Transformer
from flexmemory.serve.explorer import create_app
from flexmemory.serve.live import LiveModel
from flexmemory.serve.records import Records
from flexmemory.tol.build import build_store
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
    store: Path
    """Lookups of the checkpoint, in bf16, without layer 1."""
    patch: Path
    """A patch of the checkpoint: a row of token 262 and one value."""

    @property
    def compared(self) -> list[Path]:
        return [self.other, self.store, self.patch]

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
    store = build_store(checkpoint, folder / "store", codec="bf16", layers=(0, 2)).path
    with TokenMemory(checkpoint.load()).edit(checkpoint) as edit:
        edit.scale_row(262, layer=1, factor=2.0)
        edit.scale_value(layer=0, key=5, factor=0.0)
    edit.patch.save(folder / "doubled.safetensors")
    records = Records(build_index(checkpoint, folder / "index", options=OPTIONS))
    live = LiveModel(checkpoint, records)
    compared = [other.path, store, folder / "doubled.safetensors"]
    app = create_app(records, live, checkpoint=checkpoint, name="nano", compare=compared)
    with TestClient(app, base_url="http://127.0.0.1:8642") as client:
        yield Explored(checkpoint, records, live, client, *compared)


@pytest.fixture
def bench(explored: Explored) -> Iterator[Explored]:
    """The same, edits taken back afterwards."""
    yield explored
    while explored.get("/api/state")["applied"]:
        explored.post("/api/edit/revert")


def find_chromium() -> str | None:
    import os

    named = os.environ.get("CHROMIUM")
    return named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def close(value: float, expected: float, *, relative: float = 2e-3) -> bool:
    """Equal to the rounding of fp16 and of four digits."""
    return math.isclose(value, expected, rel_tol=relative, abs_tol=2e-4)


def rows_of(model: Transformer) -> Float[Tensor, "V L D"]:
    """All rows."""
    return model.compute_rows(torch.arange(512)).detach()
