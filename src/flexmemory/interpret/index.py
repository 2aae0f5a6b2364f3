"""Build an index: what is asked of a memory again and again, computed once (docs/index-format.md).

Work happens in `OUT.partial`, a step at a time: each layer, the nearest tokens, each space of clusters and maps. A step
that is safe on disk is a line of `progress.jsonl`; a build that was interrupted goes on with the next and ends with the
bytes of one that was not. Neither V x K coefficients nor V x V cosines ever exist; clusters and maps alone need V x K
numbers of one layer at a time, in 16 bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64, Shaped
from torch import Tensor
from tqdm import tqdm

from flexmemory import __version__
from flexmemory.config import to_dict
from flexmemory.interpret.index_format import (
    CLUSTERS,
    KEYS,
    LAYERS,
    MANIFEST,
    TOKENS,
    ArraySpec,
    Contents,
    CountsEntry,
    Keep,
    Manifest,
    Mask,
    array_specs,
    partial_folder,
)
from flexmemory.interpret.index_layer import WORKING_BYTES, layer_arrays, layer_facts, nearest_arrays
from flexmemory.interpret.index_spaces import MapMethod, clustered, embedding_points, layer_points, mapped
from flexmemory.interpret.projection import require_opentsne
from flexmemory.interpret.reader import MemoryIndex
from flexmemory.interpret.tables import require_pyarrow, write_keys, write_tokens
from flexmemory.interpret.tkv import TokenMemory
from flexmemory.interpret.vocabulary import Vocabulary
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.storage import Progress, publish, sha256_file, write_json

PER_TOKEN = ("token_keys_idx", "token_keys_val", "row_norms")
"""Arrays whose second axis is the layer's; of others with layers it is the first."""

TOKENS_PER_CLUSTER = 8

logger = logging.getLogger(__name__)
Placed = dict[str, tuple[Any, Tensor]]
"""Numbers, and where they are in the array of that name."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class IndexOptions:
    """What to put into an index, and how it is computed."""

    layers: tuple[int, ...] | None = None
    """By default all that the memory has."""
    keep: Keep = dataclasses.field(default_factory=Keep)
    neighbors: bool = True
    clusters: int = 100
    """Clusters of a layer's tokens, at most one for every `TOKENS_PER_CLUSTER`; 0 for none."""
    maps: MapMethod | None = "tsne"
    """How maps are made, if any are: slowly by t-SNE on the CPU, or from two principal components."""
    cluster_layers: tuple[int, ...] | None = None
    """Layers whose tokens are clustered; by default the first, middle and last."""
    map_layers: tuple[int, ...] | None = None
    """Layers with a map, beside the one of embeddings; by default the first."""
    tables: bool = True
    """Whether to write tokens.parquet and keys.parquet, which takes pyarrow."""
    seed: int = 0
    working_bytes: int = WORKING_BYTES
    """What a chunk and all that is made of it may take on the device."""


