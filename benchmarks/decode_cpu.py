"""Decoding on a CPU, a MemoryLLM beside its dense base: time, bytes and resident memory, as JSON.

    python benchmarks/decode_cpu.py --folder FOLDER --out benchmarks/results/decode_cpu.json

Each model runs in a fresh process, one after the other in turns, so that its memory is its own. Weights and rows are
random, written to FOLDER as checkpoints and a store. The tokens to decode are given: drawn by Zipf's law, small ids the
most frequent, as vocabularies are ordered about. Weights are mapped from a warm page cache: memory is measured, not the
disk. What other processes take of the CPUs meanwhile is recorded; where that cannot be avoided, compare the CPU time of
one thread (`--threads 1`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

started = time.perf_counter()

import torch  # noqa: E402 - importing it, and what imports it, is timed

from flexmemory.config import ModelConfig  # noqa: E402 - as said
from flexmemory.engine.loading import load_model  # noqa: E402 - as said
from flexmemory.model.accounting import kv_cache_bytes  # noqa: E402 - as said
from flexmemory.model.checkpoint import Checkpoint, save_checkpoint  # noqa: E402 - as said
from flexmemory.model.kv_cache import KVCache  # noqa: E402 - as said
from flexmemory.model.transformer import Transformer  # noqa: E402 - as said
from flexmemory.presets import get_preset  # noqa: E402 - as said
from flexmemory.provenance import provenance  # noqa: E402 - as said
from flexmemory.storage import atomic_folder, write_json  # noqa: E402 - as said
from flexmemory.tol.format import MANIFEST, shard_header  # noqa: E402 - as said
from flexmemory.tol.layout import layout  # noqa: E402 - as said

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOKENS = 64
CONTEXTS = (128, 1024)
"""Tokens in the KV cache, half way through the measured ones."""
RUNS = [
    {"model": model, "dtype": dtype, "int8": int8, "rows": rows}
    for dtype, int8 in (("fp32", None), ("bf16", None), ("fp32", "head"), ("fp32", "all"))
    for model, rows in (("base", None), ("memory", "disk"))
] + [
    {"model": "memory", "dtype": "fp32", "int8": None, "rows": rows} for rows in ("host", "compute")
]  # fmt: skip


def write_checkpoint(folder: Path, preset: str, dtype: torch.dtype) -> Checkpoint:
    """A checkpoint with random weights."""
    with torch.device("meta"):
        model = Transformer(get_preset(preset).model).to(dtype)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(0, 0.02)
    with atomic_folder(folder) as partial:
        save_checkpoint(partial, model, None)
    return Checkpoint.open(folder)


def write_store(folder: Path, checkpoint: Checkpoint) -> None:
    """A bf16 store of random rows that carry the embedding, the same rows in every block."""
    manifest = layout(checkpoint.config, embedding=True)
    folder.mkdir()
    block = (0.02 * torch.randn(manifest.block_rows * manifest.stride_bytes // 2)).bfloat16().view(torch.uint8).numpy()
    digests: dict[int, str] = {}
    checksums = []
    for shard in manifest.shards:
        with (folder / shard.file).open("wb") as file:
            file.write(shard_header(manifest, shard))
            for first in range(0, shard.tokens, manifest.block_rows):
                size = min(manifest.block_rows, shard.tokens - first) * manifest.stride_bytes
                file.write(block[:size].data)
                if size not in digests:
                    digests[size] = hashlib.sha256(block[:size].data).hexdigest()
                checksums.append(digests[size])
    sign_store(folder, checkpoint, manifest.with_blocks(checksums).to_json())


def sign_store(folder: Path, checkpoint: Checkpoint, values: dict) -> None:
    """Say that the store is of `checkpoint`."""
    write_json(folder / MANIFEST, {**values, "checkpoint_fingerprint": checkpoint.fingerprint})


def prepare(folder: Path) -> None:
    """Checkpoints of both models in both dtypes, and a store for each of the memory models' (the same files)."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, dtype in DTYPES.items():
        for model in ("base", "memory"):
            checkpoint = write_checkpoint(folder / f"{model}-{name}", f"250m-{model}", dtype)
        store = folder / f"store-{name}"
        if name == "fp32":
            write_store(store, checkpoint)
        else:
            store.mkdir()
            for shard in (folder / "store-fp32").glob("*.safetensors"):
                os.link(shard, store / shard.name)
            sign_store(store, checkpoint, json.loads((folder / "store-fp32" / MANIFEST).read_text()))


def memory() -> dict[str, int]:
    """Bytes resident now, of them anonymous and file-backed, and the most that were ever resident."""
    rollup: dict[str, int] = {}
    status: dict[str, int] = {}
    for values, path in ((rollup, "/proc/self/smaps_rollup"), (status, "/proc/self/status")):
        for line in Path(path).read_text().splitlines():
            if line.endswith("kB"):
                values[line.split(":")[0]] = 1024 * int(line.split()[1])
    rss, anonymous = rollup["Rss"], rollup["Anonymous"]
    return {"resident": rss, "anonymous": anonymous, "file_backed": rss - anonymous, "peak": status["VmHWM"]}


