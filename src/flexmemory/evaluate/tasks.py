"""Eight zero-shot tasks from files: prompts, choices and metrics as in EleutherAI's lm-evaluation-harness 0.4.

A file has one JSON object a line, in the schema of the data set that the harness reads or, for ARC, HellaSwag and
BoolQ, in that of the original files (docs/evaluating.md). Dimension key: R requests, N documents.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import lzma
import math
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from flexmemory.config import nearest
from flexmemory.engine.reference import RowSource
from flexmemory.evaluate.likelihood import (
    BATCH_TOKENS,
    Continuations,
    Likelihoods,
    Request,
    encode_requests,
)
from flexmemory.model.transformer import Transformer
from flexmemory.tokenizer import Tokenizer

_OPENERS = {"": open, ".xz": lzma.open, ".gz": gzip.open}


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One question: how likely is each of the requests?"""

    requests: tuple[Request, ...]
    gold: int = 0
    """Number of the right one."""
    lengths: tuple[int, ...] = ()
    """Characters of each choice, by which `acc_norm` divides."""


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """Documents, and what is measured on them."""

    name: str
    metrics: tuple[str, ...]
    documents: tuple[Document, ...]


class Metric(NamedTuple):
    """A figure and its standard error, which is nan for a single document."""

    value: float
    stderr: float


@dataclasses.dataclass(frozen=True, slots=True)
class TaskScore:
    """What a model reached on a task."""

    documents: dict[str, Float[np.ndarray, " N"]]
    """Per metric a number for each document: 1 where it is right and 0; for `perplexity` the log-likelihood in nats."""

    @property
    def num_documents(self) -> int:
        """N."""
        return len(next(iter(self.documents.values())))

    @property
    def metrics(self) -> dict[str, Metric]:
        """Means with the standard error of a sample's mean; exp(-mean) for `perplexity`, its error to first order.

        The harness has the same, but for the error of `perplexity`, where it draws 100,000 bootstrap samples.
        """
        found = {}
        for name, values in self.documents.items():
            mean = float(values.mean())
            stderr = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
            perplexity = math.exp(-mean) if name == "perplexity" else math.nan
            found[name] = Metric(perplexity, perplexity * stderr) if name == "perplexity" else Metric(mean, stderr)
        return found

    def to_json(self) -> dict[str, Any]:
        """Figures, an unknown standard error as null, and the number of each document."""
        figures = {
            name: {"value": value, "stderr": None if math.isnan(stderr) else stderr}
            for name, (value, stderr) in self.metrics.items()
        }
        results = {name: values.tolist() for name, values in self.documents.items()}
        return {"documents": self.num_documents, "metrics": figures, "results": results}


def _multiple_choice(context: str, choices: Sequence[str], gold: int) -> Document:
    requests = tuple(Request(context, f" {choice}") for choice in choices)
    return Document(requests, gold, tuple(map(len, choices)))


def _lambada(record: dict[str, Any]) -> Document:
    context, _, last = record["text"].rpartition(" ")
    return Document((Request(context, f" {last}"),))


def _hellaswag(record: dict[str, Any]) -> Document:
    if "query" in record:  # already cleaned
        return _multiple_choice(record["query"], record["endings"], int(record["label"]))
    context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    return _multiple_choice(_cleaned(context), [_cleaned(text) for text in record["endings"]], int(record["label"]))


