"""What a context adds to the right answer: a graded score, for models whose accuracy is that of guessing.

The gain of a document, in nats: by how much its context raises the log-likelihood of the right choice, less the mean of
what it adds to the wrong ones. "Raises" is against the same choice after the last line of the prompt alone (`Answer:`,
where there is one, else nothing). A model that does not look at the context has a gain of exactly 0, however well it
knows which answers are common; one that says nothing about which is right has 0 in the mean. LAMBADA's wrong choice is
the last word of the next document.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from flexmemory.evaluate.likelihood import Request
from flexmemory.evaluate.tasks import Document, Task, TaskScore


def graded(task: Task) -> Task:
    """The requests from which `gains` are computed, as a task of that single metric.

    Each document asks for its choices, then for the same choices without the context. The first half are the task's own
    requests, so that both tasks, encoded together, cost little more than one.
    """
    documents = task.documents
    if task.name == "lambada_openai":
        following = (*documents[1:], documents[0])
        documents = tuple(
            Document((one.requests[0], Request(one.requests[0].context, other.requests[0].continuation)))
            for one, other in zip(documents, following, strict=True)
        )
    return Task(f"{task.name} gain", ("gain",), tuple(map(_with_and_without, documents)))


def _with_and_without(document: Document) -> Document:
    without = tuple(
        Request(context.rpartition("\n")[2] if "\n" in context else "", continuation)
        for context, continuation in document.requests
    )
    return dataclasses.replace(document, requests=(*document.requests, *without))


def block_means(score: TaskScore, metric: str, *, count: int) -> list[float]:
    """Means over `count` blocks of documents, in their order: enough for paired errors of any two models.

    A task of fewer documents has a block of each.
    """
    values: Float[np.ndarray, " N"] = score.documents[metric]
    blocks: Sequence[np.ndarray] = np.array_split(values, min(count, len(values)))
    return [round(float(block.mean()), 6) for block in blocks]
