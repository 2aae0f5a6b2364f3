"""`flexmemory eval ppl | tasks CHECKPOINT --data ...`: perplexity on text or prepared data, and zero-shot tasks."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import tyro

from flexmemory.device import resolve_device
from flexmemory.engine.int8 import Int8Part
from flexmemory.engine.loading import DTYPES, LoadedModel, RowPlace, load_model
from flexmemory.evaluate.likelihood import BATCH_TOKENS
from flexmemory.evaluate.perplexity import Perplexity, perplexity
from flexmemory.evaluate.probes import layer_alphas, scaled_ffn
from flexmemory.evaluate.tasks import TASKS, EncodedTasks, TaskScore, load_task, score_tasks
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.provenance import provenance
from flexmemory.storage import write_json
from flexmemory.tokenizer import Tokenizer
from flexmemory.train.data import TokenDataset
from flexmemory.train.documents import find_sources, read_documents

logger = logging.getLogger(__name__)


class Text(NamedTuple):
    """A token stream, and the size of the text that it stands for where that is known."""

    stream: np.ndarray
    num_bytes: int | None
    num_words: int | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class JudgedOptions:
    """Which model is measured, and what of it."""

    tol: Path | None = None
    """A ToL store built from the checkpoint: rows are looked up, and FFN-M weights are never loaded."""
    rows: RowPlace | None = None
    """Where rows come from; by default disk with --tol and compute without."""
    keep_layers: int | None = None
    """Layers of each row to read, the first ones in the store's order."""
    int8: Int8Part | None = None
    """Weights to make int8: of the output head, or of all projections."""
    alpha: float = 1.0
    """Factor of what every FFN adds (FFN-M in memory and flex models)."""
    drop_layers: tuple[int, ...] = ()
    """Layers whose FFN adds nothing."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ..., or auto: the GPU where there is one."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the computation; auto is the stored dtype."""

    def alphas(self, checkpoint: Checkpoint) -> tuple[float, ...]:
        """A factor for each layer.

        Raises:
            ValueError: a layer to drop does not exist.
        """
        return layer_alphas(checkpoint.config.num_layers, alpha=self.alpha, drop_layers=self.drop_layers)

    def load(self, checkpoint: Checkpoint) -> LoadedModel:
        """The model, and a line in the log about it.

        Raises:
            ValueError: the options do not go together.
        """
        loaded = load_model(
            checkpoint,
            tol=self.tol,
            rows=self.rows,
            keep_layers=self.keep_layers,
            device=resolve_device(self.device),
            dtype=DTYPES.get(self.dtype),
            int8=self.int8,
        )
        logger.info("%s", loaded.describe())
        return loaded


def ppl(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    data: Path,
    split: Literal["validation", "train"] = "validation",
    text_field: str = "text",
    max_tokens: int | None = None,
    options: Annotated[JudgedOptions, tyro.conf.arg(name="")] = JudgedOptions(),
    seq_len: int | None = None,
    batch_size: int = 8,
) -> None:
    """Perplexity with its standard error, bits per byte and, for text, word-level perplexity.

    Args:
        checkpoint: A checkpoint or run folder.
        data: A folder of `flexmemory prepare`, or text as that command reads it (files or folders).
        split: Which split of prepared data.
        text_field: Where .jsonl and .parquet keep the text.
        max_tokens: Evaluate only the first tokens.
        options: What is measured of the model.
        seq_len: Tokens per window; by default the model's longest sequence.
        batch_size: Windows per forward pass.
    """
    opened = Checkpoint.open(checkpoint)
    alphas = options.alphas(opened)
    text = read_text(data, opened, split=split, text_field=text_field)
    if max_tokens is not None and max_tokens < len(text.stream):
        text = Text(text.stream[:max_tokens], None, None)
    loaded = options.load(opened)
    with scaled_ffn(loaded.model, alphas, loaded.row_source) as row_source:
        result = perplexity(
            loaded.model,
            text.stream,
            seq_len=seq_len,
            batch_size=batch_size,
            row_source=row_source,
            num_bytes=text.num_bytes,
            num_words=text.num_words,
        )
    print(describe(result))


