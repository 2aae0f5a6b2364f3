"""Small models with rows from every place."""

from collections.abc import Callable

import pytest
import torch

from flexmemory.engine.loading import LoadedModel, RowPlace, load_model
from flexmemory.model.checkpoint import Checkpoint, save_checkpoint
from flexmemory.storage import atomic_folder
from flexmemory.tol.build import build_store
from tests.conftest import VARIED, random_model


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """`saved(name)`: a checkpoint of a random model."""
    folder = tmp_path_factory.mktemp("engine")

    def save(name: str) -> Checkpoint:
        if not (folder / name).exists():
            with atomic_folder(folder / name) as half:
                save_checkpoint(half, random_model(VARIED[name], dtype=torch.float32), None)
        return Checkpoint.open(folder / name)

    return save


@pytest.fixture(scope="session")
def loaded(saved: Callable[[str], Checkpoint]) -> Callable[..., LoadedModel]:
    """`loaded(name, place)`: a random model in fp64, its rows computed or looked up in a store of fp32."""

    def load(name: str, place: RowPlace = "compute", *, device: str = "cpu") -> LoadedModel:
        checkpoint = saved(name)
        store = checkpoint.path.with_name(f"{name}-tol")
        if place != "compute" and not store.exists():
            build_store(checkpoint, store, codec="fp32")
        tol = None if place == "compute" else store
        return load_model(checkpoint, tol=tol, rows=place, device=device, dtype=torch.float64)

    return load
