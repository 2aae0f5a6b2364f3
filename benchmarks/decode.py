"""Decoding on a GPU, a MemoryLLM beside its dense base and Hugging Face's: the whole protocol in one run, as JSON.

    python benchmarks/decode.py --stream runs/stream.bin --out benchmarks/results/decode.json --folder runs/bench

benchmarks/protocol.md says how each number is measured. Entries come in order of importance, and the file is written
again after each: a run that is cut short keeps what it has. `--quick` runs all of it on small models, on any machine.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import itertools
import re
import shutil
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flexmemory.device import resolve_device
from flexmemory.engine.bench import copy_rate, measure_decode, measure_prompt, measure_rows, sequences
from flexmemory.engine.subject import Subject, random_model, random_store
from flexmemory.presets import get_preset
from flexmemory.provenance import provenance
from flexmemory.storage import write_json
from flexmemory.tol.contract import RowTier
from flexmemory.tol.disk import DiskRows, cached_share, drop_cache
from flexmemory.tol.hot import HotRows, HotSet
from flexmemory.tol.store import ToLStore
from flexmemory.tol.tiers import open_rows

MODELS = {"base": "dense", "memory": "memory", "flex3": "flex-3"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of everything."""

    size: str = "1b"
    dtype: torch.dtype = torch.bfloat16
    num_ids: int = 40_000
    """Tokens that have rows, the most frequent: the others of the stream become the last of them."""
    carried_ids: int = 8192
    """The same where rows carry the embedding."""
    hot: int = 8192
    context: int = 1024
    capacity: int = 2048
    largest_capacity: int = 1152
    """At the largest batch."""
    steps: int = 400
    batch_steps: int = 60
    batches: tuple[int, int, int] = (64, 8, 256)
    prompt: int = 2048
    small_chunk: int = 256
    """Tokens of a prompt computed at once where memory is what counts."""
    row_counts: tuple[int, ...] = (1, 8, 64, 512, 4096)
    basis_codec: str = "svd512+normal4"
    """Of rows that are products with a basis."""


QUICK = Scale(
    size="nano", dtype=torch.float32, num_ids=256, carried_ids=128, hot=32, context=40, capacity=64,
    largest_capacity=64, steps=20, batch_steps=10, batches=(3, 2, 4), prompt=60, small_chunk=16, row_counts=(1, 8),
    basis_codec="svd16+normal4",
)  # fmt: skip


class Bench:
    """What entries share: the stream, the store, and tiers, which are opened once."""

    def __init__(self, scale: Scale, stream: torch.Tensor, *, device: torch.device, folder: Path) -> None:
        self.scale, self.stream, self.device, self.folder = scale, stream, device, folder
        self._stores: dict[str, ToLStore] = {}
        self._tiers: dict[str, RowTier] = {}
        self._rate: float | None = None

    @property
    def rate(self) -> float:
        """Bytes a second that the device copies."""
        if self._rate is None:
            self._rate = copy_rate(self.device)
        return self._rate

    def store(self, kind: str = "rows") -> ToLStore:
        """Random rows on disk: bf16 `rows`, those that are `carried` with the embedding, or in a codec of few bits."""
        if kind not in self._stores:
            config, carried = get_preset(f"{self.scale.size}-memory").model, kind == "carried"
            self._stores[kind] = random_store(
                self.folder / kind,
                config,
                num_ids=self.scale.carried_ids if carried else self.scale.num_ids,
                embedding=carried,
                codec="bf16" if kind in ("rows", "carried") else kind,
            )
        return self._stores[kind]

    def tier(self, name: str) -> RowTier | None:
        """Rows from a place by its name: a tier, perhaps with a kind of store before it or `+ hot` after it."""
        if name == "none":
            return None
        if name not in self._tiers:
            if name.endswith(" + hot"):
                below = self.tier(name.removesuffix(" + hot"))
                assert below is not None
                hot = HotSet.load(below, torch.arange(self.scale.hot), device=self.device)
                self._tiers[name] = HotRows(below, hot)
            else:
                *kind, place = name.split()
                self._tiers[name] = open_rows(self.store(*kind), place, device=self.device)
        return self._tiers[name]

    def subject(self, model: str, rows: str, *, int8: Any = None, max_seq_len: int = 0) -> Subject:
        """A model with random weights, and its rows."""
        config = get_preset(f"{self.scale.size}-{model}").model
        config = dataclasses.replace(config, max_seq_len=max(config.max_seq_len, max_seq_len))
        tier = self.tier(rows)
        weights = random_model(
            config,
            device=self.device,
            dtype=self.scale.dtype,
            num_ids=None if tier is None else tier.vocab_size,
            embedding=tier is None or not tier.embedding,
            int8=int8,
        )
        return Subject(model=weights, tier=tier)

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0


def device_facts(bench: Bench) -> dict[str, Any]:
    name = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "CPU"
    return {"device": name, "copy_bytes_per_s": bench.rate}


