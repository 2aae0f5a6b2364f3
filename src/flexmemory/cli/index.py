"""`flexmemory index CHECKPOINT --out DIR`: the memory's keys, values and tokens, looked up both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from flexmemory.cli.tol import counts_of
from flexmemory.device import resolve_device
from flexmemory.interpret.index import IndexOptions, build_index
from flexmemory.interpret.index_format import Keep
from flexmemory.interpret.index_spaces import MapMethod
from flexmemory.interpret.reader import MemoryIndex
from flexmemory.model.checkpoint import Checkpoint


def index(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    out: Path,
    counts: Path | None = None,
    layers: tuple[int, ...] | None = None,
    neighbors: tyro.conf.FlagCreatePairsOff[bool] = True,
    clusters: int = 100,
    map: tyro.conf.FlagCreatePairsOff[bool] = True,
    map_by: MapMethod = "tsne",
    cluster_layers: tuple[int, ...] | None = None,
    map_layers: tuple[int, ...] | None = None,
    keep: Keep = Keep(),  # noqa: B008 - frozen
    device: str = "auto",
) -> None:
    """Compute, for all tokens, which cells each uses and which use it; run again, it goes on where it was interrupted.

    Args:
        checkpoint: A checkpoint or run folder.
        out: The folder to make (docs/index-format.md).
        counts: A folder that `flexmemory prepare` wrote with the model's tokenizer: tokens that its training split
            lacks are left out of statements about tokens.
        layers: Layers to index; by default all. Of a dense model only layer 0 can be.
        neighbors: Find the nearest tokens of every token.
        clusters: Clusters of the tokens of a layer by the cells they use, at most one for every 8 tokens; 0 for none.
        map: Draw maps of tokens by the cells they use, and by their embeddings.
        map_by: How: tsne, which takes minutes on a CPU for large vocabularies, or pca, which is quick.
        cluster_layers: Layers whose tokens are clustered; by default the first, middle and last.
        map_layers: Layers with a map, beside the one of embeddings; by default the first.
        keep: How long lists are.
        device: Where it is computed: cpu, cuda, cuda:1 ..., or auto: the GPU where there is one.
    """
    opened = Checkpoint.open(checkpoint)
    made = build_index(
        opened,
        out,
        counts=None if counts is None else counts_of(counts, opened),
        counts_source="" if counts is None else str(counts),
        options=IndexOptions(
            layers=layers,
            keep=keep,
            neighbors=neighbors,
            clusters=clusters,
            maps=map_by if map else None,
            cluster_layers=cluster_layers,
            map_layers=map_layers,
        ),
        device=resolve_device(device),
    )
    print(describe(made))


def describe(made: MemoryIndex) -> str:
    """What an index holds, for people."""
    manifest = made.manifest
    entries = {
        "layers": f"{len(made.layers)}: {' '.join(map(str, made.layers))}",
        "shape": f"V {made.vocab_size:,}, K {made.num_keys:,}",
        "clusters": f"in layers {' '.join(map(str, manifest.cluster_layers))}" if manifest.cluster_layers else "none",
        "maps": " ".join(made.spaces) or "none",
        "size": f"{made.nbytes / 1e6:,.1f} MB",
        "exact over": f"{manifest.mask.tokens:,} tokens; left out: {manifest.mask.rule}",
        "holds for": manifest.scope,
        "counts": "none" if manifest.counts is None else f"of {manifest.counts.total:,} tokens",
        "checkpoint": manifest.checkpoint_fingerprint[:12],
        "tokenizer": manifest.tokenizer_fingerprint[:12] or "none",
    }
    return "\n".join([str(made.path), *(f"  {name:<12}{value}" for name, value in entries.items())])


def main(argv: list[str]) -> int:
    """Entry point of the verb."""
    tyro.cli(index, args=argv, prog="flexmemory index")
    return 0
