"""`flexmemory demo`: train three small models on real text, build their lookups, generate from disk.

    OUT/
      data/                       token shards of the corpus
      base/ memory/ flex3/        training runs (flexmemory train)
      tol/memory-bf16/ ...        token-wise lookups (flexmemory tol build)
      demo.json  losses.png       the printed table, and the three loss curves

Run again, it goes on where it was stopped.
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
import tyro

from flexmemory.engine.loading import LoadedModel, load_model
from flexmemory.engine.sampling import Sampling
from flexmemory.evaluate.perplexity import perplexity
from flexmemory.interpret.tkv import TokenMemory
from flexmemory.model.accounting import count_parameters
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.presets import get_preset
from flexmemory.provenance import provenance
from flexmemory.storage import write_json
from flexmemory.tol.build import build_store
from flexmemory.tol.store import ToLStore
from flexmemory.train.data import TokenDataset
from flexmemory.train.loop import train
from flexmemory.train.metrics import read_lines
from flexmemory.train.plot import plot_losses
from flexmemory.train.prepare import prepare

VARIANTS = ("base", "memory", "flex3")
LEFT_OUT = ("test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__")
"""Folders of the standard library that are tests, tables of characters, or not part of it."""
PROMPT = "def read(self, path):\n"
NEAREST_OF = (" return", " True", " is", " a", " self")
DECODE_TOKENS = 128
GENERATED_TOKENS = 120
COMPARED_WINDOWS = 16
logger = logging.getLogger(__name__)


def demo(
    *,
    out: Path = Path("runs/demo"),
    data: Path | None = None,
    size: str = "demo",
    total_tokens: int | None = None,
) -> int:
    """Train base, memory and flex-3 on the same tokens on the CPU, then compare them and generate from disk.

    Args:
        out: Folder for everything that is made.
        data: Text to train on; by default the source of Python's standard library, without tests and tables.
        size: Family of presets to train.
        total_tokens: Tokens to train each model on; by default the preset's.

    Returns:
        The exit code: 0, or 128 and the number of the signal that stopped it.
    """
    presets = {variant: get_preset(f"{size}-{variant}") for variant in VARIANTS}
    prepared = out / "data"
    if not prepared.exists():
        corpus = data or Path(sysconfig.get_path("stdlib"))
        logger.info("preparing %s", corpus)
        vocab_size = presets["base"].model.vocab_size
        prepare([corpus], prepared, vocab_size=vocab_size, val_fraction=0.05, exclude_dirs=LEFT_OUT)
    dataset = TokenDataset.open(prepared)
    logger.info("using %s: %s training tokens", prepared, f"{len(dataset.train):,}")
    stream = validation_stream(dataset, num_tokens=presets["base"].train.eval_tokens)
    for variant, preset in presets.items():
        recipe = preset.train
        if total_tokens is not None:
            recipe = dataclasses.replace(recipe, total_tokens=total_tokens)
        model = dataclasses.replace(preset.model, vocab_size=dataset.vocab_size)
        logger.info("training %s-%s on %s tokens", size, variant, f"{recipe.total_tokens:,}")
        run = out / variant
        result = train(
            model, train_config=recipe, data=prepared, out=run, resume=any(run.glob("checkpoints/step-*")), device="cpu"
        )
        if result.signal is not None:
            logger.info("stopped; the same command goes on from here")
            return 128 + result.signal
    plot_losses({variant: out / variant / "metrics.jsonl" for variant in VARIANTS}, image=out / "losses.png")
    results = measure(out, stream)
    write_json(out / "demo.json", {"models": results, "provenance": provenance()})
    print(f"\n{table(results)}\n\nloss curves: {out / 'losses.png'}")
    print_generation(Checkpoint.open(out / "flex3"), out / "tol" / "flex3-bf16")
    print_nearest(Checkpoint.open(out / "memory"))
    return 0


def measure(out: Path, stream: np.ndarray) -> dict[str, dict[str, float]]:
    """The figures of each trained model; perplexity is that of the held-out `stream`."""
    results: dict[str, dict[str, float]] = {}
    decoders: dict[tuple[str, str], LoadedModel] = {}
    for variant in VARIANTS:
        checkpoint = Checkpoint.open(out / variant)
        counts = count_parameters(checkpoint.config)
        computed = decoders[variant, "computed"] = load_model(checkpoint)
        lines = read_lines(out / variant / "metrics.jsonl")
        figures = results[variant] = {
            "parameters, total (M)": counts.total / 1e6,
            "parameters, resident (M)": counts.resident / 1e6,
            "validation perplexity": perplexity(computed.model, stream).perplexity,
            "training speed (tokens/s)": statistics.median(line["tokens_per_s"] for line in lines if "lr" in line),
        }
        if not checkpoint.config.has_memory:
            continue
        for codec in ("bf16", "fp32"):
            store = built(out / "tol" / f"{variant}-{codec}", checkpoint, codec=codec)
            looked_up = load_model(checkpoint, tol=store.path, rows="disk")
            figures[f"ToL in {codec} (MB)"] = store.nbytes / 1e6
            figures[f"largest logit difference, {codec} rows"] = logit_difference(computed, looked_up, stream)
        bf16 = out / "tol" / f"{variant}-bf16"
        decoders[variant, "in host memory"] = load_model(checkpoint, tol=bf16, rows="host")
        decoders[variant, "on disk"] = load_model(checkpoint, tol=bf16, rows="disk")
    for (variant, place), milliseconds in decode_ms(decoders).items():
        results[variant][f"decode, rows {place} (ms/token)"] = milliseconds
    return results


def validation_stream(dataset: TokenDataset, *, num_tokens: int) -> np.ndarray:
    """The first held-out tokens, with one before them as context.

    Raises:
        ValueError: no document was held out.
    """
    if dataset.validation is None:
        raise ValueError("the demo needs two documents at least, so that one can be held out: give more --data")
    return dataset.validation.read(0, min(len(dataset.validation), num_tokens + 1))


def built(path: Path, checkpoint: Checkpoint, *, codec: str) -> ToLStore:
    """The store at `path`, built now unless it was."""
    return ToLStore.open(path, checkpoint=checkpoint) if path.exists() else build_store(checkpoint, path, codec=codec)


def decode_ms(decoders: dict[tuple[str, str], LoadedModel]) -> dict[tuple[str, str], float]:
    """Median milliseconds to decode one token at batch 1; all take turns, so that a busy machine slows all alike."""
    engines = {key: loaded.engine() for key, loaded in decoders.items()}
    requests = {key: engine.submit([0], max_new_tokens=DECODE_TOKENS) for key, engine in engines.items()}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in decoders}
    while any(request.finish_reason is None for request in requests.values()):
        for key, engine in engines.items():
            start = time.perf_counter()
            engine.step()
            times[key].append(1000 * (time.perf_counter() - start))
    return {key: statistics.median(values) for key, values in times.items()}


@torch.inference_mode()
def logit_difference(computed: LoadedModel, looked_up: LoadedModel, stream: np.ndarray) -> float:
    """Largest difference of any logit between the two sources of rows, over held-out text."""
    assert looked_up.row_source is not None
    length = computed.model.config.max_seq_len
    windows = torch.from_numpy(stream[: len(stream) // length * length]).view(-1, length)[:COMPARED_WINDOWS]
    rows = looked_up.row_source(windows)
    return float((computed.model(windows) - looked_up.model(windows, rows)).abs().max())


def table(results: dict[str, dict[str, float]]) -> str:
    """Figures as rows, models as columns."""
    labels = list(dict.fromkeys(label for figures in results.values() for label in figures))
    width = max(map(len, labels))
    lines = [f"{'':{width}}" + "".join(f"{variant:>12}" for variant in results)]
    for label in labels:
        cells = (f"{figures[label]:,.4g}" if label in figures else "-" for figures in results.values())
        lines.append(f"{label:{width}}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def print_generation(checkpoint: Checkpoint, store: Path) -> None:
    """Continue a prompt from disk, the FFN weights never loaded."""
    loaded = load_model(checkpoint, tol=store, rows="disk")
    tokenizer = checkpoint.tokenizer()
    print(f"\n{store.name}: {loaded.describe()}:\n")
    engine = loaded.engine()
    request = engine.submit(
        [tokenizer.boundary_id, *tokenizer.encode(PROMPT)],
        sampling=Sampling(temperature=0.7, top_p=0.9),
        max_new_tokens=GENERATED_TOKENS,
        stop_ids={tokenizer.boundary_id},
    )
    sys.stdout.write(PROMPT)
    for piece in tokenizer.decode_stream(engine.stream(request)):
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()


def print_nearest(checkpoint: Checkpoint) -> None:
    """For a few tokens, those that use the first layer's memory most alike."""
    memory, tokenizer = TokenMemory(checkpoint.load()), checkpoint.tokenizer()
    print("\nnearest tokens by memory coefficients, layer 0 (exact over the vocabulary):")
    for word in NEAREST_OF:
        token_id = tokenizer.encode(word)[0]
        found = memory.nearest_tokens(token_id, layer=0, count=5)
        print(f"  {tokenizer.token(token_id)!r:12}" + "  ".join(f"{tokenizer.token(t)!r} {c:.2f}" for t, c in found))


def main(argv: list[str]) -> int:
    """Entry point of the verb."""
    return tyro.cli(demo, args=argv, prog="flexmemory demo")
