"""Whether a context speaks for the right answer: a graded score, for models whose accuracy is that of guessing.

A context raises the log-likelihood of each choice: against the same choice after the last line of the prompt alone
(`Answer:`, where there is one, else nothing), a character where the task has `acc_norm`. The gain of a document is the
share of its wrong choices that are raised less than the right one, less one half; equal ones count half. A model that
does not look at the context has exactly 0, however well it knows which answers are common, and one that looks but
cannot tell has 0 in the mean. Only the order counts, so a model does not gain by being too sure. LAMBADA's wrong
choices are the last words of the next documents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from flexmemory.evaluate.likelihood import Request
from flexmemory.evaluate.tasks import Document, Task, TaskScore

OTHER_WORDS = 4
"""Wrong choices of a document of LAMBADA."""


def graded(task: Task) -> Task:
    """The requests from which `gains` are computed, as a task of that single metric.

    Each document asks for its choices, then for the same choices without the context. The first half are the task's own
    requests, so that both tasks, encoded together, cost little more than one.
    """
    documents = task.documents
    if task.name == "lambada_openai":
        words = [document.requests[0].continuation for document in documents]
        documents = tuple(
            Document(
                tuple(
                    Request(document.requests[0].context, words[(number + step) % len(words)])
                    for step in range(OTHER_WORDS + 1)
                )
            )
            for number, document in enumerate(documents)
        )
    by_length = "acc_norm" in task.metrics
    documents = tuple(_with_and_without(document, by_length=by_length) for document in documents)
    return Task(f"{task.name} gain", ("gain",), documents)


def _with_and_without(document: Document, *, by_length: bool) -> Document:
    without = tuple(
        Request(context.rpartition("\n")[2] if "\n" in context else "", continuation)
        for context, continuation in document.requests
    )
    lengths = document.lengths if by_length else ()
    return dataclasses.replace(document, requests=(*document.requests, *without), lengths=lengths)


def block_means(score: TaskScore, metric: str, *, count: int) -> list[float]:
    """Means over `count` blocks of documents, in their order: enough for paired errors of any two models.

    A task of fewer documents has a block of each.
    """
    values: Float[np.ndarray, " N"] = score.documents[metric]
    blocks: Sequence[np.ndarray] = np.array_split(values, min(count, len(values)))
    return [round(float(block.mean()), 6) for block in blocks]
