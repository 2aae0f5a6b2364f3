"""Rows of a few tokens replaced in a copy of a store: files that hold none of them are links to the old ones.

A row of numbers is stored as it is; of a row in few bits, the slice that changes is coded again by the store's own
tensors, and the others keep their bytes. Dimension key: N rows, D model width.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from flexmemory.storage import link_files
from flexmemory.tol.codec import get_codec
from flexmemory.tol.coding import decode_slice, encode_slice
from flexmemory.tol.format import MANIFEST, Manifest
from flexmemory.tol.store import ToLStore

LayerRows = tuple[Int64[Tensor, " N"], Float[Tensor, "N D"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recoded:
    """Rows as they are to be stored."""

    data: dict[int, bytes]
    """The bytes of the row at each place, all slices, without padding."""
    errors: dict[tuple[int, int], float]
    """The largest error of a number by band and slice; empty for numbers as they are."""
    relative_error: float
    """The largest norm of an error over the norm of its row: what the store's codec loses."""


def recode(store: ToLStore, rows: Mapping[int, LayerRows]) -> Recoded:
    """The bytes of edited rows.

    Args:
        store: It gives the coding, and the slices that stay.
        rows: For each layer distinct token ids and their rows.

    Raises:
        OSError: a row cannot be read.
        ValueError: the store does not hold a layer (for a token), or a number is too large for its codec.
    """
    missing = sorted(set(rows) - set(store.layers))
    if missing:
        raise ValueError(f"ToL store {store.path} holds no layers {missing}, of which rows are to be edited")
    data: dict[int, bytearray] = {}
    errors: dict[tuple[int, int], float] = {}
    worst = 0.0
    for layer, (token_ids, layer_rows) in rows.items():
        place = store.embedding + store.layers.index(layer)
        for token, row in zip(token_ids.tolist(), layer_rows.float().cpu(), strict=True):
            at = token if store.positions is None else int(store.positions[token])
            if at not in data:
                data[at] = bytearray(read_row(store, at))
            offset, part, decoded = _coded(store, at, place, row, token=token)
            data[at][offset : offset + len(part)] = part
            error = decoded - row
            worst = max(worst, float(error.norm() / row.norm().clamp(min=1e-30)))
            if not store.plain:
                band = int(store.band_of(torch.tensor([at])))
                errors[band, place] = max(errors.get((band, place), 0.0), float(error.abs().max()))
    return Recoded(data={at: bytes(row) for at, row in data.items()}, errors=errors, relative_error=worst)


def _coded(
    store: ToLStore, at: int, place: int, row: Float[Tensor, " D"], *, token: int
) -> tuple[int, bytes, Float[Tensor, " D"]]:
    """Where a slice starts in its row, its bytes, and what they are decoded to."""
    if store.plain:
        codec = get_codec(store.codec)
        part, decoded = codec.encode(row[None, None]), torch.empty((1, 1, len(row)), dtype=codec.dtype)
        codec.decode(part, decoded)
        offset, number = place * part.shape[1], decoded[0, 0].float()
    else:
        band = int(store.band_of(torch.tensor([at])))
        coding, tensors = store.bands[band].slices[place], store.tensors[band][place]
        if coding is None:
            raise ValueError(
                f"ToL store {store.path} keeps no row of token {token} in {store.manifest.slice_name(place)} (its plan "
                "leaves it out); make a store that does"
            )
        part = encode_slice(row[None], coding, tensors)
        offset, number = store.bands[band].offsets()[place], decode_slice(part, coding, tensors)[0]
    if not number.isfinite().all():
        raise ValueError(f"the row of token {token} has numbers too large for codec {store.codec}")
    return offset, bytes(part[0].numpy()), number


def read_row(store: ToLStore, place: int) -> bytes:
    """The bytes of the row at a place, without padding.

    Raises:
        OSError: they cannot be read.
    """
    file, offset, size = _where(store, place)
    with (store.path / file).open("rb") as opened:
        opened.seek(offset)
        found = opened.read(size)
    if len(found) != size:
        raise OSError(f"{store.path / file} ends before byte {offset + size}")
    return found


def _where(store: ToLStore, place: int) -> tuple[str, int, int]:
    """File, offset and bytes of the row at a place."""
    shards = store.manifest.shards
    shard = shards[bisect.bisect_right([shard.first_token for shard in shards], place) - 1]
    size = store.row_bytes if store.plain else store.bands[shard.band].row_bytes
    return shard.file, shard.data_offset + (place - shard.first_token) * store.manifest.stride_of(shard), size


def write_rows(store: ToLStore, folder: Path, data: Mapping[int, bytes]) -> Manifest:
    """Fill the empty `folder` with the files of a store, but for its manifest, with these rows at these places.

    Returns:
        The manifest with their checksums, to be written.

    Raises:
        OSError: a file cannot be read or written.
    """
    touched = {_where(store, place)[0] for place in data}
    link_files(store.path, folder, leave_out={MANIFEST, *touched})
    for name in sorted(touched):
        shutil.copyfile(store.path / name, folder / name)
        with (folder / name).open("r+b") as file:
            for place, row in data.items():
                own, offset, size = _where(store, place)
                if own == name:
                    assert len(row) == size
                    file.seek(offset)
                    file.write(row)
    copied = dataclasses.replace(store, path=folder)
    checksums = [
        hashlib.sha256(copied.read_block(block).data).hexdigest()
        if any(block.first_token <= place < block.first_token + block.tokens for place in data)
        else block.sha256
        for block in store.manifest.blocks()
    ]
    return store.manifest.with_blocks(checksums)
