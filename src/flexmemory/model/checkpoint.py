"""Checkpoints: a folder of safetensors and JSON that is whole or absent.

    CHECKPOINT/
      model.safetensors       weights by name; a tied head is stored once
      rows.safetensors        rows that are given instead of computed, where some were edited (docs/editing.md)
      config.json             ModelConfig and `model_type`
      tokenizer.json          with tokenizer_config.json, where the model has a tokenizer
      manifest.json           format version, size and SHA-256 of every file, fingerprints

Memory weights are the tensors `blocks.*.memory.*`; `Checkpoint.load(memory=False)` does not read them. Nor does
`Checkpoint.load(embedding=False)` read `embedding.weight`, unless it is the head too.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flexmemory.config import KEYS_OF_TRANSFORMERS, MODEL_TYPE, ModelConfig, from_dict, to_dict
from flexmemory.model.transformer import Transformer
from flexmemory.storage import read_json, sha256_file, write_json
from flexmemory.tokenizer import Tokenizer

FORMAT_VERSION = 1
WEIGHTS = "model.safetensors"
ROWS = "rows.safetensors"
"""Tensors `ids.L` [N] int64 and `rows.L` [N, D] for each layer L in which rows are given."""


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it could not be written, for instance because the disk is full.
    """
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(f"could not write {path.name} ({error}); is the disk full?") from error


def save_checkpoint(folder: Path, model: Transformer, tokenizer: Tokenizer | None) -> None:
    """Write `model` into the existing `folder` (see `storage.atomic_folder`); the manifest comes last."""
    if rows := given_rows(model):
        save_tensors(rows, folder / ROWS)
    write_checkpoint(folder, model.config, dict(model.named_parameters()), tokenizer)


def given_rows(model: Transformer) -> dict[str, Tensor]:
    """The rows of a model that are given, named as in `ROWS`."""
    memories = enumerate(model.memories) if model.config.has_memory else ()
    given = [(layer, memory.given) for layer, memory in memories if memory.given is not None]
    return {f"{name}.{layer}": tensor for layer, rows in given for name, tensor in rows.named_buffers()}


def write_checkpoint(
    folder: Path, config: ModelConfig, parameters: dict[str, Tensor], tokenizer: Tokenizer | None
) -> None:
    """`save_checkpoint` of a model given by its parameters; a head tied to the embedding is not among them."""
    save_tensors({name: tensor.detach() for name, tensor in parameters.items()}, folder / WEIGHTS)
    write_json(folder / "config.json", {"model_type": MODEL_TYPE, **to_dict(config)})
    if tokenizer is not None:
        tokenizer.save(folder)
    seal(folder, tokenizer)


