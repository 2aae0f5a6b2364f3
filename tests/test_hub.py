"""What would be uploaded, and what is refused; the hub itself is not asked."""

from pathlib import Path

import huggingface_hub
import pytest

from flexmemory.hub import model_card, push, store_card
from flexmemory.model.checkpoint import WEIGHTS
from flexmemory.tol.build import build_store
from flexmemory.tol.store import ToLStore
from tests.conftest import VARIED, random_model
from tests.tol.conftest import flip_byte, write_checkpoint


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict]]:
    """Calls of the hub, kept instead of made."""
    calls: list[tuple[str, dict]] = []
    for name in ("create_repo", "upload_file", "upload_folder"):

        def call(_self, *args, name=name, **options):
            calls.append((name, options | {"args": args}))
            return f"https://hub.example/{args[0]}" if args else None

        monkeypatch.setattr(huggingface_hub.HfApi, name, call)
    return calls


@pytest.fixture
def checkpoint(tmp_path: Path):
    return write_checkpoint(tmp_path / "model", random_model(VARIED["nano-flex2"]), text="one two three")


def test_a_checkpoint_is_uploaded_whole_with_a_card(hub, checkpoint):
    assert push(checkpoint.path, "me/nano", private=True, revision="v1") == "https://hub.example/me/nano"
    (created, made), (_, card), (uploaded, folder) = hub
    assert (created, uploaded) == ("create_repo", "upload_folder")
    assert made == {"args": ("me/nano",), "private": True, "exist_ok": True}
    text = card["path_or_fileobj"].decode()
    assert card["path_in_repo"] == "README.md"
    assert text == model_card(checkpoint, name="nano")
    assert folder["folder_path"] == checkpoint.path
    assert folder["revision"] == card["revision"] == "v1"
    assert not (checkpoint.path / "README.md").exists()


def test_a_card_that_is_there_is_kept(hub, checkpoint):
    (checkpoint.path / "README.md").write_text("mine")
    push(checkpoint.path, "me/nano")
    assert [name for name, _ in hub] == ["create_repo", "upload_folder"]


def test_a_store(hub, checkpoint, tmp_path):
    build_store(checkpoint, tmp_path / "tol")
    push(tmp_path / "tol", "me/nano-tol")
    assert hub[1][1]["path_or_fileobj"].decode() == store_card(ToLStore.open(tmp_path / "tol"), name="nano-tol")
    assert checkpoint.fingerprint[:16] in hub[1][1]["path_or_fileobj"].decode()


def test_cards_say_what_the_files_say(checkpoint):
    card = model_card(checkpoint, name="nano")
    total = sum(parameter.numel() for parameter in checkpoint.load().parameters())
    kept = sum(parameter.numel() for parameter in checkpoint.load(memory=False).parameters())
    assert f"| parameters | {total:,} |" in card
    assert f"| of them needed beside lookups | {kept:,} |" in card
    assert "Flex-MemoryLLM-2h²" in card
    metadata = huggingface_hub.ModelCard(card).data.to_dict()
    assert metadata["library_name"] == "flexmemory"
    assert metadata["pipeline_tag"] == "text-generation"
    dense = write_checkpoint(checkpoint.path.parent / "dense", random_model(VARIED["nano-base"]))
    assert "tol build" not in model_card(dense, name="dense")


def test_nothing_damaged_is_uploaded(hub, checkpoint, tmp_path):
    build_store(checkpoint, tmp_path / "tol")
    flip_byte(tmp_path / "tol" / "rows-00000.safetensors", 5000)
    with pytest.raises(ValueError, match="damaged"):
        push(tmp_path / "tol", "me/nano")
    flip_byte(checkpoint.path / WEIGHTS, 5000)
    with pytest.raises(ValueError, match="does not match its checksum"):
        push(checkpoint.path, "me/nano")
    with pytest.raises(ValueError, match="expected OWNER/NAME"):
        push(checkpoint.path, "nano")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        push(tmp_path / "nothing", "me/nano")
    assert not hub
