"""Where a step's time goes with rows of different codecs: steps in turns, and kernels by the profiler, as JSON.

    python benchmarks/decode_profile.py --out benchmarks/results/decode_profile.json [--rows "device" "int4 device"]

The 1b memory shape at batch 1 with random weights and rows of 8192 tokens, as in benchmarks/decode.py; needs a GPU.
`ms` is the median over groups of steps. `over_first_us` compares a kind with the first one turn by turn: the median of
the differences of their medians, and its 95 % interval by resampling turns.
The profiler makes kernels that overlap seem longer: compare its figures with one another, not with the step's time.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from decode import Bench, Scale  # beside this file

from flexmemory.engine.bench import sequences
from flexmemory.engine.engine import Engine
from flexmemory.provenance import provenance
from flexmemory.storage import write_json

NUM_IDS, PROMPT, LENGTH = 8192, 300, 2048
ROUNDS, GROUPS, STEPS = 36, 4, 8
PROFILED = 32


def started(bench: Bench, rows: str) -> Engine:
    """An engine whose one sequence goes on."""
    subject = bench.subject("memory", rows)
    tokens = sequences(bench.stream, batch=1, length=LENGTH + 1, num_ids=subject.num_ids)
    engine = subject.engine(forced=tokens, max_sequences=1, max_length=LENGTH)
    engine.submit(tokens[0, :PROMPT].tolist(), max_new_tokens=LENGTH)
    for _ in range(40):
        engine.step()
    torch.cuda.synchronize()
    return engine


def timed(engine: Engine) -> list[float]:
    """Milliseconds of a step, by group; one step is always in flight, as while a sequence goes on."""
    engine.step()
    times = []
    for _ in range(GROUPS):
        begun = time.perf_counter()
        for _ in range(STEPS):
            engine.step()
        times.append(1e3 * (time.perf_counter() - begun) / STEPS)
    torch.cuda.synchronize()
    return times


def over_first_us(turns: list[list[float]], first: list[list[float]]) -> dict[str, float]:
    """How much longer steps are than those of the first kind."""
    medians = [1e3 * torch.tensor([statistics.median(turn) for turn in kind]) for kind in (turns, first)]
    over = medians[0] - medians[1]
    picks = torch.randint(len(over), (2000, len(over)), generator=torch.Generator().manual_seed(0))
    low, high = over[picks].median(dim=1).values.quantile(torch.tensor([0.025, 0.975])).tolist()
    return {"median": over.median().item(), "low": low, "high": high}


def kernels(engine: Engine) -> list[dict[str, Any]]:
    """Launches and microseconds of a step, by kernel."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiled:
        for _ in range(PROFILED):
            engine.step()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in profiled.events() or []:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found.setdefault(event.name[:90], []).append(event.time_range.elapsed_us())
    rows = [
        {"name": name, "per_step": len(times) / PROFILED, "us_per_step": sum(times) / PROFILED}
        for name, times in found.items()
    ]
    return sorted(rows, key=lambda row: -row["us_per_step"])[:24]


def main() -> None:
    """Time all in turns, then profile each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", default=["device", "int4 device"])
    args = parser.parse_args()
    scale = dataclasses.replace(Scale(), num_ids=NUM_IDS, hot=NUM_IDS // 2)
    stream = torch.randint(NUM_IDS, (200_000,), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(scale, stream, device=torch.device("cuda"), folder=Path(folder))
        engines = {rows: started(bench, rows) for rows in args.rows}
        turns: dict[str, list[list[float]]] = {rows: [] for rows in engines}
        for _ in range(ROUNDS):
            for rows, engine in engines.items():
                turns[rows].append(timed(engine))
        kinds = {
            rows: {
                "ms": statistics.median(times := [time for turn in turns[rows] for time in turn]),
                "mean": statistics.mean(times),
                "min": min(times),
                "over_first_us": over_first_us(turns[rows], turns[args.rows[0]]),
                "kernels": kernels(engine),
            }
            for rows, engine in engines.items()
        }
    write_json(args.out, {"provenance": provenance(), "kinds": kinds})


if __name__ == "__main__":
    main()