def _cleaned(text: str) -> str:
    """Without the marks that WikiHow's part of HellaSwag has; the space that a mark leaves in front stays."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _arc(record: dict[str, Any]) -> Document:
    question = record["question"]
    if isinstance(question, str):
        texts, labels = record["choices"]["text"], record["choices"]["label"]
    else:
        texts, labels = ([choice[key] for choice in question["choices"]] for key in ("text", "label"))
        question = question["stem"]
    return _multiple_choice(f"Question: {question}\nAnswer:", texts, labels.index(record["answerKey"]))


def _piqa(record: dict[str, Any]) -> Document:
    return _multiple_choice(
        f"Question: {record['goal']}\nAnswer:", [record["sol1"], record["sol2"]], int(record["label"])
    )


def _social_iqa(record: dict[str, Any]) -> Document:
    choices = [record["answerA"], record["answerB"], record["answerC"]]
    return _multiple_choice(f"Q: {record['context']} {record['question']}\nA:", choices, int(record["label"]) - 1)


def _winogrande(record: dict[str, Any]) -> Document:
    """The options are in the contexts, and what follows the gap is the continuation of both."""
    sentence, gap = record["sentence"], record["sentence"].index("_")
    contexts = [sentence[:gap] + record[option] for option in ("option1", "option2")]
    rest = f" {sentence[gap + 1 :].strip()}"
    return Document(tuple(Request(context, rest) for context in contexts), int(record["answer"]) - 1)


def _boolq(record: dict[str, Any]) -> Document:
    context = f"{record['passage']}\nQuestion: {record['question']}?\nAnswer:"
    return _multiple_choice(context, ["no", "yes"], int(record["label" if "label" in record else "answer"]))


def _sciq(record: dict[str, Any]) -> Document:
    choices = [record[name] for name in ("distractor1", "distractor2", "distractor3", "correct_answer")]
    return _multiple_choice(f"{record['support'].lstrip()}\nQuestion: {record['question']}\nAnswer:", choices, 3)


class _Definition(NamedTuple):
    read: Callable[[dict[str, Any]], Document]
    metrics: tuple[str, ...]
    files: tuple[str, ...]


_ACC = ("acc",)
_NORM = ("acc", "acc_norm")
_DEFINITIONS = {
    "lambada_openai": _Definition(_lambada, ("perplexity", "acc"), ("lambada_openai_test",)),
    "hellaswag": _Definition(_hellaswag, _NORM, ("hellaswag_val", "hellaswag_val_1000")),
    "arc_easy": _Definition(_arc, _NORM, ("arc_easy_test",)),
    "piqa": _Definition(_piqa, _NORM, ("piqa_valid",)),
    "social_iqa": _Definition(_social_iqa, _ACC, ("socialiqa_dev",)),
    "winogrande": _Definition(_winogrande, _ACC, ("winogrande_xl_dev",)),
    "boolq": _Definition(_boolq, _ACC, ("boolq_dev",)),
    "sciq": _Definition(_sciq, _NORM, ("sciq_test", "sciq_valid")),
}
TASKS = tuple(_DEFINITIONS)
"""Their names, which are the harness's."""


def load_task(name: str, folder: str | Path, *, limit: int | None = None) -> Task:
    """Read a task.

    Args:
        name: One of `TASKS`.
        folder: Where its file is: `NAME.jsonl` or as the data sets' own splits are called (docs/evaluating.md), plain,
            `.xz` or `.gz`.
        limit: Take the first documents only.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: there is no such task, `limit` is not positive, or the file is empty, damaged or of another schema.
    """
    if name not in _DEFINITIONS:
        meant = nearest(name, _DEFINITIONS) or f"; expected {', '.join(TASKS)}"
        raise ValueError(f"unknown task {name!r}{meant}")
    if limit is not None and limit < 1:
        raise ValueError(f"a limit of {limit} documents leaves nothing to measure; expected 1 or more")
    definition = _DEFINITIONS[name]
    path = _find(name, Path(folder), definition.files)
    documents = []
    for number, record in enumerate(_records(path, limit), 1):
        try:
            document = definition.read(record)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise ValueError(
                f"{path} line {number} is no document of {name} ({type(error).__name__}: {error}); "
                f"it has {', '.join(record)}"
            ) from error
        if not 0 <= document.gold < len(document.requests):
            raise ValueError(f"{path} line {number}: its label names none of its {len(document.requests)} choices")
        documents.append(document)
    if not documents:
        raise ValueError(f"{path} is empty; expected one JSON object a line")
    return Task(name, definition.metrics, tuple(documents))


