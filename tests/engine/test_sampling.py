"""Sampling draws from the distribution that its settings define, and from the request alone."""

import numpy as np
import pytest
import torch

from flexmemory.engine.sampling import Sampling, SamplingTensors, filter_logits, how_to_sample, sample, uniforms

LOGITS = torch.tensor([[2.0, 0.0, 1.0, -1.0], [0.0, 3.0, 3.5, 1.0]])
SETTINGS = [
    Sampling(),
    Sampling(temperature=0.7, seed=3),
    Sampling(temperature=1.3, top_k=4, seed=4),
    Sampling(temperature=1.0, top_p=0.8, seed=-5),
    Sampling(top_k=2, seed=9),
    Sampling(temperature=2.0, top_k=9, top_p=0.6, seed=2**63 - 1),
]


def tensors(*settings):
    return SamplingTensors.of(settings, device="cpu")


def draws(logits, sampling, *, count=20_000):
    """Tokens that one request draws at many positions, by the least that suffices."""
    many = tensors(sampling)
    many = SamplingTensors(*(t.expand(count) for t in (many.temperature, many.top_k, many.top_p, many.seeds)))
    return sample(logits.expand(count, -1), many, torch.arange(count), sampling.how)


def test_greedy_takes_the_largest():
    assert sample(LOGITS, tensors(Sampling(), Sampling()), torch.tensor([1, 2]), "greedy").tolist() == [0, 2]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (Sampling(temperature=1.0), [[0, 1, 2, 3], [0, 1, 2, 3]]),
        (Sampling(temperature=1.0, top_k=2), [[0, 2], [1, 2]]),
        (Sampling(temperature=1.0, top_k=9), [[0, 1, 2, 3], [0, 1, 2, 3]]),
        (Sampling(temperature=1.0, top_p=0.6), [[0], [1, 2]]),  # largest probabilities: 0.64, and 0.58 + 0.35
        (Sampling(temperature=1.0, top_p=0.8), [[0, 2], [1, 2]]),
        (Sampling(temperature=1.0, top_p=1e-9), [[0], [2]]),
        (Sampling(temperature=1.0, top_k=1, top_p=0.99), [[0], [2]]),
        (Sampling(temperature=1.0, top_k=3, top_p=0.9), [[0, 2], [1, 2]]),  # of three 0.67 + 0.24, of four 0.64 + 0.24
    ],
)
def test_filters_keep_what_they_should(settings, kept):
    filtered = filter_logits(LOGITS, tensors(settings, settings))
    assert [row.isfinite().nonzero().flatten().tolist() for row in filtered] == kept
    assert torch.equal(filtered[filtered.isfinite()], LOGITS[filtered.isfinite()])


def test_top_p_is_taken_at_the_temperature():
    """Hot: the nucleus of a flatter distribution is larger."""
    settings = tensors(*(Sampling(temperature=t, top_p=0.8) for t in (0.5, 1.0, 8.0)))
    kept = filter_logits(LOGITS[:1].expand(3, -1), settings).isfinite().sum(dim=1)
    assert kept.tolist() == [1, 2, 4]


def test_all_means_all():
    """Even where the probabilities of the likely tokens sum to more than 1, by rounding."""
    logits = torch.cat((torch.zeros(1000), torch.full((5,), -30.0)))[None]
    assert logits.softmax(dim=-1)[:, :1000].double().sum() > 1
    assert filter_logits(logits, tensors(Sampling(temperature=1.0))).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (Sampling(temperature=2.0), (LOGITS[0] / 2).softmax(dim=0)),
        (Sampling(temperature=2.0, top_k=3), (torch.tensor([2.0, 0.0, 1.0, -torch.inf]) / 2).softmax(dim=0)),
        (Sampling(temperature=1.0, top_p=0.8), torch.tensor([2.0, -torch.inf, 1.0, -torch.inf]).softmax(dim=0)),
    ],
)
@pytest.mark.parametrize("seed", [0, 1, -1, 2**40])
def test_draws_follow_the_distribution(settings, expected, seed):
    """Chi-square over positions, at a level that a sound generator misses once in a million times."""
    settings = Sampling(temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p, seed=seed)
    counts = draws(LOGITS[:1], settings).bincount(minlength=4)
    possible = expected > 0
    assert not counts[~possible].any()
    expectation = 20_000 * expected[possible]
    assert ((counts[possible] - expectation) ** 2 / expectation).sum() < 31  # at most 3 degrees of freedom


