"""Load a server: many clients at once, times of first tokens and requests, what was lost, and the server's memory.

    python benchmarks/serve.py models/mini-memory --clients 64 --requests 20 --out benchmarks/results/serve.json

Starts `flexmemory serve` with rows on disk. Each client asks one streamed completion after the other, with prompts and
lengths of its own; one in twenty goes away after its first token. Clients and server share the machine. The table of
docs/serving.md is written from the results.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np

from flexmemory.model.checkpoint import Checkpoint
from flexmemory.provenance import provenance
from flexmemory.storage import write_json
from flexmemory.tol.build import build_store

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "serving.md"
ABANDONED = 0.05
"""Share of requests whose client goes away."""


@dataclasses.dataclass
class Load:
    """What the clients saw."""

    first_token_s: list[float] = dataclasses.field(default_factory=list)
    request_s: list[float] = dataclasses.field(default_factory=list)
    tokens: int = 0
    sent: int = 0
    completed: int = 0
    abandoned: int = 0
    errors: list[str] = dataclasses.field(default_factory=list)


async def ask(client: httpx.AsyncClient, load: Load, rng: random.Random, *, name: str, text: str) -> None:
    """One request."""
    start, leaves = rng.randrange(len(text) - 1000), rng.random() < ABANDONED
    body = {
        "model": name,
        "prompt": text[start : start + rng.randrange(20, 600)],
        "max_tokens": rng.randrange(16, 129),
        "temperature": rng.choice([0.0, 0.8]),
        "seed": rng.randrange(2**40),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began, first, usage, done = time.perf_counter(), None, None, False
    load.sent += 1
    try:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                load.errors.append(f"{answer.status_code}: {(await answer.aread()).decode()[:200]}")
                return
            async for line in answer.aiter_lines():
                if not line:
                    continue
                content = line.removeprefix("data: ")
                if content == "[DONE]":
                    done = True
                    break
                event = json.loads(content)
                if "error" in event:
                    load.errors.append(content[:200])
                    return
                usage = event.get("usage") or usage
                if first is None:
                    first = time.perf_counter() - began
                    if leaves:
                        load.abandoned += 1
                        return
    except httpx.HTTPError as error:
        load.errors.append(repr(error))
        return
    if not done or usage is None or first is None:
        load.errors.append("an answer that was not complete")
        return
    load.completed += 1
    load.tokens += usage["completion_tokens"]
    load.first_token_s.append(first)
    load.request_s.append(time.perf_counter() - began)


async def run_clients(url: str, *, clients: int, requests: int, name: str, text: str, seed: int) -> Load:
    """All clients, each its requests one after the other."""
    load = Load()
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def one(number: int) -> None:
            rng = random.Random(seed * 10_000 + number)
            for _ in range(requests):
                await ask(client, load, rng, name=name, text=text)

        await asyncio.gather(*(one(number) for number in range(clients)))
    return load


def resident_bytes(process: int) -> int:
    """Memory of a process that is in RAM and its own, not mapped from files."""
    fields = Path(f"/proc/{process}/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", fields)
    assert found is not None
    return int(found[1]) * 1024


def start_server(
    checkpoint: Path, store: Path, *, device: str, sequences: int, log: Path
) -> tuple[subprocess.Popen, str]:
    """The process and its address."""
    command = [sys.executable, "-m", "flexmemory", "serve", str(checkpoint), "--tol", str(store), "--rows", "disk"]
    command += ["--device", device, "--port", "0", "--max-sequences", str(sequences), "--queue", "256"]
    process = subprocess.Popen(command, stderr=log.open("w"))
    while process.poll() is None:
        if found := re.search(r"served at (http://\S+)/v1 ", log.read_text()):
            return process, found[1]
        time.sleep(0.1)
    raise RuntimeError(log.read_text())


def milliseconds(seconds: list[float]) -> dict[str, float]:
    return {f"p{q}": round(float(np.percentile(seconds, q)) * 1e3, 1) for q in (50, 90, 99)}


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """Start, load and stop a server."""
    store = folder / "tol"
    build_store(Checkpoint.open(args.checkpoint), store, codec="bf16")
    lines = [line for path in sorted((ROOT / "docs").glob("*.md")) for line in path.read_text().splitlines()]
    text = "\n".join(line for line in lines if not line.startswith("|"))  # a table's tokens are short
    log = folder / "log"
    process, url = start_server(args.checkpoint, store, device=args.device, sequences=args.sequences, log=log)
    memory, rounds = [], []
    try:
        for number in range(args.rounds):
            began = time.perf_counter()
            load = asyncio.run(
                run_clients(
                    url,
                    clients=args.clients,
                    requests=args.requests,
                    name=args.checkpoint.resolve().name,
                    text=text,
                    seed=number,
                )
            )
            seconds = time.perf_counter() - began
            memory.append(resident_bytes(process.pid))
            rounds.append((load, seconds))
            print(f"round {number}: {load.tokens / seconds:,.0f} tokens/s, {memory[-1] / 1e6:.1f} MB", file=sys.stderr)
        health = httpx.get(f"{url}/metrics").text
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=60)
    finally:
        process.kill()
        process.wait()
    measured = rounds[1:]  # the first warms up
    loads = [load for load, _ in measured]
    return {
        "device": args.device,
        "clients": args.clients,
        "sequences": args.sequences,
        "requests": sum(load.sent for load in loads),
        "completed": sum(load.completed for load in loads),
        "abandoned": sum(load.abandoned for load in loads),
        "errors": [error for load in loads for error in load.errors],
        "tokens": sum(load.tokens for load in loads),
        "tokens_per_s": round(sum(load.tokens for load in loads) / sum(seconds for _, seconds in measured), 1),
        "first_token_ms": milliseconds([s for load in loads for s in load.first_token_s]),
        "request_ms": milliseconds([s for load in loads for s in load.request_s]),
        "anonymous_bytes_after_rounds": memory,
        "left_running": re.findall(r"^flexmemory_(running|waiting)_sequences (\S+)$", health, flags=re.MULTILINE),
        "exit_code": code,
        "load_average_before": args.load_average,
        "provenance": provenance(),
    }


def table(results: dict) -> str:
    """The results as Markdown."""
    first, whole, memory = results["first_token_ms"], results["request_ms"], results["anonymous_bytes_after_rounds"]
    where = results["provenance"]
    lost = results["requests"] - results["completed"] - results["abandoned"]
    return "\n".join(
        [
            "| | p50 | p90 | p99 |",
            "|---|---:|---:|---:|",
            f"| first token, ms | {first['p50']:,.0f} | {first['p90']:,.0f} | {first['p99']:,.0f} |",
            f"| whole request, ms | {whole['p50']:,.0f} | {whole['p90']:,.0f} | {whole['p99']:,.0f} |",
            "",
            f"{results['clients']} clients at once, {results['sequences']} slots, {results['requests']:,} requests: "
            f"{results['completed']:,} completed, {results['abandoned']} left by their clients, {lost} lost; "
            f"{results['tokens_per_s']:,.0f} new tokens/s. Memory of the server after each round: "
            f"{', '.join(f'{each / 1e6:.0f}' for each in memory)} MB.",
            "",
            f"{where['cpu']}, shared with the clients; torch {where['torch']}, Python {where['python']}, "
            f"commit {where['commit']}.",
        ]
    )


def render(text: str, results: dict) -> str:
    """`text` with its table made anew."""
    pattern = r"(<!-- load: [^\n]*-->\n).*?(<!-- /load -->)"
    text, count = re.subn(pattern, lambda m: f"{m[1]}{table(results)}\n{m[2]}", text, flags=re.DOTALL)
    assert count == 1
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--requests", type=int, default=8, help="of each client in a round")
    parser.add_argument("--rounds", type=int, default=5, help="the first warms up")
    parser.add_argument("--out", type=Path, help="without it, results are printed only")
    args = parser.parse_args()
    args.load_average = round(os.getloadavg()[0], 2)
    with tempfile.TemporaryDirectory() as folder:
        results = measure(args, Path(folder))
    print(json.dumps(results, indent=2))
    if args.out:
        write_json(args.out, results)
        GUIDE.write_text(render(GUIDE.read_text(), results))


if __name__ == "__main__":
    main()
