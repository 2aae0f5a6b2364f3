"""Costs are those counted by hand, add up to the accounting's, and turn over where they should."""

import dataclasses

import pytest

from flexmemory.config import ModelConfig
from flexmemory.model.accounting import row_training_bytes, train_flops_per_token
from flexmemory.presets import PRESETS
from flexmemory.train.cost import (
    Rates,
    StepPlan,
    device_bytes,
    exchange_bytes,
    exchange_rate,
    flops_per_id,
    network_bytes,
    ring_seconds,
    rows_job_pays,
    step_flops,
    step_seconds,
)

TINY = ModelConfig(
    architecture="memory", vocab_size=10, hidden_size=4, num_layers=2, num_heads=2, num_kv_heads=2, intermediate_size=8
)
"""Per layer: attention 64, FFN-M 96 and its norm 4, a norm 4; one norm more; embedding and head 40 each: 420."""
PLAN = StepPlan(batch_tokens=64, world_size=4, rank_ids=6, job_ids=9, micro_batch_tokens=8, seq_len=8)
JOB = dataclasses.replace(PLAN, rows_per="job")
RATES = Rates(matmul_flops_per_s=1e3, memory_bytes_per_s=1e3, nvlink_bytes_per_s=100.0, internode_bytes_per_s=10.0)
MODELS = ["1b-base", "1b-memory", "1b-flex3"]


def big_plan(world_size=64, **changes):
    defaults = {"batch_tokens": 2**22, "world_size": world_size, "rank_ids": 11_270, "job_ids": 55_033}
    return StepPlan(**{**defaults, **changes})


def test_network_bytes_are_those_counted_by_hand():
    kept = network_bytes(TINY, PLAN)
    assert kept == (2 * (420 + 200) * 3 / 4, 4 * 420 * 3 / 4, 0)  # FFN-M's 200 twice
    again = network_bytes(TINY, dataclasses.replace(PLAN, keep_gathered=False))
    memory, rest = 2 * (96 + 4), 420 - 2 * (96 + 4)
    assert again.gather == 2 * (2 * memory + 4 * rest) * 3 / 4  # twice a step, and twice in each of two micro-batches
    assert again.scatter == kept.scatter
    ids_rows_gradients = 8 + 3 * 4 * 2 + 3 * 4 * 4  # two layers and the embedding
    assert network_bytes(TINY, JOB).exchange == 6 * 3 / 4 * ids_rows_gradients
    halved = dataclasses.replace(JOB, gradient_bytes=2)
    assert network_bytes(TINY, halved).exchange == 6 * 3 / 4 * (ids_rows_gradients - 3 * 4 * 2)


def test_device_bytes_are_those_counted_by_hand():
    parts = device_bytes(TINY, PLAN)
    assert parts.optimizer == 12 * 420 / 4
    assert parts.weights == 2 * 420
    assert parts.gradients == 4 * (420 - 200)  # two micro-batches add up, FFN-M has one backward pass
    assert parts.rows == row_training_bytes(TINY, num_unique=6, bytes_per_number=2)
    assert parts.activations == 8 * 2 * 2 * (3 * 4 + 3 * 4 + 2 * 4)  # x, normed, attended; q, k, v; q and k turned
    assert parts.logits == 2 * 8 * 10 * 2 + 2 * 40
    assert parts.total == sum(parts)
    shared = device_bytes(TINY, JOB)
    assert shared.rows == row_training_bytes(TINY, num_unique=3, bytes_per_number=2) + 6 * 8 * (2 + 4 + 4 + 4)
    single = device_bytes(TINY, dataclasses.replace(PLAN, micro_batch_tokens=16))
    assert single.gradients == 4 * 420 / 4
    layers_apart = device_bytes(TINY, dataclasses.replace(PLAN, keep_gathered=False))
    assert layers_apart.weights == 2 * (40 + 40 + 4 + 2 * 168)


def test_activations_hold_each_models_own_ffn():
    base, memory = PRESETS["1b-base"].model, PRESETS["1b-memory"].model
    difference = device_bytes(base, big_plan()).activations - device_bytes(memory, big_plan()).activations
    assert difference == 16_384 * 24 * 2 * (2 * 2048 + 4 * 5464)
    assert device_bytes(base, big_plan()).rows == 0


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_the_accountings(name):
    config = PRESETS[name].model
    for plan in (big_plan(), big_plan(seq_len=1024), big_plan(rows_per="job")):
        flops = step_flops(config, plan)
        share = plan.computed_ids / plan.rank_tokens
        expected = train_flops_per_token(config, unique_share=share, seq_len=plan.seq_len) * plan.rank_tokens
        assert flops.total == pytest.approx(expected, rel=1e-12)
        assert flops.head == 6 * 128_256 * 2048 * plan.rank_tokens
    assert flops_per_id(config) == (18 * 2048 * config.intermediate_size * 24 if config.has_memory else 0)