def build_index(
    checkpoint: Checkpoint,
    out: Path,
    *,
    counts: Int64[Tensor, " V"] | None = None,
    counts_source: str = "",
    options: IndexOptions | None = None,
    device: torch.device | str = "cpu",
) -> MemoryIndex:
    """Index the memory of a checkpoint in the new folder `out`; run again after an interruption, it goes on.

    All is computed in fp32 (fp64 if the checkpoint is), whatever the dtype of the weights.

    Args:
        checkpoint: A memory or flex model, or a dense one, of which layer 0 alone is a function of the token.
        out: The folder to make.
        counts: How often each token occurs in a text: those that do not are left out of statements about tokens.
        counts_source: Which text that is, for people.
        options: What to put into it.
        device: Where it is computed.

    Raises:
        FileExistsError: `out` exists.
        ImportError: a library that `options` need is not installed.
        ValueError: the model has no cells, layers are not the model's, counts leave no two tokens, numbers are not
            finite, or `OUT.partial` holds an unfinished index of another kind.
    """
    options = options or IndexOptions()
    if out.exists():
        raise FileExistsError(f"{out} already exists; choose another folder or remove it")
    if options.tables:
        require_pyarrow()
    if options.maps == "tsne":
        require_opentsne()
    dtype = torch.promote_types(checkpoint.stored_dtype(), torch.float32)
    memory = TokenMemory(checkpoint.load(device=device, dtype=dtype))
    vocabulary, mask = _tokens(checkpoint, counts)
    contents = _contents(memory, options, kept_tokens=mask.tokens)
    manifest = Manifest(
        checkpoint_fingerprint=checkpoint.fingerprint,
        tokenizer_fingerprint=checkpoint.tokenizer_fingerprint,
        config=to_dict(checkpoint.config),
        scope=memory.scope,
        layers=contents.layers,
        cluster_layers=contents.cluster_layers,
        counts=None if counts is None else CountsEntry(source=counts_source, total=int(counts.sum())),
        mask=mask,
        keep=options.keep,
        seeds={"clusters": options.seed, "maps": options.seed},
        arrays={},
        files={},
        flexmemory=__version__,
    )
    identity = {
        "index": manifest.to_json(),
        "contents": dataclasses.asdict(contents),
        "mask_sha256": _sha256(vocabulary.mask),
        "counts_sha256": "" if counts is None else _sha256(counts),
        "tables": options.tables,
        "maps": options.maps,
        "working_bytes": options.working_bytes,  # chunks of another height round differently
        "device": torch.device(device).type,
    }
    partial = partial_folder(out)
    with Progress.open(partial, json.loads(json.dumps(identity))) as progress:
        arrays = _open_arrays(partial, array_specs(contents), fresh=not progress.lines)
        steps = [*_list_steps(memory, vocabulary, contents, options)]
        steps += _space_steps(memory, vocabulary, contents, options, extremes=arrays["key_hist_edges"])
        _run(steps, arrays, progress)
        facts = {line["step"]: line["facts"] for line in progress.lines}
        _write_tables(partial, facts, arrays, contents, vocabulary if options.tables else None)
        write_json(partial / MANIFEST, _sealed(partial, manifest, arrays).to_json())
        del arrays
        publish(partial, out)
        (out / Progress.NAME).unlink()
    return MemoryIndex.open(out, checkpoint=checkpoint)


def _tokens(checkpoint: Checkpoint, counts: Int64[Tensor, " V"] | None) -> tuple[Vocabulary, Mask]:
    """The vocabulary, and which tokens statements are about."""
    size = checkpoint.config.vocab_size
    if counts is not None and (counts.shape != (size,) or counts.dtype != torch.int64):
        raise ValueError(f"counts must be int64 of [{size}], got {counts.dtype} of {list(counts.shape)}")
    if checkpoint.tokenizer_fingerprint:
        vocabulary = Vocabulary.of(checkpoint.tokenizer(), vocab_size=size, counts=counts)
        rule = vocabulary.mask_rule
    else:
        vocabulary = _without_text(size, counts)
        rule = "none" if counts is None else "tokens that the counted text lacks"
    kept = int(vocabulary.mask.sum())
    if kept < 2:
        raise ValueError(
            f"{kept} of {size} tokens are left without {rule}: there is nothing to index; "
            "give counts of a longer text, or none"
        )
    return vocabulary, Mask(rule=rule, tokens=kept)


def _without_text(size: int, counts: Int64[Tensor, " V"] | None) -> Vocabulary:
    """Tokens of a checkpoint that has no tokenizer."""
    undertrained = torch.zeros(size, dtype=torch.bool) if counts is None else counts == 0
    return Vocabulary(
        text=("",) * size,
        raw=(b"",) * size,
        shown=tuple(f"T{token}" for token in range(size)),
        kind=("special",) * size,
        counts=counts,
        reachable=torch.ones(size, dtype=torch.bool),
        undertrained=undertrained,
        mask=~undertrained,
    )


