"""Checkpoints and ToL stores on the Hugging Face Hub: a card that says what they are, and whole files only."""

from __future__ import annotations

from pathlib import Path

from flexmemory import __version__
from flexmemory.model.accounting import count_parameters
from flexmemory.model.checkpoint import WEIGHTS, Checkpoint
from flexmemory.tol.format import MANIFEST
from flexmemory.tol.store import ToLStore
from flexmemory.tol.verify import verify_store

CARD = "README.md"
_HEAD = """---
library_name: flexmemory
tags:
- flexmemory
- memoryllm
{kind}---

# {name}

"""


def model_card(checkpoint: Checkpoint, *, name: str) -> str:
    """A card to begin with: what the files say of themselves, and headings for what only their maker knows."""
    config, counts = checkpoint.config, count_parameters(checkpoint.config)
    total = counts.backbone + counts.embedding + counts.head
    architecture = {"dense": "dense base", "memory": "MemoryLLM", "flex": f"Flex-MemoryLLM-{config.flex_ratio}h²"}
    facts = [
        f"| architecture | {architecture[config.architecture]} |",
        f"| parameters | {total:,} |",
        f"| of them needed beside lookups | {total - counts.memory:,} |",
        f"| layers, width, cells | {config.num_layers}, {config.hidden_size}, {config.intermediate_size} |",
        f"| vocabulary, longest sequence | {config.vocab_size:,}, {config.max_seq_len:,} |",
        f"| fingerprint | `{checkpoint.fingerprint[:16]}` |",
    ]
    lookups = f"    flexmemory tol build {name} --out TOL\n" if config.has_memory else ""
    return (
        _HEAD.format(kind="pipeline_tag: text-generation\n", name=name)
        + "A language model whose feed-forward layers are a memory indexed by token "
        "([arXiv 2602.00398](https://arxiv.org/abs/2602.00398)), by flexmemory.\n\n| | |\n|---|---:|\n"
        + "\n".join(facts)
        + f'\n\n## Use\n\n    flexmemory generate {name} --prompt "..."\n{lookups}\n'
        "## Training data\n\n[which text, its licences, how many tokens]\n\n"
        "## Evaluation\n\n[`flexmemory eval ppl`, with its standard error]\n\n"
        "## Limits\n\n[what it should not be used for]\n"
    )


def store_card(store: ToLStore, *, name: str) -> str:
    """As `model_card`, of a store."""
    manifest = store.manifest
    facts = [
        f"| rows | {manifest.vocab_size:,} tokens, {len(manifest.layers)} of {manifest.num_layers} layers |",
        f"| codec | {manifest.codec} |",
        f"| bytes a token | {manifest.stride_bytes:,} |",
        f"| of the checkpoint with fingerprint | `{manifest.checkpoint_fingerprint[:16]}` |",
    ]
    return (
        _HEAD.format(kind="", name=name)
        + "Token-wise lookups: the feed-forward memory of a model, computed once for every token.\n\n"
        + "| | |\n|---|---:|\n"
        + "\n".join(facts)
        + f'\n\n## Use\n\n    flexmemory generate CHECKPOINT --tol {name} --prompt "..."\n'
    )


def push(folder: Path, repo_id: str, *, private: bool = False, revision: str | None = None) -> str:
    """Check every byte of a checkpoint or ToL store, then upload it; the address comes back.

    A card is added where the folder has no README.md; the folder itself is not changed.

    Args:
        folder: A checkpoint, a run's folder (its newest checkpoint) or a ToL store.
        repo_id: OWNER/NAME on the hub; made if it does not exist.
        private: Whether a repository that is made is private.
        revision: A branch, by default the main one.

    Raises:
        FileNotFoundError: the folder is neither.
        ValueError: it is damaged, or `repo_id` is not of that form.
    """
    if repo_id.count("/") != 1 or not all(repo_id.split("/")):
        raise ValueError(f"expected OWNER/NAME as the repository, got {repo_id!r}")
    from huggingface_hub import HfApi  # takes half a second; tokenizers depends on it

    name = repo_id.split("/")[1]
    if (folder / MANIFEST).is_file() and not (folder / WEIGHTS).is_file():
        store = ToLStore.open(folder)
        verify_store(folder)
        path, card = store.path, store_card(store, name=name)
    else:
        checkpoint = Checkpoint.open(folder)
        checkpoint.verify()
        path, card = checkpoint.path, model_card(checkpoint, name=name)
    hub = HfApi(library_name="flexmemory", library_version=__version__)
    url = hub.create_repo(repo_id, private=private, exist_ok=True)
    if not (path / CARD).exists():
        hub.upload_file(path_or_fileobj=card.encode(), path_in_repo=CARD, repo_id=repo_id, revision=revision)
    message = f"Upload by flexmemory {__version__}"
    hub.upload_folder(folder_path=path, repo_id=repo_id, revision=revision, commit_message=message)
    return str(url)
