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

    def shards(path: str, total: int, make: Callable[[range], list[Any]]) -> Iterator[tuple[str, Callable[[], bytes]]]:
        for number, start in enumerate(range(0, total, SHARD)):
            places = range(start, min(start + SHARD, total))
            yield f"{path}/{number}.json", lambda places=places: to_json(make(places))

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
    yield from shards("token", index.vocab_size, lambda ids: [records.token(token) for token in ids])
    yield from shards("row", index.vocab_size, live.row_records)
    for layer in index.layers:
        cells = index.num_keys
        yield from shards(f"key/{layer}", cells, lambda keys, layer=layer: [records.key(layer, key) for key in keys])
        yield from shards(
            f"similar/{layer}", cells, lambda keys, layer=layer: [live.similar_keys(layer, key) for key in keys]
        )
