"""Suppression: the figures against counts by hand, and the ban."""

import dataclasses
import math

import pytest
import torch

from flexmemory.evaluate.questions import Questions
from flexmemory.evaluate.suppression import frequency_matched, measure, variants
from flexmemory.tokenizer import Tokenizer
from tests.conftest import NANO, random_model


def test_variants_are_the_single_tokens_of_words(names_tokenizer: Tokenizer):
    found = variants(["March", "cotton", "unheard-of"], names_tokenizer).tolist()
    texts = [names_tokenizer.core.decode([token]) for token in found]
    assert " March" in texts
    assert " cotton" in texts
    assert all(text.strip().lower() in {"march", "cotton"} for text in texts)
    with pytest.raises(ValueError, match="none of"):
        variants(["unheard-of"], names_tokenizer)


def test_neighbours_have_about_the_same_counts():
    counts = torch.tensor([100, 90, 50, 3, 2, 101])
    allowed = torch.tensor([True, True, True, True, False, True])
    assert frequency_matched(torch.tensor([0, 4]), counts=counts, allowed=allowed).tolist() == [5, 3]
    assert frequency_matched(torch.tensor([0, 5]), counts=counts, allowed=allowed).tolist() == [1, 2]


def test_figures_against_counts_by_hand():
    model = random_model(dataclasses.replace(NANO["nano-memory"], vocab_size=64)).requires_grad_(False)
    concept, neighbours = torch.tensor([3, 7]), torch.tensor([9])
    asking = Questions.of([[1, 2], [4]], boundary_id=0, device=torch.device("cpu"))
    text = torch.randint(64, (5, 20), generator=torch.Generator().manual_seed(0))
    found = measure(
        model, concept=concept, neighbours=neighbours, asking=asking, prompts=asking, text=text, steps=3
    )  # fmt: skip
    probs = asking.log_probs(model).exp()
    assert found.asked_mass[0] == pytest.approx(float(probs[:, concept].sum(dim=1).mean()))
    nats = torch.nn.functional.cross_entropy(
        model(text)[:, :-1].flatten(0, 1), text[:, 1:].flatten(), reduction="none"
    )  # fmt: skip
    clean = nats[~torch.isin(text[:, 1:].flatten(), concept)]
    assert found.clean_nats[0] == pytest.approx(float(clean.mean()), rel=1e-5)
    assert found.clean_perplexity == pytest.approx(math.exp(float(clean.mean())), rel=1e-5)
    assert found.neighbour_nats[0] == pytest.approx(float(nats[text[:, 1:].flatten() == 9].mean()), rel=1e-5)
    assert 0 < found.step_mass[0] < 1
    assert found == measure(
        model, concept=concept, neighbours=neighbours, asking=asking, prompts=asking, text=text, steps=3
    )  # fmt: skip


def test_a_ban_leaves_nothing_and_a_certain_token_is_hit():
    model = random_model(dataclasses.replace(NANO["nano-memory"], vocab_size=64)).requires_grad_(False)
    asking = Questions.of([[1, 2], [4]], boundary_id=0, device=torch.device("cpu"))
    text = torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(0))
    everything = torch.arange(63)
    found = measure(
        model, concept=everything, neighbours=torch.tensor([63]), asking=asking, prompts=asking, text=text, steps=2
    )  # fmt: skip
    assert found.hit[0] == 1
    banned = measure(
        model, concept=torch.tensor([3, 7]), neighbours=torch.tensor([9]), asking=asking, prompts=asking, text=text,
        ban=True, steps=2,
    )  # fmt: skip
    assert banned.asked_mass == (0, 0)
    assert banned.step_mass == (0, 0)
    assert banned.hit == (0, 0)
