"""The pages of a small model as a folder for any web server: the same page, records in shards of JSON.

What needs the model as one types is not in it (Prompt, Edit, Diff); rows on the vocabulary are.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flexmemory.config import ModelConfig
from flexmemory.serve.live import LiveModel
from flexmemory.serve.records import Records, to_json
from flexmemory.storage import atomic_folder

STATIC = Path(__file__).parent / "static"
SHARD = 64
"""Records of a file."""
LIMITS = {"vocab_size": 32_768, "num_layers": 12, "intermediate_size": 2048}


def check_size(config: ModelConfig) -> None:
    """Refuse models whose export would be a folder of gigabytes.

    Raises:
        ValueError: the model is larger than `LIMITS`.
    """
    for field, most in LIMITS.items():
        if getattr(config, field) > most:
            raise ValueError(
                f"an export is for small models: {field} is {getattr(config, field)}, at most {most} is taken; "
                "serve this one with `flexmemory explore`"
            )


def write_export(records: Records, live: LiveModel, out: Path, *, name: str) -> int:
    """Write the new folder `out`, and give the number of its files.

    Raises:
        FileExistsError: `out` exists.
    """
    with atomic_folder(out) as folder:
        shutil.copytree(STATIC, folder, dirs_exist_ok=True)
        for path, content in tqdm(list(files(records, live, name=name)), desc="exporting", unit="file", disable=None):
            target = folder / "api" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content())
        return sum(path.is_file() for path in folder.rglob("*"))


def files(records: Records, live: LiveModel, *, name: str) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Paths under api/ and what makes their content."""
    index = records.index

    def document(make: Callable[[], Any]) -> Callable[[], bytes]:
        return lambda: to_json(make())

    def shard(make: Callable[[int], Any], start: int, total: int) -> Callable[[], bytes]:
        return lambda: to_json([make(place) for place in range(start, min(start + SHARD, total))])

    yield "meta.json", document(lambda: records.meta() | live.meta() | {"name": name, "live": False, "shard": SHARD})
    yield "tokens.json", document(records.tokens)
    yield "layers.json", document(records.layers)
    yield "clusters.json", document(records.clusters)
    arrays = [
        ("map", index.spaces),
        ("labels", index.manifest.cluster_layers),
        ("norms", index.layers),
        ("keys", index.layers),
    ]
    for kind, names in arrays:
        for each in names:
            yield f"{kind}/{each}.bin", lambda kind=kind, each=each: records.binary(kind, str(each))
    for number, start in enumerate(range(0, index.vocab_size, SHARD)):
        yield f"token/{number}.json", shard(records.token, start, index.vocab_size)
        yield f"row/{number}.json", shard(live.row_record, start, index.vocab_size)
    for layer in index.layers:
        for number, start in enumerate(range(0, index.num_keys, SHARD)):
            yield (
                f"key/{layer}/{number}.json",
                shard(lambda key, layer=layer: records.key(layer, key), start, index.num_keys),
            )
            yield (
                f"similar/{layer}/{number}.json",
                shard(lambda key, layer=layer: live.similar_keys(layer, key), start, index.num_keys),
            )