def prepare_rows(bench: Bench) -> dict[str, Any]:
    """Write the store and load it: no figure, but what the run spends on it."""
    started = time.perf_counter()
    store = bench.store()
    wrote = time.perf_counter()
    bench.tier("device")
    return {
        "row_bytes": store.row_bytes,
        "ids": store.vocab_size,
        "hot": bench.scale.hot,
        "hot_share": float((bench.stream < bench.scale.hot).float().mean()),
        "clipped_share": float((bench.stream >= store.vocab_size).float().mean()),
        "write_s": wrote - started,
        "load_s": time.perf_counter() - wrote,
    }


def decode(
    bench: Bench,
    model: str,
    rows: str = "none",
    *,
    int8: Any = None,
    batch: int = 1,
    capacity: int | None = None,
    prefill_chunk: int = 2048,
    before_steps: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    scale = bench.scale
    tier = bench.tier(rows)
    outside = bench.allocated()
    subject = bench.subject(model, rows, int8=int8)
    if tier is not None and bench.device.type == "cuda":
        outside -= subject.table_bytes
    figures = measure_decode(
        subject,
        bench.stream,
        batch=batch,
        context=scale.context,
        steps=scale.steps if batch == 1 else scale.batch_steps,
        copy_bytes_per_s=bench.rate,
        capacity=capacity or scale.capacity,
        prefill_chunk=prefill_chunk,
        before_steps=before_steps,
    )
    peaks = {"peak_bytes": figures.peak_bytes - outside, "peak_decode_bytes": figures.peak_decode_bytes - outside}
    return {"model": MODELS[model], "rows": rows, "int8": int8, **dataclasses.asdict(figures), **peaks}


def decode_from_disk(bench: Bench, rows: str, *, cold: bool) -> dict[str, Any]:
    """The page cache is as it is after writing and reading the store, or emptied before prompt and steps."""
    store = bench.store()
    tier = bench.tier(rows)
    disk = tier.tier if isinstance(tier, HotRows) else tier
    assert isinstance(disk, DiskRows)
    seen: dict[str, Any] = {}

    def look() -> None:
        if cold:
            drop_cache(store)
        disk.look_at_cache()
        seen.update(cached_share_before=cached_share(store), direct=disk.direct)

    look()
    figures = decode(bench, "memory", rows, before_steps=look)
    return {**figures, **seen, "cache": "cold" if cold else "warm", "cached_share_after": cached_share(store)}


def prefill(bench: Bench, model: str, rows: str = "none") -> dict[str, Any]:
    length = bench.scale.prompt
    subject = bench.subject(model, rows, max_seq_len=length + 1)
    token_ids = sequences(bench.stream, batch=1, length=length, num_ids=subject.num_ids)
    engine = subject.engine(max_length=length + 1)
    return {
        "model": MODELS[model],
        "rows": rows,
        "prompt": length,
        "ms": measure_prompt(engine, token_ids[0].tolist()),
    }


def hugging_face(bench: Bench, *, static: bool) -> dict[str, Any]:
    """The dense base by `generate`: the median time between tokens, once those that compile have passed."""
    import transformers

    shape = get_preset(f"{bench.scale.size}-base").model
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=2 * bench.scale.capacity,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with bench.device:
        model = transformers.LlamaForCausalLM(config)
    model = model.to(bench.scale.dtype).eval()
    steps = 32 if bench.device.type == "cuda" else 8
    prompt = bench.scale.context - steps // 2
    token_ids = sequences(bench.stream, batch=1, length=prompt, num_ids=shape.vocab_size).to(bench.device)
    times: list[float] = []

    def clock(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        ids[:, -1].tolist()  # waits for the token, as `generate` itself does after this
        times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    model.generate(
        token_ids,
        attention_mask=torch.ones_like(token_ids),
        max_new_tokens=steps,
        do_sample=False,
        stopping_criteria=transformers.StoppingCriteriaList([clock]),
        cache_implementation="static" if static else None,
    )
    assert len(times) == steps
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    return {
        "model": MODELS["base"],
        "mode": "static cache, torch.compile" if static else "eager",
        "compiled": "_compiled_call" in vars(model),
        "context": bench.scale.context,
        "ms_per_token": 1e3 * statistics.median(gaps[len(gaps) // 2 :]),
        "transformers": transformers.__version__,
    }


def gather(bench: Bench, rows: str, *, cold: bool = False) -> dict[str, Any]:
    warm_disk = rows == "disk" and not cold
    tier = DiskRows(bench.store(), direct="never") if warm_disk else bench.tier(rows)
    assert tier is not None
    figures = measure_rows(tier, bench.store(), device=bench.device, counts=bench.scale.row_counts, cold=cold)
    return {"rows": rows, "gathers": [dataclasses.asdict(figure) for figure in figures]}


def protocol(bench: Bench) -> list[tuple[str, Callable[[], dict[str, Any]], int]]:
    """Kind, measurement and most seconds of each entry: the most important first, a warm page cache before a cold."""
    run, (some, few, many) = partial(decode, bench), bench.scale.batches
    largest, coded = bench.scale.largest_capacity, ("int4", "planned", bench.scale.basis_codec)
    return [
        ("device", partial(device_facts, bench), 60),
        ("store", partial(prepare_rows, bench), 120),
        ("decode", partial(run, "base"), 60),
        ("decode", partial(run, "memory", "device"), 60),
        ("decode", partial(run, "flex3", "device"), 60),
        ("decode", partial(run, "memory", "host"), 60),
        ("prefill", partial(prefill, bench, "base"), 45),
        ("prefill", partial(prefill, bench, "memory", "device"), 45),
        ("prefill", partial(prefill, bench, "memory", "host"), 45),
        ("decode", partial(decode_from_disk, bench, "disk + hot", cold=False), 60),
        ("decode", partial(decode_from_disk, bench, "disk", cold=False), 60),
        *[("gather", partial(gather, bench, rows), 45) for rows in ("device", "host", "disk")],
        ("decode", partial(decode_from_disk, bench, "disk + hot", cold=True), 60),
        ("memory", partial(run, "memory", "carried host", prefill_chunk=bench.scale.small_chunk), 45),
        ("memory", partial(run, "base", prefill_chunk=bench.scale.small_chunk), 45),
        ("hugging face", partial(hugging_face, bench, static=False), 60),
        ("decode", partial(run, "memory", "device", batch=some), 60),
        ("decode", partial(run, "memory", "host", batch=some), 60),
        ("decode", partial(run, "memory", "host + hot", batch=some), 60),
        ("decode", partial(run, "base", batch=some), 60),
        ("decode", partial(run, "memory", "host + hot"), 60),
        ("decode", partial(run, "memory", "device", int8="head"), 60),
        ("decode", partial(run, "memory", "device", int8="all"), 60),
        ("decode", partial(run, "memory", "device", batch=few), 60),
        ("decode", partial(run, "base", batch=few), 60),
        ("prefill", partial(prefill, bench, "flex3", "device"), 45),
        ("gather", partial(gather, bench, "disk", cold=True), 45),
        ("decode", partial(run, "memory", "device", batch=many, capacity=largest), 90),
        ("decode", partial(run, "base", batch=many, capacity=largest), 90),
        *[
            ("decode", partial(run, "memory", f"{codec} {place}"), 60)
            for codec in coded
            for place in ("device", "host")
        ],
        *[("decode", partial(run, "memory", f"{codec} host", batch=some), 60) for codec in coded],
        ("prefill", partial(prefill, bench, "memory", f"{coded[0]} host"), 45),
        ("hugging face", partial(hugging_face, bench, static=True), 110),
    ]


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in a block that takes longer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"it took more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def attempt(measure: Callable[[], dict[str, Any]], *, limit_s: int) -> dict[str, Any]:
    """What was measured, or why it was not; never both."""
    try:
        with time_limit(limit_s):
            return measure()
    except (
        RuntimeError,
        OSError,
        ImportError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        AssertionError,
    ) as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stream", type=Path, help="what benchmarks/stream.py wrote")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"), help="7 GB of scratch space, emptied")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--limit", type=float, default=240, help="seconds after which no entry is begun")
    parser.add_argument("--only", default="", help="measure entries that this regular expression is found in")
    parser.add_argument("--quick", action="store_true", help="small models, to see that it runs")
    args = parser.parse_args()
    started = time.perf_counter()
    if args.stream is None and not args.quick:
        parser.error("give --stream; benchmarks/stream.py makes it")
    scale = QUICK if args.quick else Scale()
    ids = np.arange(1000) * 7 % 300 if args.stream is None else np.fromfile(args.stream, "<u4")
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    stream = torch.from_numpy(ids.astype(np.int64))
    bench = Bench(scale, stream, device=resolve_device(args.device), folder=args.folder)
    results: dict[str, Any] = {"size": scale.size, "quick": args.quick, "provenance": provenance(), "entries": []}
    for kind, measure, limit_s in protocol(bench):
        begun = time.perf_counter()
        call = " ".join(map(str, measure.args[1:] + tuple(f"{k}={v}" for k, v in measure.keywords.items())))
        if not re.search(args.only, f"{kind} {call}".strip()):
            continue
        if begun - started > args.limit:
            entry: dict[str, Any] = {"error": f"not begun: {args.limit:.0f} s were over"}
        else:
            entry = attempt(measure, limit_s=limit_s)
        entry = {"bench": kind, "call": call, **entry, "took_s": time.perf_counter() - begun}
        results["entries"].append(entry)
        write_json(args.out, results)
        shown = {key: entry[key] for key in ("ms_per_token", "bound_share", "ms", "error") if key in entry}
        print(f"{begun - started:6.1f} s {kind:13}{entry['call']:44}{shown}", file=sys.stderr, flush=True)
        free()
    shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