def _find(name: str, folder: Path, files: Sequence[str]) -> Path:
    expected = [f"{stem}.jsonl{suffix}" for stem in (name, *files) for suffix in _OPENERS]
    found = next((folder / file for file in expected if (folder / file).is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"task {name} needs one of {', '.join(expected)} in {folder}; add it, or name other tasks"
        )
    return found


def _records(path: Path, limit: int | None) -> list[dict[str, Any]]:
    try:
        with _OPENERS[path.suffix if path.suffix in _OPENERS else ""](path, "rt", encoding="utf-8") as file:
            lines = [line for line in file if line.strip()][:limit]
        records = [json.loads(line) for line in lines]
    except (ValueError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged or not JSON lines ({error})") from error
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise ValueError(f"{path} line {number} should be a JSON object, got {type(record).__name__}")
    return records


@dataclasses.dataclass(frozen=True, slots=True)
class EncodedTasks:
    """Tasks in the tokens of one tokenizer, batched once for many models and probes."""

    tasks: tuple[Task, ...]
    continuations: Continuations

    @classmethod
    def of(
        cls, tasks: Sequence[Task], tokenizer: Tokenizer, *, max_len: int, batch_tokens: int = BATCH_TOKENS
    ) -> EncodedTasks:
        """Encode all requests of `tasks`; arguments and errors as for `Continuations.of`."""
        requests = [request for task in tasks for document in task.documents for request in document.requests]
        pairs = encode_requests(requests, tokenizer)
        return cls(tuple(tasks), Continuations.of(pairs, max_len=max_len, batch_tokens=batch_tokens))


def score_tasks(
    model: Transformer, encoded: EncodedTasks, *, row_source: RowSource | None = None
) -> dict[str, TaskScore]:
    """Measure a model, with the rows of a source or its own, on all tasks at once; the result is in their order."""
    answers = encoded.continuations.score(model, row_source=row_source)
    scores, start = {}, 0
    for task in encoded.tasks:
        end = start + sum(len(document.requests) for document in task.documents)
        scores[task.name] = task_score(task, Likelihoods(answers.log_probs[start:end], answers.greedy[start:end]))
        start = end
    return scores


def task_score(task: Task, answers: Likelihoods) -> TaskScore:
    """What the answers to all requests of a task, in their order, are worth."""
    if "perplexity" in task.metrics:
        return TaskScore({"perplexity": answers.log_probs, "acc": answers.greedy.astype(np.float64)})
    values: dict[str, list[float]] = {metric: [] for metric in task.metrics}
    start = 0
    for document in task.documents:
        log_probs = answers.log_probs[start : start + len(document.requests)]
        start += len(document.requests)
        if "gain" in values:  # `evaluate.gain`
            with_context, without = np.split(log_probs, 2)
            raised = (with_context - without) / np.maximum(document.lengths or 1, 1)
            signs = np.sign(raised[document.gold] - np.delete(raised, document.gold))
            values["gain"].append(signs.mean() / 2)
            continue
        values["acc"].append(float(log_probs.argmax() == document.gold))
        if "acc_norm" in values:
            with np.errstate(divide="ignore"):  # an empty choice is infinitely unlikely, as in the harness
                normalised = log_probs / np.array(document.lengths)
            values["acc_norm"].append(float(normalised.argmax() == document.gold))
    return TaskScore({name: np.array(numbers) for name, numbers in values.items()})


def paired_difference(first: TaskScore, second: TaskScore, metric: str) -> Metric:
    """By how much `second` exceeds `first` on the same documents; of `perplexity`, in nats of log-likelihood.

    Raises:
        ValueError: they are not of as many documents.
    """
    if first.num_documents != second.num_documents:
        raise ValueError(
            f"scores of {first.num_documents} and {second.num_documents} documents cannot be paired; expected one task"
        )
    difference = second.documents[metric] - first.documents[metric]
    return TaskScore({"difference": difference}).metrics["difference"]
