"""How long the explorer's answers take: milliseconds of each endpoint over HTTP, p50 and p95, as JSON.

    python benchmarks/explorer.py --shape 1b --folder FOLDER --out explorer-1b.json
    python benchmarks/explorer.py --shape 1b --folder FOLDER --model --out explorer-1b-model.json
    python benchmarks/explorer.py --checkpoint models/mini-memory --index INDEX --out explorer-mini.json

The first makes an index of random numbers of the 1b shape in FOLDER (about 0.4 GB, kept) and asks what reads the index;
a lookup does not depend on the numbers. The second makes a model of random weights too (3 GB, and 8 GB of memory), for
which that index passes, and asks a few times each what computes with the model in less than minutes (`--tokenizer`: one
of 128,256 tokens); `--serve` serves it to a browser instead. The third does both for a model that exists. Server and
client share this machine and one process; ids are drawn at random; the first request of each endpoint, which may map or
make something, stands apart as `first_ms`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import torch
import uvicorn

from flexmemory.config import to_dict
from flexmemory.interpret.index_format import NO_CLUSTER, Contents, Keep, Manifest, Mask, array_specs
from flexmemory.interpret.reader import MemoryIndex
from flexmemory.interpret.tables import write_tokens
from flexmemory.interpret.vocabulary import KINDS, Vocabulary
from flexmemory.model.checkpoint import Checkpoint, save_checkpoint
from flexmemory.model.init import new_model
from flexmemory.presets import PRESETS, get_preset
from flexmemory.provenance import provenance
from flexmemory.serve.explorer import create_app, settle
from flexmemory.serve.live import LiveModel
from flexmemory.serve.records import Records
from flexmemory.storage import atomic_folder, write_json
from flexmemory.tokenizer import Tokenizer

CLUSTERS = 200
MINUTES = ("W_down", "W_down of all layers", "suppressed")
"""What a model of the 1b shape does not answer on a CPU in less when it is first asked."""
TEXT = "The city of London is the capital of"


def synthetic_index(folder: Path, shape: str, checkpoint: Checkpoint | None) -> None:
    """An index of random numbers, which says that it is of `checkpoint`."""
    config = get_preset(f"{shape}-memory").model
    vocab, layers = config.vocab_size, tuple(range(config.num_layers))
    chosen = (0, config.num_layers // 2, config.num_layers - 1)
    contents = Contents(
        vocab_size=vocab,
        num_keys=config.intermediate_size,
        layers=layers,
        kept_tokens=vocab,
        keep=Keep(),
        neighbors=True,
        clusters=CLUSTERS,
        cluster_layers=chosen,
        spaces=tuple(f"layer{layer}" for layer in chosen),
    )
    generator = np.random.default_rng(0)
    with atomic_folder(folder) as out:
        specs = array_specs(contents)
        for name, spec in specs.items():
            high = {"token_keys_idx": config.intermediate_size, "cluster_labels": CLUSTERS}.get(name, vocab)
            if spec.dtype == "uint16" and name.startswith("map_"):
                high = NO_CLUSTER
            if spec.dtype.startswith("float"):
                array = generator.standard_normal(spec.shape, dtype=np.float32).astype(spec.dtype)
                array = np.abs(array) if name == "row_norms" else array
            else:
                array = generator.integers(0, high, spec.shape).astype(spec.dtype)
            np.save(out / f"{name}.npy", array)
        clusters = {
            str(layer): [
                {"size": vocab // CLUSTERS, "cohesion": 0.5, "medoids": list(range(8)), "kinds": []}
                for _ in range(CLUSTERS)
            ]
            for layer in chosen
        }
        write_json(out / "clusters.json", clusters)
        write_json(out / "layers.json", {"layers": [{"layer": layer} for layer in layers]})
        vocabulary = (
            Vocabulary.of(checkpoint.tokenizer(), vocab_size=vocab) if checkpoint else synthetic_vocabulary(vocab)
        )
        write_tokens(out / "tokens.parquet", vocabulary)
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": ""} for path in out.iterdir() if path.suffix != ".npy"
        }
        manifest = Manifest(
            checkpoint_fingerprint=checkpoint.fingerprint if checkpoint else "",
            tokenizer_fingerprint=checkpoint.tokenizer_fingerprint if checkpoint else "",
            config=to_dict(config),
            scope="random numbers",
            layers=layers,
            cluster_layers=chosen,
            counts=None,
            mask=Mask(rule="none", tokens=vocab),
            keep=Keep(),
            seeds={},
            arrays={name: {**dataclasses.asdict(spec), "sha256": ""} for name, spec in specs.items()},
            files=files,
            flexmemory="",
        )
        write_json(out / "manifest.json", manifest.to_json())


def synthetic_vocabulary(vocab: int) -> Vocabulary:
    """Tokens called by their numbers."""
    text = tuple(f" token{token}" for token in range(vocab))
    everything = torch.ones(vocab, dtype=torch.bool)
    return Vocabulary(
        text=text,
        raw=tuple(each.encode() for each in text),
        shown=tuple(each.replace(" ", "\N{OPEN BOX}") for each in text),
        kind=tuple(KINDS[token % len(KINDS)] for token in range(vocab)),
        counts=None,
        reachable=everything,
        undertrained=~everything,
        mask=everything,
    )


def random_checkpoint(folder: Path, shape: str, tokenizer: Tokenizer) -> Checkpoint:
    """A model of random weights in bf16: to be asked, or to stand beside an index that is."""
    if not folder.exists():
        with atomic_folder(folder) as out:
            model = new_model(PRESETS[f"{shape}-memory"].model, seed=0).to(torch.bfloat16)
            save_checkpoint(out, model, tokenizer)
    return Checkpoint.open(folder)


@contextlib.contextmanager
def serving(records: Records, live: LiveModel, checkpoint: Checkpoint) -> Iterator[str]:
    """The address of a server."""
    app = create_app(records, live, checkpoint=checkpoint, name="benchmark")
    settle()
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            thread.join(0.05)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def measured(ask: Callable[[], httpx.Response], *, requests: int) -> dict[str, float]:
    """Milliseconds of requests, and bytes of an answer."""
    times, size = [], 0
    for _ in range(requests + 1):
        start = time.perf_counter()
        response = ask()
        times.append((time.perf_counter() - start) * 1e3)
        response.raise_for_status()
        size = max(size, len(response.content))
    p50, p95, worst = np.percentile(times[1:], (50, 95, 100)).tolist()
    return {"requests": requests, "first_ms": times[0], "p50_ms": p50, "p95_ms": p95, "max_ms": worst, "bytes": size}


def endpoints(
    records: Records, client: httpx.Client, *, live: LiveModel | None
) -> dict[str, Callable[[], httpx.Response]]:
    """What is asked, by name."""
    index, draw = records.index, np.random.default_rng(1).integers

    def layer() -> int:
        return index.layers[draw(len(index.layers))]

    asked: dict[str, Callable[[], httpx.Response]] = {
        "page": lambda: client.get("/"),
        "meta": lambda: client.get("/api/meta.json"),
        "tokens": lambda: client.get("/api/tokens.json"),
        "layers": lambda: client.get("/api/layers.json"),
        "clusters": lambda: client.get("/api/clusters.json"),
        "token": lambda: client.get(f"/api/token/{draw(index.vocab_size)}"),
        "key": lambda: client.get(f"/api/key/{layer()}/{draw(index.num_keys)}"),
        "norms of a layer": lambda: client.get(f"/api/norms/{layer()}.bin"),
        "keys of a layer": lambda: client.get(f"/api/keys/{layer()}.bin"),
        "state": lambda: client.get("/api/state"),
    }
    if index.spaces:
        asked["map"] = lambda: client.get(f"/api/map/{index.spaces[draw(len(index.spaces))]}.bin")
    clustered = index.manifest.cluster_layers
    if clustered:
        asked["labels of a layer"] = lambda: client.get(f"/api/labels/{clustered[draw(len(clustered))]}.bin")
    if live is not None:
        depth = live.model.config.num_layers
        steps = {
            "row": lambda token: steered("steer_row", token, layer()),
            "rows of all layers": lambda token: steered("steer_row", token, -1),
            "value": lambda token: {"op": "scale_value", "layer": layer(), "key": token % index.num_keys, "factor": 0},
            "through W_down": lambda token: steered("rank_one", token, layer()),
            "through W_down of all layers": lambda token: steered("rank_one", token, -1),
            "tokens suppressed": lambda _: {"op": "suppress", "tokens": [300, 301]},
        }
        asked["model: rows of a token"] = lambda: client.get(f"/api/row/{draw(index.vocab_size)}")
        asked["model: similar keys"] = lambda: client.get(f"/api/similar/{layer()}/{draw(index.num_keys)}")
        asked["model: prompt"] = lambda: client.post(
            "/api/prompt", json={"text": TEXT, "alphas": [float(draw(2))] * depth}
        )
        for name, step in steps.items():
            asked[f"model: preview of an edit, {name}"] = lambda step=step: client.post(
                "/api/edit/preview", json={"steps": [step(int(draw(index.vocab_size)))], "text": TEXT}
            )
        asked["model: 24 tokens, before and after"] = lambda: client.post(
            "/api/edit/continued", json={"steps": [steps["row"](int(draw(index.vocab_size)))], "text": TEXT}
        )
    return asked


def steered(op: str, token: int, layer: int) -> dict:
    """The step that steers a token toward token 301."""
    return {"op": op, "token": token, "other": 301, "layer": layer, "strength": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["250m", "750m", "1b"])
    parser.add_argument("--folder", type=Path, help="where a synthetic index is made")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--index", type=Path)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--model", action="store_true", help="make a model of the shape, and ask it")
    parser.add_argument("--device", default="cpu", help="of the model")
    parser.add_argument("--tokenizer", type=Path, help="of that model: a tokenizer.json of as many tokens")
    parser.add_argument("--serve", action="store_true", help="serve until interrupted, and measure nothing")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(2 if args.model else 1)
    if args.model:
        checkpoint = random_checkpoint(args.folder / f"model-{args.shape}", args.shape, Tokenizer.load(args.tokenizer))
        folder = args.folder / f"index-{args.shape}-model"
    elif args.shape:
        checkpoint = random_checkpoint(args.folder / "small", "nano", Tokenizer.train(["a"], vocab_size=300))
        folder = args.folder / f"index-{args.shape}"
    else:
        checkpoint, folder = Checkpoint.open(args.checkpoint), args.index
    if args.shape and not folder.exists():
        synthetic_index(folder, args.shape, checkpoint if args.model else None)
    own = args.model or not args.shape
    records = Records(MemoryIndex.open(folder, checkpoint=checkpoint if own else None))
    live = LiveModel(checkpoint, records, device=args.device, dtype=torch.float32)
    found, load = {}, os.getloadavg()[0]
    with serving(records, live, checkpoint) as address, httpx.Client(base_url=address, timeout=3600) as client:
        if args.serve:
            print(address, flush=True)
            threading.Event().wait()
        for name, ask in endpoints(records, client, live=live if own else None).items():
            if args.model and args.device == "cpu" and name.endswith(MINUTES):
                continue
            found[name] = measured(ask, requests=3 if args.model and name.startswith("model") else args.requests)
            print(name, {key: round(number, 1) for key, number in found[name].items()}, flush=True)
    index = records.index
    result = {
        "vocab_size": index.vocab_size,
        "layers": len(index.layers),
        "keys": index.num_keys,
        "index_bytes": index.nbytes,
        "device": args.device,
        "endpoints": found,
        "load_average": load,
        "threads": torch.get_num_threads(),
        **provenance(),
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
