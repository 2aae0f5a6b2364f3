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
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., LoadedModel]:
    """`loaded(name, place)`: a random model in fp64, its rows computed or looked up in a store of fp32."""
    folder = tmp_path_factory.mktemp("engine")

    def load(name: str, place: RowPlace = "compute", *, device: str = "cpu") -> LoadedModel:
        path, store = folder / name, folder / f"{name}-tol"
        if not path.exists():
            with atomic_folder(path) as half:
                save_checkpoint(half, random_model(VARIED[name], dtype=torch.float32), None)
        checkpoint = Checkpoint.open(path)
        if place != "compute" and not store.exists():
            build_store(checkpoint, store, codec="fp32")
        tol = None if place == "compute" else store
        return load_model(checkpoint, tol=tol, rows=place, device=device, dtype=torch.float64)

    return load
