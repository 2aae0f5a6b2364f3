"""The gain is what the context adds to the right answer: 0 without it, and what single requests say with it."""

import dataclasses

import numpy as np
import pytest

from flexmemory.evaluate.gain import block_means, graded
from flexmemory.evaluate.likelihood import Likelihoods, Request, encode_requests
from flexmemory.evaluate.tasks import TASKS, Document, EncodedTasks, Task, TaskScore, load_task, score_tasks, task_score
from tests.conftest import VARIED, random_model
from tests.evaluate.task_records import write_records
from tests.evaluate.test_likelihood import naive


@pytest.fixture
def folder(tmp_path):
    return write_records(tmp_path / "tasks")


def test_what_is_asked(folder):
    task = load_task("arc_easy", folder)
    first = graded(task).documents[0]
    assert first.requests[:4] == task.documents[0].requests
    assert first.requests[5] == Request("Answer:", " iron")
    for document in graded(load_task("winogrande", folder)).documents:
        assert document.requests[2] == document.requests[3]  # only the contexts differ
    one, other = (document.requests for document in load_task("lambada_openai", folder).documents)
    asked = graded(load_task("lambada_openai", folder)).documents
    assert asked[0].requests[1] == Request(one[0].context, other[0].continuation)
    assert asked[1].requests[1] == Request(other[0].context, one[0].continuation)
    assert asked[0].requests[6] == Request("", other[0].continuation)


@pytest.mark.parametrize("name", TASKS)
def test_who_does_not_look_at_the_context_gains_nothing(name, folder):
    task = graded(load_task(name, folder))
    requests = [request for document in task.documents for request in document.requests]
    prior = np.array([-float(len(request.continuation)) for request in requests])
    score = task_score(task, Likelihoods(prior, np.zeros(len(requests), dtype=bool)))
    assert score.documents["gain"].tolist() == [0.0] * len(task.documents)


def test_the_share_of_wrong_answers_that_are_raised_less():
    choices = tuple(Request("Q: x\nA:", f" {letter}") for letter in "abcd")
    document = Document(choices, 2, (1, 1, 4, 1))
    task = graded(Task("social_iqa", ("acc",), (document,) * 3))
    without = [-8.0, -1.0, -5.0, -2.0]
    with_context = [[-9.0, -2.0, -4.0, -3.0], [-7.0, -1.5, -4.0, -1.5], [-8.0, -1.0, -9.0, -2.0]]
    log_probs = np.array([number for each in with_context for number in (*each, *without)])
    score = task_score(task, Likelihoods(log_probs, np.zeros(len(log_probs), dtype=bool)))
    # Raised by 1 beside -1, -1, -1; by 1 beside 1, -0.5, 0.5; by -4 beside 0, 0, 0.
    assert score.documents["gain"] == pytest.approx([0.5, 2.5 / 3 - 0.5, -0.5])
    by_length = graded(Task("sciq", ("acc", "acc_norm"), (document,) * 3))  # the right one by a quarter
    score = task_score(by_length, Likelihoods(log_probs, np.zeros(len(log_probs), dtype=bool)))
    assert score.documents["gain"] == pytest.approx([0.5, 1 / 3 - 0.5, -0.5])


def test_encoded_with_the_task_it_equals_single_requests(folder, names_tokenizer):
    config = dataclasses.replace(VARIED["nano-memory"], vocab_size=names_tokenizer.vocab_size, max_seq_len=64)
    model = random_model(config)
    tasks = [load_task(name, folder) for name in TASKS]
    both = [*tasks, *map(graded, tasks)]
    scores = score_tasks(model, EncodedTasks.of(both, names_tokenizer, max_len=64, batch_tokens=300))
    for task in both[len(tasks) :]:
        requests = [request for document in task.documents for request in document.requests]
        answers = [naive(model, encode_requests([request], names_tokenizer)[0]) for request in requests]
        log_probs, greedy = (np.array(column) for column in zip(*answers, strict=True))
        expected = task_score(task, Likelihoods(log_probs, greedy)).documents["gain"]
        np.testing.assert_allclose(scores[task.name].documents["gain"], expected, atol=1e-10)


def test_blocks_have_the_mean_of_all():
    score = TaskScore({"gain": np.arange(12.0)})
    assert block_means(score, "gain", count=4) == [1, 4, 7, 10]
    assert block_means(score, "gain", count=40) == list(range(12))