def seal(folder: Path, tokenizer: Tokenizer | None, *, names: Collection[str] | None = None) -> None:
    """Write `manifest.json` over all files of `folder`, or those of them that are among `names`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if names is not None:
        files = [path for path in files if path.relative_to(folder).as_posix() in names]
    entries = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in files
    }
    manifest = {
        "format": "flexmemory-checkpoint",
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint_of(*(entries[name]["sha256"] for name in (WEIGHTS, ROWS) if name in entries)),
        "tokenizer_fingerprint": "" if tokenizer is None else tokenizer.fingerprint,
        "files": entries,
    }
    write_json(folder / "manifest.json", manifest)


def fingerprint_of(first: str, *others: str) -> str:
    """The fingerprint of what several fingerprints stand for; that of one is itself."""
    return hashlib.sha256("\n".join((first, *others)).encode()).hexdigest() if others else first


@dataclasses.dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on disk, opened and found whole."""

    path: Path
    config: ModelConfig
    fingerprint: str
    """SHA-256 of the weights file, as recorded when it was saved; of more where rows are given or it was edited."""
    tokenizer_fingerprint: str
    """SHA-256 of the tokenizer, empty where there is none."""
    lineage: tuple[str, ...] = ()
    """Fingerprints of the checkpoints that it was edited from, the first one first."""

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open a checkpoint folder, or the newest checkpoint of a training run's folder.

        Raises:
            FileNotFoundError: there is no checkpoint at `path`.
            ValueError: it is incomplete, damaged or of a newer format.
        """
        folder = find_checkpoint(Path(path))
        manifest = read_json(folder / "manifest.json")
        try:
            return cls._checked(folder, manifest)
        except KeyError as error:
            raise ValueError(f"{folder}/manifest.json lacks {error}; it is damaged") from error

    @classmethod
    def _checked(cls, folder: Path, manifest: dict[str, Any]) -> Checkpoint:
        if manifest.get("format") != "flexmemory-checkpoint":
            raise ValueError(f"{folder} is not a flexmemory checkpoint (manifest format {manifest.get('format')!r})")
        if manifest["format_version"] > FORMAT_VERSION:
            raise ValueError(
                f"{folder} has checkpoint format {manifest['format_version']}; this version reads up to "
                f"{FORMAT_VERSION}: update flexmemory"
            )
        for name, entry in manifest["files"].items():
            file = folder / name
            size = file.stat().st_size if file.is_file() else None
            if size != entry["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes, expected {entry['bytes']}"
                raise ValueError(f"checkpoint {folder} is incomplete: {name} {found}")
        values = read_json(folder / "config.json")
        if values.pop("model_type", None) != MODEL_TYPE:
            raise ValueError(f"{folder}/config.json is not of model_type {MODEL_TYPE!r}")
        ours = {key: value for key, value in values.items() if key not in KEYS_OF_TRANSFORMERS}
        return cls(
            folder,
            from_dict(ModelConfig, ours),
            manifest["fingerprint"],
            manifest["tokenizer_fingerprint"],
            tuple(edit["base"] for edit in manifest.get("edits", [])),
        )

    def verify(self) -> None:
        """Check every file against its recorded SHA-256.

        Raises:
            ValueError: a file differs.
        """
        for name, entry in read_json(self.path / "manifest.json")["files"].items():
            if sha256_file(self.path / name) != entry["sha256"]:
                raise ValueError(f"checkpoint {self.path} is damaged: {name} does not match its checksum")

    def tokenizer(self) -> Tokenizer:
        """The tokenizer saved with the weights.

        Raises:
            FileNotFoundError: there is none.
        """
        return Tokenizer.load(self.path)

    def stored_dtype(self) -> torch.dtype:
        """The dtype of the weights on disk."""
        return _read_tensor(self.path / WEIGHTS, "norm.weight", device="cpu").dtype

    def load(
        self,
        *,
        memory: bool = True,
        embedding: bool = True,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Transformer:
        """The model, in inference mode of its modules (`eval`), in `dtype` (as stored by default) on `device`.

        On a CPU, weights in the dtype that they are stored in are mapped, not read: they come to memory when they are
        used, and can leave it again. The mapping is private, so writing to a weight changes no file.

        Args:
            memory: Whether to read the weights that rows replace; without them `forward` needs `rows`.
            embedding: Whether to read the embedding; without it `forward` needs rows that carry it. A head tied to it
                is read in any case.
            device: Where weights go, one tensor at a time.
            dtype: What weights are converted to.

        Raises:
            ValueError: the file's tensors are not those that the configuration asks for.
        """
        with torch.device("meta"):
            model = Transformer(self.config, with_memory=memory, with_embedding=embedding)
        expected = dict(model.named_parameters())  # a tied head appears once, as the embedding
        try:
            with safe_open(self.path / WEIGHTS, framework="pt") as file:
                names = {name for name in file.keys() if memory or ".memory." not in name}  # noqa: SIM118 - not a mapping
            if model.embedding is None:
                names.discard("embedding.weight")
            if names != expected.keys():
                odd = ", ".join(sorted(names ^ expected.keys())[:5])
                raise ValueError(f"{self.path / WEIGHTS} does not fit its config.json: see tensors {odd}")
            for name, parameter in expected.items():
                tensor = _read_tensor(self.path / WEIGHTS, name, device=device)
                if tensor.shape != parameter.shape:
                    raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(parameter.shape)}")
                owner, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(owner), attribute, nn.Parameter(tensor.to(dtype or tensor.dtype)))
        except SafetensorError as error:
            raise ValueError(f"{self.path / WEIGHTS} cannot be read ({error}); it is damaged") from error
        model.tie_head()
        if memory and (self.path / ROWS).is_file():
            try:
                model.give_rows(load_file(self.path / ROWS, device=str(device)))
            except ValueError as error:
                raise ValueError(f"{self.path / ROWS} does not fit its config.json ({error}); it is damaged") from error
        return model.eval()


def _read_tensor(path: Path, name: str, *, device: torch.device | str) -> Tensor:
    """One tensor, on a CPU as a mapping of its own, so that a weight that is replaced gives its memory back."""
    with safe_open(path, framework="pt", device=str(device)) as file:
        return file.get_tensor(name)


def find_checkpoint(path: Path) -> Path:
    """`path` itself if it is a checkpoint, else the newest checkpoint of the run folder `path`.

    Raises:
        FileNotFoundError: neither.
    """
    if (path / "manifest.json").is_file() and (path / WEIGHTS).is_file():
        return path
    newest = max(path.glob("checkpoints/step-*/manifest.json"), default=None)
    if newest is not None:
        return newest.parent
    if (path / WEIGHTS).is_file():
        raise FileNotFoundError(f"{path} is an incomplete checkpoint: it has weights but no manifest.json")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a checkpoint or run folder")
    raise FileNotFoundError(f"no checkpoint in {path}: expected {WEIGHTS} and manifest.json, or checkpoints/step-*/")