def _contents(memory: TokenMemory, options: IndexOptions, *, kept_tokens: int) -> Contents:
    layers = memory.layers if options.layers is None else options.layers
    if not layers or len(set(layers)) != len(layers):
        raise ValueError(f"layers must be distinct and at least one, got {list(layers)}")
    for layer in layers:
        memory.cells(layer)  # raises for one that cannot be read
    clustered_in = (layers[0], layers[len(layers) // 2], layers[-1])
    if options.cluster_layers is not None:
        clustered_in = options.cluster_layers
    mapped_in = layers[:1] if options.map_layers is None else options.map_layers
    if absent := {*clustered_in, *mapped_in} - {*layers}:
        raise ValueError(f"layers {sorted(absent)} are to have clusters or maps but are not in the index")
    if options.clusters < 0:
        raise ValueError(f"the number of clusters must not be negative, got {options.clusters}")
    clusters = min(options.clusters, kept_tokens // TOKENS_PER_CLUSTER)
    return Contents(
        vocab_size=memory.vocab_size,
        num_keys=memory.num_keys,
        layers=tuple(layers),
        kept_tokens=kept_tokens,
        keep=options.keep,
        neighbors=options.neighbors,
        clusters=clusters,
        cluster_layers=tuple(dict.fromkeys(clustered_in)) if clusters else (),
        spaces=(*dict.fromkeys(f"layer{layer}" for layer in mapped_in), "embedding") if options.maps else (),
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Step:
    """A part of the work that is done as a whole or not at all."""

    name: str
    run: Callable[[], tuple[Placed, Any]]
    """Gives numbers for arrays, and facts (JSON) for the tables."""


def _list_steps(
    memory: TokenMemory, vocabulary: Vocabulary, contents: Contents, options: IndexOptions
) -> Iterator[_Step]:
    """Layers and nearest tokens."""

    def one_layer(place: int, layer: int) -> tuple[Placed, Any]:
        found = layer_arrays(
            memory, layer=layer, mask=vocabulary.mask, keep=contents.keep, working_bytes=options.working_bytes
        )
        placed = {name: ((slice(None), place) if name in PER_TOKEN else place, part) for name, part in found.items()}
        return placed, {"layer": layer, **layer_facts(found, mask=vocabulary.mask)}

    def neighbors(name: str, layer: int | None) -> tuple[Placed, Any]:
        count = min(contents.keep.neighbors, contents.kept_tokens - 1)
        found = nearest_arrays(
            memory, layer=layer, mask=vocabulary.mask, count=count, working_bytes=options.working_bytes
        )
        return {f"{name}_idx": (..., found.ids), f"{name}_val": (..., found.cosines)}, None

    for place, layer in enumerate(contents.layers):
        yield _Step(f"layer {layer}", lambda place=place, layer=layer: one_layer(place, layer))
    if contents.neighbors:
        yield _Step("neighbors", lambda: neighbors("neighbors", contents.layers[0]))
        yield _Step("embedding neighbors", lambda: neighbors("embedding_neighbors", None))


def _space_steps(
    memory: TokenMemory,
    vocabulary: Vocabulary,
    contents: Contents,
    options: IndexOptions,
    *,
    extremes: Float32[np.ndarray, "L K 2"],
) -> Iterator[_Step]:
    """Clusters and maps; `extremes` are there when layers are done."""
    token_ids = vocabulary.mask.nonzero()[:, 0]

    def points(layer: int) -> Tensor:
        edges = torch.from_numpy(np.array(extremes[contents.layers.index(layer)]))
        return layer_points(
            memory, layer=layer, token_ids=token_ids, extremes=edges, working_bytes=options.working_bytes
        )

    def clusters(place: int, layer: int) -> tuple[Placed, Any]:
        labels, facts = clustered(
            points(layer), token_ids=token_ids, kinds=vocabulary.kind, count=contents.clusters, seed=options.seed
        )
        return {"cluster_labels": (place, labels)}, facts

    def map_of(space: str) -> tuple[Placed, Any]:
        assert options.maps is not None
        embedding = space == "embedding"
        found = embedding_points(memory, token_ids=token_ids) if embedding else points(int(space[len("layer") :]))
        places = mapped(
            found, token_ids=token_ids, vocab_size=contents.vocab_size, method=options.maps, seed=options.seed
        )
        return {f"map_{space}": (..., places)}, None

    for place, layer in enumerate(contents.cluster_layers):
        yield _Step(f"clusters {layer}", lambda place=place, layer=layer: clusters(place, layer))
    for space in contents.spaces:
        yield _Step(f"map {space}", lambda space=space: map_of(space))


def _run(steps: Sequence[_Step], arrays: Mapping[str, np.memmap], progress: Progress) -> None:
    """Do the steps that are not done yet."""
    done = len(progress.lines)
    if 0 < done < len(steps):
        logger.info("going on at %s", steps[done].name)
    with tqdm(total=len(steps), initial=done, desc="indexing", unit="step", disable=None) as bar:
        for step in steps[done:]:
            bar.set_postfix_str(step.name)
            placed, facts = step.run()
            for name, (place, part) in placed.items():
                arrays[name][place] = as_stored(part, arrays[name].dtype)
                arrays[name].flush()
            line = json.loads(json.dumps({"step": step.name, "facts": facts}))
            progress.append(line)
            progress.lines.append(line)
            bar.update()


def as_stored(numbers: Shaped[Tensor, "*N"], dtype: np.dtype) -> Shaped[np.ndarray, "*N"]:
    """Numbers in an array's dtype; what is beyond the range of fp16 becomes its largest."""
    found = numbers.cpu().numpy()
    if dtype == np.float16:
        limit = float(np.finfo(np.float16).max)
        found = found.clip(-limit, limit)
    return found.astype(dtype)


def _open_arrays(folder: Path, specs: Mapping[str, ArraySpec], *, fresh: bool) -> dict[str, np.memmap]:
    """The arrays of an unfinished index, mapped; made at their full size, so that a full disk is found at once.

    Raises:
        OSError: there is no space.
        ValueError: a file is not as it was left.
    """
    arrays = {}
    for name, spec in specs.items():
        path = folder / f"{name}.npy"
        if fresh:
            np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(spec.dtype), shape=spec.shape)
            if sys.platform == "linux":  # others have no such call, and would find it out while writing
                with path.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, spec.file_bytes)
        if not path.is_file() or path.stat().st_size != spec.file_bytes:
            raise ValueError(f"{path} is not as it was left; remove {folder} and index again")
        arrays[name] = np.lib.format.open_memmap(path, mode="r+")
        if (arrays[name].shape, arrays[name].dtype) != (spec.shape, np.dtype(spec.dtype)):
            raise ValueError(f"{path} is not as it was left; remove {folder} and index again")
    return arrays


def _write_tables(
    folder: Path,
    facts: Mapping[str, Any],
    arrays: Mapping[str, np.memmap],
    contents: Contents,
    vocabulary: Vocabulary | None,
) -> None:
    """What is not an array; Parquet only of a `vocabulary`."""
    write_json(folder / LAYERS, {"layers": [facts[f"layer {layer}"] for layer in contents.layers]})
    write_json(folder / CLUSTERS, {str(layer): facts[f"clusters {layer}"] for layer in contents.cluster_layers})
    if vocabulary is not None:
        write_tokens(folder / TOKENS, vocabulary)
        write_keys(folder / KEYS, layers=contents.layers, stats=arrays["key_stats"])


def _sealed(folder: Path, manifest: Manifest, arrays: Mapping[str, np.memmap]) -> Manifest:
    """The manifest over the files of a folder."""
    entries = {
        name: {
            "shape": list(array.shape),
            "dtype": array.dtype.name,
            "sha256": sha256_file(folder / f"{name}.npy"),
        }
        for name, array in arrays.items()
    }
    others = [path for name in (LAYERS, CLUSTERS, TOKENS, KEYS) if (path := folder / name).is_file()]
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in others}
    return dataclasses.replace(manifest, arrays=entries, files=files)


def _sha256(numbers: Tensor) -> str:
    return hashlib.sha256(numbers.contiguous().numpy().data).hexdigest()