def test_seconds_of_a_step_are_those_counted_by_hand():
    plan = dataclasses.replace(JOB, micro_batch_tokens=16)
    flops, network = step_flops(TINY, plan), network_bytes(TINY, plan)
    fast = dataclasses.replace(RATES, matmul_flops_per_s=flops.total / 9)  # 3 s forward, 6 s backward
    seconds = step_seconds(TINY, plan, fast)
    assert seconds.compute == pytest.approx(9)
    assert seconds.rows == 14 * 2 * 4 * 16 / 1e3
    assert seconds.exchange == network.exchange / 100
    assert seconds.weights == pytest.approx(network.gather / 100 - 3 + network.scatter / 100 - 6)
    assert seconds.total == sum(seconds)
    slow = step_seconds(TINY, plan, dataclasses.replace(RATES, matmul_flops_per_s=flops.total / 1e6))
    assert slow.weights == 0


def test_rings_share_a_nodes_links_and_exchanges_do_not():
    assert ring_seconds(1000.0, world_size=8, rates=RATES) == 1000 / 100
    assert ring_seconds(1000.0, world_size=16, rates=RATES) == 1000 / 80
    assert exchange_rate(8, rates=RATES) == 100
    assert exchange_rate(16, rates=RATES) == 10 * 15 / 8  # 8 of 15 others are in the other node
    assert exchange_rate(100_000, rates=RATES) == pytest.approx(10, rel=1e-3)
    nvlink_bound = dataclasses.replace(RATES, internode_bytes_per_s=1e6)
    assert exchange_rate(16, rates=nvlink_bound) == 100 * 15 / 7


def test_more_of_anything_costs_no_less():
    config = PRESETS["1b-memory"].model
    rates = Rates(matmul_flops_per_s=5e14, memory_bytes_per_s=4e12, nvlink_bytes_per_s=3e11, internode_bytes_per_s=5e10)
    plan = big_plan(rows_per="job")
    for more in (
        big_plan(rows_per="job", job_ids=80_000),
        big_plan(rows_per="job", rank_ids=20_000),
        big_plan(rows_per="job", batch_tokens=2**23),
    ):
        assert step_seconds(config, more, rates).total > step_seconds(config, plan, rates).total
        assert device_bytes(config, more).total >= device_bytes(config, plan).total
    assert network_bytes(config, big_plan(128)).gather > network_bytes(config, plan).gather
    assert device_bytes(config, big_plan(128)).optimizer < device_bytes(config, plan).optimizer


def test_sharing_rows_pays_above_the_bandwidth_of_the_formula_in_the_docs():
    config, ids = PRESETS["1b-memory"].model, {"rank_ids": 11_270, "job_ids": 55_040, "world_size": 64}
    rate = 5e14
    break_even = rate / (3 * 5464) / (1 - 860 / 11_270) * (63 / 64) * (25 / 24)  # the embedding beside 24 rows
    for gradient_bytes, part in ((4, 1), (2, 4 / 6)):
        for factor, pays in ((0.99, False), (1.01, True)):
            choice = rows_job_pays(
                config,
                **ids,
                matmul_flops_per_s=rate,
                exchange_bytes_per_s=break_even * part * factor,
                gradient_bytes=gradient_bytes,
            )
            assert choice.pays is pays
    assert choice.saved_s == (11_270 - 860) * 18 * 2048 * 5464 * 24 / rate
    num_bytes = exchange_bytes(config, rank_ids=11_270, world_size=64, gradient_bytes=2)
    assert choice.exchange_s == num_bytes / (break_even * 4 / 6 * 1.01)


@pytest.mark.parametrize(("name", "world_size"), [("1b-memory", 1), ("1b-base", 8)])
def test_nothing_is_shared_alone_or_without_memory(name, world_size):
    config = PRESETS[name].model
    choice = rows_job_pays(
        config, rank_ids=100, job_ids=100, world_size=world_size, matmul_flops_per_s=1e12, exchange_bytes_per_s=1e9
    )
    assert choice == (False, 0, 0)
    plan = StepPlan(batch_tokens=2**14, world_size=world_size, rank_ids=100, job_ids=100, rows_per="job")
    assert network_bytes(config, plan).exchange == 0


def test_both_forms_save_what_the_choice_says():
    """The step's two predictions differ by the choice's two times while weights move behind compute."""
    config = PRESETS["1b-flex3"].model
    rates = Rates(matmul_flops_per_s=5e14, memory_bytes_per_s=4e12, nvlink_bytes_per_s=3e11, internode_bytes_per_s=5e10)
    step, job = (step_seconds(config, big_plan(rows_per=per), rates) for per in ("step", "job"))
    choice = rows_job_pays(
        config,
        rank_ids=11_270,
        job_ids=55_033,
        world_size=64,
        matmul_flops_per_s=5e14,
        exchange_bytes_per_s=exchange_rate(64, rates=rates),
    )
    assert step.weights == job.weights == 0
    assert step.total - job.total == pytest.approx(choice.saved_s - choice.exchange_s)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_tokens": 2**22 + 2048}, "whole sequences"),
        ({"seq_len": 2**17}, "whole sequences"),
        ({"rank_ids": 60_000}, "cannot be"),
        ({"rank_ids": 100}, "cannot be"),
        ({"rank_ids": 0}, "cannot be"),
    ],
)
def test_impossible_plans_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        big_plan(**changes)
