"""Patches applied to checkpoints and stores, and taken back to the last bit.

Nothing is written over: an edited copy is made, whose unchanged files are links to the old ones, so a copy of a store
costs the shards that hold an edited row. Every edit leaves a record beside the files:

    edits/0000/patch-0.safetensors   the patches, in their order
    edits/0000/undo.safetensors      the numbers that they replaced, and the manifest before

`revert` needs nothing else. The fingerprint of an edited checkpoint is made of the old one and the patches', so that
an equally edited store can say that it fits.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from flexmemory.interpret.patch import Patch, check_base, check_shape, edited_fingerprint
from flexmemory.model.checkpoint import ROWS, WEIGHTS, Checkpoint, given_rows, save_tensors
from flexmemory.storage import atomic_folder, link_files, read_json, sha256_file, write_json
from flexmemory.tol.edited import Edited
from flexmemory.tol.format import MANIFEST, Manifest
from flexmemory.tol.rewrite import LayerRows, read_row, recode, write_rows
from flexmemory.tol.store import ToLStore

EDITS = "edits"
UNDO = "undo.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EditedStore:
    """A store with patches applied."""

    store: ToLStore
    relative_error: float
    """The largest norm of what its codec took off a row that was given, over the norm of that row."""


def apply_to_checkpoint(checkpoint: Checkpoint, patches: Sequence[Patch], out: Path) -> Checkpoint:
    """Write an edited copy of a checkpoint to the new folder `out`, whole or not at all.

    Rows that are given are a file beside the weights (`model.checkpoint.ROWS`); other edits change the weights.

    Raises:
        FileExistsError: `out` exists.
        OSError: a file could not be written.
        ValueError: there is no patch, or one was made for something else.
    """
    _check(patches, {checkpoint.fingerprint, *checkpoint.lineage}, checkpoint.tokenizer_fingerprint, checkpoint.path)
    model = edited = checkpoint.load()
    for patch in patches:
        edited = patch.apply(edited)
    before = dict(model.named_parameters())
    changed = {name: tensor for name, tensor in edited.named_parameters() if tensor is not before[name]}
    before_rows, rows = given_rows(model), given_rows(edited)
    rows_change = any(step.kind == "rows" for patch in patches for step in patch.steps)
    manifest = read_json(checkpoint.path / MANIFEST)
    with atomic_folder(out) as folder:
        fresh = {MANIFEST} | ({WEIGHTS} if changed else set()) | ({ROWS} if rows_change else set())
        link_files(checkpoint.path, folder, leave_out=fresh)
        if changed:
            shutil.copyfile(checkpoint.path / WEIGHTS, folder / WEIGHTS)
            _overwrite(folder / WEIGHTS, changed)
        if rows_change:
            save_tensors(rows, folder / ROWS)
        undo: dict[str, Tensor] = {}
        for name, tensor in changed.items():
            undo |= _replaced(name, before[name].detach(), tensor.detach())
        if before_rows and rows_change:
            undo[ROWS] = _bytes_of(checkpoint.path / ROWS)
        edits = manifest.get("edits", [])
        record = _record(folder, len(edits), patches, undo | {MANIFEST: _bytes_of(checkpoint.path / MANIFEST)})
        written = [folder / name for name in sorted(fresh - {MANIFEST})] + sorted(record.iterdir())
        files = manifest["files"] | {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for path in written
        }
        entry = {"base": checkpoint.fingerprint, "patches": [patch.fingerprint for patch in patches]}
        fingerprint = edited_fingerprint(checkpoint.fingerprint, patches)
        write_json(folder / MANIFEST, manifest | {"fingerprint": fingerprint, "files": files, "edits": [*edits, entry]})
    return Checkpoint.open(out)


def apply_to_store(store: ToLStore, patches: Sequence[Patch], out: Path) -> EditedStore:
    """Write an edited copy of a store to the new folder `out`, whole or not at all; no other row is computed or moved.

    Rows become what the store's codec makes of them; in plain stores they are rounded to its dtype. The store then fits
    the checkpoint that it fitted before, and one with the same patches.

    Raises:
        FileExistsError: `out` exists.
        OSError: a file could not be read or written.
        ValueError: there is no patch, one was made for something else or changes more than rows, or the store lacks a
            layer.
    """
    manifest = store.manifest
    known = {manifest.checkpoint_fingerprint, *(edit.fingerprint for edit in manifest.edits)}
    _check(patches, known, manifest.tokenizer_fingerprint, store.path)
    rows = _rows_of(patches, store)
    coded = recode(store, rows)
    before = manifest.edits[-1].fingerprint if manifest.edits else manifest.checkpoint_fingerprint
    edit = Edited(
        patches=tuple(patch.fingerprint for patch in patches),
        fingerprint=edited_fingerprint(before, patches),
        tokens=tuple(sorted({token for ids, _ in rows.values() for token in ids.tolist()})),
    )
    with atomic_folder(out) as folder:
        places = sorted(coded.data)
        old = [read_row(store, place) for place in places]
        undo = {
            "places": torch.tensor(places),
            "sizes": torch.tensor([len(row) for row in old]),
            "rows": torch.frombuffer(bytearray(b"".join(old)), dtype=torch.uint8),
            MANIFEST: _bytes_of(store.path / MANIFEST),
        }
        written = write_rows(store, folder, coded.data)
        _record(folder, len(manifest.edits), patches, undo)
        written = _with_errors(dataclasses.replace(written, edits=(*manifest.edits, edit)), coded.errors)
        write_json(folder / MANIFEST, written.to_json())
    return EditedStore(store=ToLStore.open(out), relative_error=coded.relative_error)


def revert(edited: Path, out: Path) -> None:
    """Take the last edit of a checkpoint or store back, into the new folder `out`: the bytes are those of before.

    Raises:
        FileExistsError: `out` exists.
        FileNotFoundError: there is no checkpoint or store at `edited`.
        OSError: a file could not be written.
        ValueError: it was not edited, or is damaged.
    """
    store = ToLStore.open(edited) if is_store(edited) else None
    path = edited if store else Checkpoint.open(edited).path
    edits = read_json(path / MANIFEST).get("edits", [])
    if not edits:
        raise ValueError(f"{path} was not edited, or not by `flexmemory edit apply`: there is nothing to take back")
    record = path / EDITS / f"{len(edits) - 1:04d}"
    if not (record / UNDO).is_file():
        raise ValueError(f"{path} is damaged: {record / UNDO} is missing; use the copy that the edit was applied to")
    undo = load_file(record / UNDO)
    ours = {file.relative_to(path).as_posix() for file in record.iterdir()}
    with atomic_folder(out) as folder:
        if store:
            sizes = undo["sizes"].tolist()
            old = [bytes(row.numpy()) for row in undo["rows"].split(sizes)]
            write_rows(store, folder, dict(zip(undo["places"].tolist(), old, strict=True)))
            for name in ours:
                (folder / name).unlink()
        else:
            _revert_files(path, folder, undo, ours)
        for parent in (folder / EDITS / record.name, folder / EDITS):
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        (folder / MANIFEST).write_bytes(bytes(undo[MANIFEST].numpy()))
        _verify(folder, is_store=store is not None)


def is_store(path: Path) -> bool:
    """Whether a folder is a ToL store, by its manifest."""
    return (path / MANIFEST).is_file() and "codec" in read_json(path / MANIFEST)


def _revert_files(path: Path, folder: Path, undo: Mapping[str, Tensor], ours: Iterable[str]) -> None:
    names = {name.rpartition("@")[0] for name in undo if "@" in name}
    link_files(path, folder, leave_out={MANIFEST, ROWS, *ours} | ({WEIGHTS} if names else set()))
    if names:
        shutil.copyfile(path / WEIGHTS, folder / WEIGHTS)
        with safe_open(path / WEIGHTS, framework="pt") as file:
            _overwrite(folder / WEIGHTS, {name: _restored(name, file.get_tensor(name), undo) for name in names})
    if ROWS in undo:
        (folder / ROWS).write_bytes(bytes(undo[ROWS].numpy()))
    elif ROWS in json.loads(bytes(undo[MANIFEST].numpy()))["files"]:
        link_files(path, folder, leave_out={p.name for p in path.iterdir()} - {ROWS})


def _check(patches: Sequence[Patch], fingerprints: set[str], tokenizer: str, target: Path) -> None:
    if not patches:
        raise ValueError("there is no patch to apply")
    for patch in patches:
        check_base(patch, fingerprints=fingerprints, tokenizer=tokenizer, target=target)


def _rows_of(patches: Sequence[Patch], store: ToLStore) -> dict[int, LayerRows]:
    """The rows that patches give, the last one's where several do."""
    found: dict[int, dict[int, Tensor]] = {}
    manifest = store.manifest
    for patch in patches:
        sizes = {name: getattr(manifest, name) for name in ("vocab_size", "num_layers", "hidden_size")}
        check_shape(patch, sizes | {"intermediate_size": patch.shape["intermediate_size"]})
        if not patch.rows_only:
            kinds = sorted({step.kind for step in patch.steps} - {"rows"})
            raise ValueError(
                f"the patch changes more than rows ({', '.join(kinds)}), and {store.path} has nothing else: apply it "
                "to the checkpoint, and build a store from that with `flexmemory tol build`"
            )
        for step in patch.steps:
            assert step.ids is not None
            found.setdefault(step.layer, {}).update(zip(step.ids.tolist(), step.numbers, strict=True))
    return {
        layer: (torch.tensor(list(rows)), torch.stack([row.float() for row in rows.values()]))
        for layer, rows in found.items()
    }


