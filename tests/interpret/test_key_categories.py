"""Scores of keys against a slow definition, keys made for a category found, and others at the level of chance."""

import pytest
import torch

from flexmemory.interpret.key_categories import category_scores, end_ranks, key_scores

GENERATOR = torch.Generator().manual_seed(0)
CATEGORIES = [torch.randperm(400, generator=GENERATOR)[:size] for size in (5, 20, 12, 40)]


def slow_score(column: list[float], members: set[int], reach: int) -> float:
    first = sorted(range(len(column)), key=lambda i: -column[i])[: reach * len(members)]
    return len(members & set(first)) / len(members)


def test_ranks_are_places_in_order():
    points = torch.randint(-4, 5, (50, 300), generator=torch.Generator().manual_seed(1)).float()
    ranks = end_ranks(points)
    for end, sign in enumerate((1, -1)):
        for key in (0, 255, 256, 299):
            order = sorted(range(50), key=lambda i: -sign * points[i, key].item())
            assert [ranks[end, i, key].item() for i in order] == list(range(50))


@pytest.mark.parametrize("reach", [1, 3])
def test_scores_are_those_of_the_definition(reach):
    points = torch.randint(-4, 5, (400, 300), generator=torch.Generator().manual_seed(1)).float()  # many ties
    found = key_scores(category_scores(end_ranks(points), CATEGORIES, reach=reach))
    for key in range(0, 300, 7):
        column = points[:, key].tolist()
        of = {
            (sign, i): slow_score([sign * value for value in column], set(members.tolist()), reach)
            for sign in (1, -1)
            for i, members in enumerate(CATEGORIES)
        }
        assert found.score[key].item() == pytest.approx(max(of.values()))
        assert of[int(found.sign[key]), int(found.category[key])] == max(of.values())


def test_a_key_made_for_a_category_is_found_at_either_end():
    points = torch.randn(400, 6, generator=torch.Generator().manual_seed(2))
    points[CATEGORIES[3], 0] += 20
    points[CATEGORIES[1], 4] -= 20
    found = key_scores(category_scores(end_ranks(points), CATEGORIES))
    assert found.score[0] == found.score[4] == 1
    assert (found.category[0], found.sign[0]) == (3, 1)
    assert (found.category[4], found.sign[4]) == (1, -1)
    assert found.score[[1, 2, 3, 5]].max() < 0.7


def test_random_keys_are_at_the_level_of_chance():
    """Of one category and m n of N tokens at the better of two ends: a little above m n / N."""
    points = torch.randn(4000, 500, generator=torch.Generator().manual_seed(3))
    found = key_scores(category_scores(end_ranks(points), [torch.arange(400)], reach=2))
    assert 0.2 < found.score.mean() < 0.23


def test_categories_are_needed():
    for categories in ([], [torch.tensor([1]), torch.tensor([], dtype=torch.int64)]):
        with pytest.raises(ValueError, match="one or more, none of them empty"):
            category_scores(end_ranks(torch.zeros(3, 2)), categories)