def busy_s() -> float:
    """CPU seconds that this machine has worked so far, all processes together."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def wait_for_quiet(seconds: float) -> None:
    """Wait until two seconds pass in which the CPUs are idle, but for 5 % of one; `seconds` at most."""
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        before = busy_s()
        time.sleep(2)
        if busy_s() - before < 0.1:
            return


def draw_ids(config: ModelConfig, count: int, generator: torch.Generator) -> torch.Tensor:
    """Token ids by Zipf's law, (1, count)."""
    weights = 1 / (torch.arange(config.vocab_size, dtype=torch.float64) + 2.7)
    return torch.multinomial(weights, count, replacement=True, generator=generator)[None]


def measure(folder: Path, run: dict) -> dict:
    """What one model takes, in this process."""
    torch.set_num_threads(run["threads"])
    figures: dict = {**run, "import_s": time.perf_counter() - started, "memory_imported": memory()}
    checkpoint = Checkpoint.open(folder / f"{run['model']}-{run['dtype']}")
    tol = folder / f"store-{run['dtype']}" if run["rows"] in ("disk", "host") else None
    begin = time.perf_counter()
    loaded = load_model(checkpoint, tol=tol, rows=run["rows"] if tol else None, int8=run["int8"])
    figures |= {"open_s": time.perf_counter() - begin, "memory_opened": memory()}
    model = loaded.model
    read = [*model.blocks.parameters(), *model.blocks.buffers(), *model.head.parameters(), *model.head.buffers()]
    weights = sum(tensor.nbytes for tensor in read)
    if run["rows"] == "compute":
        weights = sum(tensor.nbytes for tensor in model.parameters()) - model.embed(torch.arange(0)).nbytes
    generator = torch.Generator().manual_seed(0)
    for context in CONTEXTS:
        prompt = context - TOKENS // 2
        token_ids = draw_ids(model.config, prompt + TOKENS, generator)
        cache = KVCache(model.config, batch_size=1, capacity=prompt + TOKENS, dtype=model.dtype)
        seconds, cpu_seconds = [], []
        others = busy_s() - time.process_time()
        whole = time.perf_counter()
        for ids in token_ids.split([prompt, *[1] * TOKENS], dim=1):
            begin, cpu_begin = time.perf_counter(), time.process_time()
            with torch.inference_mode():
                rows = loaded.row_source(ids) if loaded.row_source else None
                model.head(model.hidden_states(ids, rows, cache)[:, -1]).argmax(dim=-1).item()
            seconds.append(time.perf_counter() - begin)
            cpu_seconds.append(time.process_time() - cpu_begin)
        row = 2 * 25 * model.config.hidden_size if tol else 0
        kv = kv_cache_bytes(model.config, context=context, bytes_per_number=model.dtype.itemsize)
        figures[f"context_{context}"] = {
            "prompt_s": seconds[0],
            "ms_per_token": 1e3 * statistics.median(seconds[1:]),
            "fastest_ms": 1e3 * min(seconds[1:]),
            "cpu_ms_per_token": 1e3 * statistics.median(cpu_seconds[1:]),
            "cpus_of_others": (busy_s() - time.process_time() - others) / (time.perf_counter() - whole),
            "bytes_per_token": weights + kv + row,
            "memory": memory(),
        }
        if context == CONTEXTS[0]:
            figures["first_token_s"] = figures["import_s"] + figures["open_s"] + seconds[0]
    return figures


def read_rate(threads: int) -> float:
    """Bytes a second that threads read from memory: the sum of a large tensor, the best of several."""
    torch.set_num_threads(threads)
    numbers = torch.ones(2**27)
    seconds = []
    for _ in range(10):
        begin = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - begin)
    return numbers.nbytes / min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="scratch space: 13 GB")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--wait", type=float, default=0, help="seconds to wait for idle CPUs before each run, at most")
    parser.add_argument("--keep", action="store_true", help="use and leave what is in the folder")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.folder, json.loads(args.child))))
        return
    if not (args.keep and args.folder.exists()):
        prepare(args.folder)
    results: dict = {
        "load_average_before": os.getloadavg(),
        "threads": args.threads,
        "read_bytes_s": read_rate(args.threads),
        "entries": [],
    }
    for _ in range(args.rounds):
        for run in RUNS:
            command = [sys.executable, __file__, "--folder", str(args.folder), "--child"]
            command += [json.dumps({**run, "threads": args.threads})]
            wait_for_quiet(args.wait)
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results["entries"].append(json.loads(output.splitlines()[-1]))
            entry = results["entries"][-1]
            print(
                f"{entry['model']:7} {entry['dtype']} int8 {entry['int8']!s:5} rows {entry['rows']!s:8}",
                " ".join(f"{entry[f'context_{c}']['ms_per_token']:8.2f} ms" for c in CONTEXTS),
                " ".join(f"{entry[f'context_{c}']['cpu_ms_per_token']:8.2f} ms of CPU" for c in CONTEXTS),
                f"{entry[f'context_{CONTEXTS[-1]}']['memory']['resident'] / 1e6:8.0f} MB resident",
                f"{entry['open_s']:6.2f} s to open, others {entry['context_128']['cpus_of_others']:.2f} CPUs",
                file=sys.stderr,
            )
    results |= {"load_average_after": os.getloadavg(), "provenance": provenance()}
    if args.out:
        args.out.write_text(json.dumps(results, indent=2) + "\n")
    if not args.keep:
        shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