def tasks(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    data: Path,
    tasks: tuple[str, ...] = TASKS,
    limit: int | None = None,
    out: Path | None = None,
    options: Annotated[JudgedOptions, tyro.conf.arg(name="")] = JudgedOptions(),
    batch_tokens: int = BATCH_TOKENS,
) -> None:
    """Zero-shot accuracy with its standard error, with the prompts and metrics of lm-evaluation-harness.

    Args:
        checkpoint: A checkpoint or run folder.
        data: The folder with the tasks' files (docs/evaluating.md).
        tasks: What to measure; by default all.
        limit: Take the first documents of each task only.
        out: Write figures and the result of each document to this JSON file, which is replaced.
        options: What is measured of the model.
        batch_tokens: Positions of one forward pass, padding included.
    """
    opened = Checkpoint.open(checkpoint)
    alphas = options.alphas(opened)
    encoded = EncodedTasks.of(
        [load_task(name, data, limit=limit) for name in tasks],
        opened.tokenizer(),
        max_len=opened.config.max_seq_len,
        batch_tokens=batch_tokens,
    )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    loaded = options.load(opened)
    with scaled_ffn(loaded.model, alphas, loaded.row_source) as row_source:
        scores = score_tasks(loaded.model, encoded, row_source=row_source)
    if out is not None:
        settings = {
            "checkpoint": str(checkpoint),
            "tol": None if options.tol is None else str(options.tol),
            "rows": loaded.rows,
            "dtype": str(loaded.model.dtype),
            "int8": options.int8,
            "keep_layers": options.keep_layers,
            "alphas": alphas,
            "limit": limit,
        }
        results = {name: score.to_json() for name, score in scores.items()}
        write_json(out, {"settings": settings, "provenance": provenance(), "tasks": results})
    print(task_table(scores))


def task_table(scores: Mapping[str, TaskScore]) -> str:
    """The text that `flexmemory eval tasks` prints."""
    lines = [f"{'task':<16}{'documents':>9}  {'metric':<12}{'value':>10}{'stderr':>10}"]
    lines += [
        f"{name:<16}{score.num_documents:>9,}  {metric:<12}{found.value:>10.4f}{found.stderr:>10.4f}"
        for name, score in scores.items()
        for metric, found in score.metrics.items()
    ]
    return "\n".join(lines)


def read_text(data: Path, checkpoint: Checkpoint, *, split: Literal["validation", "train"], text_field: str) -> Text:
    """The token stream to evaluate, from prepared data or from text.

    Raises:
        ValueError: prepared data is of another tokenizer, or lacks the split.
    """
    if not (data / "manifest.json").is_file():
        return tokenised(data, checkpoint.tokenizer(), text_field=text_field)
    dataset = TokenDataset.open(data)
    if dataset.tokenizer().fingerprint != checkpoint.tokenizer_fingerprint:
        raise ValueError(
            f"{data} was prepared with another tokenizer than {checkpoint.path} has; evaluate its text instead"
        )
    tokens = dataset.train if split == "train" else dataset.validation
    if tokens is None:
        raise ValueError(
            f"{data} has no {split} split; prepare it with a --val-fraction above 0, or take --split train"
        )
    return Text(tokens.read(0, len(tokens)), tokens.num_bytes, None)


def tokenised(data: Path, tokenizer: Tokenizer, *, text_field: str) -> Text:
    """Every document of a file or folder, each after a boundary token."""
    num_bytes = num_words = 0
    pieces: list[np.ndarray] = []
    for document in read_documents(find_sources([data]), text_field=text_field):
        num_bytes += len(document.text.encode())
        num_words += len(document.text.split())
        pieces.append(np.array([tokenizer.boundary_id, *tokenizer.encode(document.text)], dtype=np.int64))
    return Text(np.concatenate(pieces), num_bytes, num_words)


def describe(result: Perplexity) -> str:
    """The text that `flexmemory eval ppl` prints."""
    lines = [
        f"perplexity       {result.perplexity:.4f} +- {result.perplexity_stderr:.4f}",
        f"nats per token   {result.loss:.5f} +- {result.stderr:.5f}",
        f"tokens           {result.num_tokens:,}",
    ]
    if result.bits_per_byte is not None:
        lines.append(f"bits per byte    {result.bits_per_byte:.4f} ({result.num_bytes:,} bytes)")
    if result.word_perplexity is not None:
        lines.append(f"word perplexity  {result.word_perplexity:.4f} ({result.num_words:,} words)")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Entry point of the verb."""
    tyro.extras.subcommand_cli_from_dict(
        {"ppl": ppl, "tasks": tasks}, args=argv, prog="flexmemory eval", description="Measure a checkpoint."
    )
    return 0