def test_draws_of_neighbouring_seeds_and_positions_are_independent():
    """A 10 x 10 table of two uniforms: along positions, along seeds, and of the same sum of both."""
    numbers = torch.arange(20_000)
    fixed = torch.full_like(numbers, 7)
    pairs = {
        "positions": (uniforms(fixed, numbers), uniforms(fixed, numbers + 1)),
        "seeds": (uniforms(numbers, fixed), uniforms(numbers + 1, fixed)),
        "sums": (uniforms(numbers, fixed + 1), uniforms(numbers + 1, fixed)),
    }
    for name, (first, second) in pairs.items():
        cells = ((first * 10).long() * 10 + (second * 10).long()).bincount(minlength=100)
        assert ((cells - 200) ** 2 / 200).sum() < 180, name  # 99 degrees of freedom: mean 99, deviation 14


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_uniforms_are_splitmix64(device):
    """In numpy's uint64, from the published constants; the same bits on every device."""

    def mix(x):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    seeds = np.array([0, 1, -1, 2**63 - 1, -(2**63), 12345], dtype=np.int64)
    positions = np.array([0, 1, 2, 100, 2047, 131071], dtype=np.int64)
    counters = mix(seeds.astype(np.uint64)) + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(
        0x9E3779B97F4A7C15
    )
    expected = (mix(counters) >> np.uint64(12)).astype(np.float64) / 2.0**52
    drawn = uniforms(torch.from_numpy(seeds).to(device), torch.from_numpy(positions).int().to(device))
    assert drawn.tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_request_draws_the_same_in_any_batch(dtype):
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(0)).to(dtype) * 2
    for position in range(40):
        alone = [
            int(sample(logits[i : i + 1], tensors(one), torch.tensor([position + i]), one.how))
            for i, one in enumerate(SETTINGS)
        ]
        together = sample(logits, tensors(*SETTINGS), torch.arange(6) + position)
        assert together.tolist() == alone
        backwards = sample(logits.flip(0), tensors(*SETTINGS[::-1]), torch.arange(6).flip(0) + position)
        assert backwards.tolist() == alone[::-1]
        greedy_and_plain = sample(logits[:2], tensors(*SETTINGS[:2]), torch.arange(2) + position, "plain")
        assert greedy_and_plain.tolist() == alone[:2]


def test_temperatures_near_zero_and_huge():
    peaked, flat = Sampling(temperature=1e-40), Sampling(temperature=1e30)
    assert set(draws(LOGITS[1:], peaked, count=50).tolist()) == {2}
    assert set(draws(LOGITS[1:], flat, count=200).tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("how", ["greedy", "plain", "filtered"])
def test_any_logits_give_an_id_of_the_vocabulary(bad, how):
    """Slots that compute garbage must not break the rest."""
    settings = tensors(Sampling(), *[Sampling(temperature=1.0, top_k=2, top_p=0.5)] * 2)
    tokens = sample(torch.full((3, 5), bad), settings, torch.arange(3), how)
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < 5


def test_the_cheapest_way_is_found():
    greedy, plain, filtered = SETTINGS[4], SETTINGS[1], SETTINGS[2]
    assert how_to_sample([greedy, greedy]) == "greedy"
    assert how_to_sample([greedy, plain]) == "plain"
    assert how_to_sample([plain, filtered, greedy]) == "filtered"


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"seed": 2**63},
    ],
)
def test_impossible_settings(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Sampling(**settings)