def _with_errors(manifest: Manifest, errors: Mapping[tuple[int, int], float]) -> Manifest:
    """The manifest with errors at least as large as these."""
    if manifest.coded is None:
        return manifest
    kept = [list(band) for band in manifest.coded.errors]
    for (band, place), error in errors.items():
        kept[band][place] = max(kept[band][place], error)
    coded = dataclasses.replace(manifest.coded, errors=tuple(tuple(band) for band in kept))
    return dataclasses.replace(manifest, coded=coded)


def _record(folder: Path, number: int, patches: Sequence[Patch], undo: dict[str, Tensor]) -> Path:
    record = folder / EDITS / f"{number:04d}"
    record.mkdir(parents=True)
    for place, patch in enumerate(patches):
        patch.save(record / f"patch-{place}.safetensors")
    save_file(undo, record / UNDO)
    return record


def _bytes_of(path: Path) -> Tensor:
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)


def _replaced(name: str, before: Tensor, after: Tensor) -> dict[str, Tensor]:
    """The rows or columns of a matrix that change, whichever are fewer numbers, as they were."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[before.dtype.itemsize]
    differ = before.cpu().view(bits) != after.cpu().view(bits)
    axes = [differ.any(dim=1 - axis).nonzero()[:, 0] for axis in (0, 1)]
    axis = int(len(axes[1]) * differ.shape[0] < len(axes[0]) * differ.shape[1])
    numbers = before.cpu().index_select(axis, axes[axis]).contiguous()
    return {f"{name}@{axis}": numbers, f"{name}@ids": axes[axis]}


def _restored(name: str, tensor: Tensor, undo: Mapping[str, Tensor]) -> Tensor:
    axis = int(f"{name}@1" in undo)
    return tensor.index_copy(axis, undo[f"{name}@ids"], undo[f"{name}@{axis}"])


def _overwrite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors over those of a safetensors file, all of whose other bytes stay."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for name, tensor in tensors.items():
            start, end = header[name]["data_offsets"]
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            assert len(data) == end - start
            file.seek(8 + length + start)
            file.write(data.data)


def _verify(folder: Path, *, is_store: bool) -> None:
    """Refuse a reverted copy that is not what its manifest says."""
    if is_store:
        damaged: Sequence[object] = ToLStore.open(folder).damaged_blocks()
    else:
        entries = read_json(folder / MANIFEST)["files"]
        damaged = [name for name, entry in entries.items() if sha256_file(folder / name) != entry["sha256"]]
    if damaged:
        raise ValueError(f"{damaged[0]} is not as it was before the edit; the edited copy was changed or is damaged")
