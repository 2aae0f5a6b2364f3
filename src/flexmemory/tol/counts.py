"""How often each token occurs, stored beside the rows, so that those of frequent tokens can be kept in fast memory."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from jaxtyping import Int64
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from flexmemory.storage import sha256_file
from flexmemory.tol.format import Counts

COUNTS = "counts.safetensors"
"""One tensor `counts` [V] int64."""


def counts_file(counts: Int64[Tensor, " V"]) -> tuple[bytes, Counts]:
    """The file of `counts`, and what the manifest is to say of it."""
    data = save({"counts": counts.contiguous()})
    return data, Counts(sha256=hashlib.sha256(data).hexdigest(), total=int(counts.sum()))


def read_counts(folder: Path, entry: Counts, *, vocab_size: int) -> Int64[Tensor, " V"]:
    """The counts of a store, checked.

    Raises:
        ValueError: the file is missing, or not what the manifest says.
    """
    path = folder / COUNTS
    if not path.is_file() or sha256_file(path) != entry.sha256:
        reason = "does not match its checksum" if path.is_file() else "is missing"
        raise ValueError(f"ToL store {folder} is damaged: {COUNTS} {reason}; build it again")
    try:
        counts = load_file(path)["counts"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} holds no counts ({error}); build the store again") from error
    if counts.dtype != torch.int64 or counts.shape != (vocab_size,):
        raise ValueError(f"{path} holds {counts.dtype} of shape {list(counts.shape)}, expected int64 of [{vocab_size}]")
    return counts


def most_frequent(counts: Int64[Tensor, " V"], num_ids: int) -> Int64[Tensor, " H"]:
    """The `num_ids` most frequent ids, or all if they are fewer; ties by id.

    Raises:
        ValueError: `num_ids` is negative.
    """
    if num_ids < 0:
        raise ValueError(f"the number of ids must not be negative, got {num_ids}")
    return torch.sort(counts, descending=True, stable=True).indices[:num_ids]
