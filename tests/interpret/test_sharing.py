"""Shared keys: figures against scikit-learn and slow definitions; controls that are what they say."""

import dataclasses
import itertools

import pytest
import torch
from sklearn.metrics import adjusted_mutual_info_score, roc_auc_score, v_measure_score
from torch.nn import functional as F

from flexmemory.interpret.pairs import PairSet, dissimilar, edit_distance, pair_set
from flexmemory.interpret.sharing import agreement, auroc, jaccard, pair_cosines, random_keys, sharing, top_keys
from flexmemory.interpret.tkv import TokenMemory
from flexmemory.interpret.vocabulary import Vocabulary
from tests.conftest import VARIED, random_model

SIZE = 300
CATEGORIES = {"a": [0, 3, 6, 9, 12], "b": [100, 110, 120, 130], "c": [*range(200, 207), *range(208, 213)]}


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    """Made up: odd ids are capitalised; token i occurs about i times."""
    text = tuple(f" {'Word' if i % 2 else 'thing'}{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(SIZE))
    mask = torch.arange(SIZE) % 10 != 7
    return Vocabulary(
        text=text,
        raw=tuple(each.encode() for each in text),
        shown=text,
        kind=tuple("capitalised word" if i % 2 else "word" for i in range(SIZE)),
        counts=torch.arange(SIZE) + 1,
        reachable=mask,
        undertrained=torch.zeros(SIZE, dtype=torch.bool),
        mask=mask,
    )


@pytest.fixture(scope="module")
def pairs(vocabulary) -> PairSet:
    return pair_set(vocabulary, CATEGORIES, seed=1)


def clustered(spread: float) -> torch.Tensor:
    """Points of all tokens: those of a category around a centre of its own."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(SIZE, 64, generator=generator, dtype=torch.float64)
    for members in CATEGORIES.values():
        points[members] = spread * points[members] + torch.randn(64, generator=generator, dtype=torch.float64)
    return points


@pytest.mark.parametrize(
    ("first", "second", "edits"),
    [("", "abc", 3), ("kitten", "sitting", 3), ("abc", "abc", 0), ("march", "arch", 1), ("flaw", "lawn", 2)],
)
def test_edit_distance(first, second, edits):
    assert edit_distance(first, second) == edit_distance(second, first) == edits


def test_dissimilar_strings():
    assert not dissimilar("dog", "dogs")
    assert not dissimilar("prince", "princess")
    assert not dissimilar("north", "northwestern")
    assert not dissimilar("cat", "bat")
    assert not dissimilar("go", "goalkeeper")  # one begins with the other
    assert dissimilar("dog", "puppy")


def test_all_pairs_are_there_once(pairs):
    tokens = sorted(token for members in CATEGORIES.values() for token in members)
    found = [tuple(sorted(pair)) for pair in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)]
    assert sorted(found) == list(itertools.combinations(tokens, 2))
    of = {token: i for i, members in enumerate(CATEGORIES.values()) for token in members}
    for a, b, groups in zip(pairs.first.tolist(), pairs.second.tolist(), pairs.groups.tolist(), strict=True):
        assert groups == [of[a], of[b]]
    assert int(pairs.same.sum()) == 10 + 6 + 66
    assert 0.3 < (pairs.first < pairs.second).float().mean() < 0.7
    assert not pairs.dissimilar.logical_and(pairs.same_kind).any()  # those of a kind begin alike here


def test_partners_are_matched_and_of_no_or_another_category(vocabulary, pairs):
    of = {token: name for name, members in CATEGORIES.items() for token in members}
    replaced = pairs.second[pairs.same].tolist()
    for name, partners in pairs.partners.items():
        assert len(partners) == int(pairs.same.sum())
        for token, partner in zip(replaced, partners.tolist(), strict=True):
            assert vocabulary.mask[partner]
            assert of.get(partner) != of[token]
            assert abs(partner - token) < 80  # counts are ids here
            if "kind" in name:
                assert vocabulary.kind[partner] == vocabulary.kind[token]
    kinds = {vocabulary.kind[partner] for partner in pairs.partners["frequency"].tolist()}
    assert len(kinds) == 2


def test_auroc_is_that_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(10, (500,), generator=generator) / 10  # many ties
    positive = torch.rand(500, generator=generator) < scores
    weights = torch.rand(500, generator=generator)
    assert auroc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))
    expected = roc_auc_score(positive, scores, sample_weight=weights)
    assert auroc(scores, positive, weights=weights) == pytest.approx(expected)
    assert auroc(torch.tensor([1.0, 2, 3]), torch.tensor([False, True, True])) == 1


def test_jaccard_cosines_and_top_keys():
    points = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    norms = torch.linspace(0.1, 3, 20)
    keys = top_keys(points, count=6, norms=norms)
    assert torch.equal(keys, (points.abs() * norms).argsort(dim=1, descending=True)[:, :6])
    assert not torch.equal(keys, top_keys(points, count=6))
    first, second = torch.arange(29), torch.arange(1, 30)
    sets = [set(row) for row in keys.tolist()]
    expected = [len(sets[i] & sets[i + 1]) / len(sets[i] | sets[i + 1]) for i in range(29)]
    assert jaccard(keys, first, second).tolist() == pytest.approx(expected)
    torch.testing.assert_close(pair_cosines(points, first, second), F.cosine_similarity(points[:-1], points[1:]))


def test_tokens_that_share_keys_are_seen_to(pairs):
    points = clustered(0.3)
    found = sharing(points, top_keys(points, count=8), token_ids=torch.arange(SIZE), pairs=pairs, resamples=50)
    assert found.auroc.value > 0.95
    assert found.auroc.low <= found.auroc.value <= found.auroc.high
    assert found.auroc_permuted == pytest.approx(0.5, abs=0.05)
    assert found.jaccard.low > 2 * max(each.high for each in found.jaccard_matched.values())
    expected = roc_auc_score(pairs.same, pair_cosines(points, pairs.first, pairs.second))
    assert found.auroc.value == pytest.approx(expected)
    by_category = [jaccard(top_keys(points, count=8), *torch.combinations(torch.tensor(each), 2).T).mean()
                   for each in CATEGORIES.values()]  # fmt: skip
    assert found.jaccard.value == pytest.approx(torch.stack(by_category).mean().item(), rel=1e-5)


def test_intervals_are_of_weighted_figures(pairs):
    """A category drawn m times counts m times, in both tokens of a pair where they are of two."""
    points = clustered(2.5)
    found = sharing(points, top_keys(points, count=8), token_ids=torch.arange(SIZE), pairs=pairs, resamples=40, seed=2)
    drawn = torch.randint(3, (40, 3), generator=torch.Generator().manual_seed(2))
    scores = pair_cosines(points, pairs.first, pairs.second)
    values = []
    for each in drawn:
        times = each.bincount(minlength=3).double()[pairs.groups]
        weights = torch.where(pairs.same, times[:, 0], times.prod(dim=1))
        values.append(auroc(scores, pairs.same, weights=weights))
    values = torch.tensor([each for each in values if each == each], dtype=torch.float64)  # not NaN
    assert 0.6 < found.auroc.value < 0.99
    assert found.auroc.low == pytest.approx(values.quantile(0.025).item())
    assert found.auroc.high == pytest.approx(values.quantile(0.975).item())


def test_tokens_that_do_not_are_not(pairs):
    points = torch.randn(SIZE, 64, generator=torch.Generator().manual_seed(3))
    found = sharing(points, top_keys(points, count=8), token_ids=torch.arange(SIZE), pairs=pairs, resamples=50)
    assert found.auroc.value == pytest.approx(0.5, abs=0.1)
    chance = found.jaccard_matched["frequency"]
    assert found.jaccard.value == pytest.approx(chance.value, abs=0.03)
    again = sharing(points, top_keys(points, count=8), token_ids=torch.arange(SIZE), pairs=pairs, resamples=50)
    assert again == found


def test_only_some_tokens_are_points(pairs):
    """As where tokens are left out: ids are not places."""
    points = clustered(0.3)
    kept = torch.cat([torch.arange(0, SIZE, 2), *pairs.partners.values(), pairs.first, pairs.second]).unique()
    keys = top_keys(points, count=8)
    assert len(kept) < SIZE
    part = sharing(points[kept], keys[kept], token_ids=kept, pairs=pairs, resamples=20)
    whole = sharing(points, keys, token_ids=torch.arange(SIZE), pairs=pairs, resamples=20)
    assert part == whole


def test_agreement_is_that_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    clusters = torch.randint(5, (400,), generator=generator)
    names = ["", "x", "y", "z"]
    classes = [names[int(cluster) % 4] for cluster in clusters]
    found = agreement(clusters, classes)
    chosen = [i for i, each in enumerate(classes) if each]
    truth = [classes[i] for i in chosen]
    assert found.tokens == len(chosen)
    assert found.classes == 3
    assert found.ami == pytest.approx(adjusted_mutual_info_score(truth, clusters[chosen].numpy()))
    assert found.v_measure == pytest.approx(v_measure_score(truth, clusters[chosen].numpy()))
    assert found.permuted_ami == pytest.approx(0, abs=0.03)
    with pytest.raises(ValueError, match="no token has a class"):
        agreement(clusters, [""] * 400)


def test_random_keys_are_of_the_same_size_and_nothing_else_changes():
    model = random_model(VARIED["nano-flex1"])
    changed = random_keys(model, seed=1)
    for (name, before), after in zip(model.named_parameters(), changed.parameters(), strict=True):
        drawn = "memory.ffn" in name and ("gate" in name or "up" in name)
        assert torch.equal(before, after) != drawn, name
        if drawn:
            assert after.square().mean().item() == pytest.approx(before.square().mean().item(), rel=0.1)
    ids = torch.arange(20)
    assert torch.equal(TokenMemory(model).queries(ids, layer=1), TokenMemory(changed).queries(ids, layer=1))
    with pytest.raises(ValueError, match="a free table has no keys"):
        random_keys(random_model(VARIED["table"]))


def test_what_cannot_be_paired(vocabulary):
    with pytest.raises(ValueError, match="two categories or more"):
        pair_set(vocabulary, {"a": [1, 2]})
    with pytest.raises(ValueError, match="a token is in two categories"):
        pair_set(vocabulary, {"a": [1, 2], "b": [2, 3]})
    with pytest.raises(ValueError, match="outside the vocabulary's mask"):
        pair_set(vocabulary, {"a": [1, 7], "b": [2, 3]})
    with pytest.raises(ValueError, match="need counts"):
        pair_set(dataclasses.replace(vocabulary, counts=None), CATEGORIES)
