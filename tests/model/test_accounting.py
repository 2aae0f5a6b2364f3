"""Counts equal the paper's and the model's own."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flexmemory.model.accounting import (
    count_parameters,
    decode_bytes_per_token,
    kv_cache_bytes,
    row_numbers,
    train_flops_per_token,
)
from flexmemory.model.init import new_model
from flexmemory.model.kv_cache import KVCache
from flexmemory.model.memory import MemoryRows
from flexmemory.model.transformer import Transformer
from flexmemory.presets import PRESETS
from flexmemory.tol.codec import CODECS
from tests.conftest import VARIED

SIZES = {"250m": (960, 16, 2560), "750m": (1600, 16, 4272), "1b": (2048, 32, 5464)}
FFN_M = {"250m": (2240, 1920, 1600), "750m": (3738, 3200, 2668), "1b": (4778, 4096, 3418)}
TOTAL = {"250m": 265, "750m": 737, "1b": 1208}
ACTIVE = {
    "250m": {"base": 265, "flex3": 154, "flex2": 132, "flex1": 110, "memory": 88},
    "750m": {"base": 737, "flex3": 430, "flex2": 368, "flex1": 307, "memory": 245},
    "1b": {"base": 1208, "flex3": 704, "flex2": 604, "flex1": 503, "memory": 402},
}


@pytest.mark.parametrize("name", [*VARIED, *(name for name in PRESETS if not name.startswith("nano"))])
def test_counts_add_up_to_the_model(name):
    config = VARIED.get(name) or PRESETS[name].model
    counts = count_parameters(config)
    with torch.device("meta"):
        model = Transformer(config)
    sizes = {key: parameter.numel() for key, parameter in model.named_parameters()}
    assert counts.total == sum(sizes.values())
    assert counts.memory == sum(size for key, size in sizes.items() if ".memory." in key)
    assert counts.attention == sum(size for key, size in sizes.items() if ".attention." in key)
    assert counts.ffn == sum(size for key, size in sizes.items() if ".ffn." in key or ".ffn_c." in key) - sum(
        size for key, size in sizes.items() if ".memory.ffn." in key
    )
    with torch.device("meta"):
        resident = Transformer(config, with_memory=False)
    assert counts.resident == sum(parameter.numel() for parameter in resident.parameters())


@pytest.mark.parametrize("size", SIZES)
def test_shapes_are_table_5(size):
    d, heads, cells = SIZES[size]
    for variant, k in zip(("base", "memory", "flex1", "flex2", "flex3"), (cells, cells, *FFN_M[size]), strict=True):
        config = PRESETS[f"{size}-{variant}"].model
        shape = (config.num_layers, config.hidden_size, config.num_heads, config.intermediate_size, config.vocab_size)
        assert shape == (24, d, heads, k, 128_256)
        assert not config.tie_embeddings


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", ["base", "memory", "flex1", "flex2", "flex3"])
def test_totals_and_active_counts_are_table_5(size, variant):
    """Millions as printed: rounded down, or up where FFN sizes round (d 1600 and the flex rows of 1b: within 1M)."""
    counts = count_parameters(PRESETS[f"{size}-{variant}"].model)
    assert abs(counts.backbone / 1e6 - TOTAL[size]) < 1
    assert abs(counts.active / 1e6 - ACTIVE[size][variant]) < 1


@pytest.mark.parametrize(("ratio", "ffn_c", "ffn_m"), [(1, 4.194, 29.360), (2, 8.388, 25.165), (3, 12.582, 20.971)])
def test_split_at_1b_is_table_4(ratio, ffn_c, ffn_m):
    """Table 4 prints b d^2 and (8 - b) d^2; the SwiGLU sizes that exist are within 0.2 % of that."""
    counts = count_parameters(PRESETS[f"1b-flex{ratio}"].model)
    assert counts.ffn / 24 / 1e6 == pytest.approx(ffn_c, rel=2e-3)
    assert counts.memory / 24 / 1e6 == pytest.approx(ffn_m, rel=2e-3)


def test_lookups_at_1b_are_12_6_gigabytes():
    """Sec. 2.3.2: |V| * N * d * bytes."""
    config = PRESETS["1b-memory"].model
    assert row_numbers(config) * 2 == 98_304
    row = CODECS["bf16"].row_bytes(config.num_layers, config.hidden_size)
    assert round(row * config.vocab_size / 1e9, 1) == 12.6


@pytest.mark.parametrize(("share", "bound"), [(0.116, 1.83), (0.057, 1.94), (1.0, 1.0)])
def test_flop_bound_of_unique_rows(share, bound):
    """The unique shares of 131k and 524k tokens a step of English text (docs/architecture.md)."""
    dense = train_flops_per_token(PRESETS["1b-base"].model, unique_share=1.0)
    memory = train_flops_per_token(PRESETS["1b-memory"].model, unique_share=share)
    assert dense / memory == pytest.approx(bound, abs=0.01)


def test_flops_equal_those_that_pytorch_counts():
    config = PRESETS["demo-flex2"].model
    model = new_model(config, seed=0)
    ids = torch.arange(256)[None] % 100  # 100 unique ids
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        rows = MemoryRows(model.compute_rows(torch.arange(100)), ids)
        model(ids, rows).sum().backward()
    masked_half = 3 * 2 * config.hidden_size * 256 * config.num_layers  # computed here, skipped by causal kernels
    ours = train_flops_per_token(config, unique_share=100 / 256, seq_len=256)
    assert counter.get_total_flops() / 256 == ours + masked_half


def test_decode_bytes_are_what_a_step_reads():
    config = VARIED["grouped-query"]
    counts = count_parameters(config)
    cache = kv_cache_bytes(config, context=10, bytes_per_number=2)
    assert cache == KVCache(config, batch_size=1, capacity=10, dtype=torch.bfloat16)._states.nbytes
    expected = 2 * (counts.active + counts.embedding + config.hidden_size + row_numbers(config)) + cache
    assert decode_bytes_per_token(config, context=10) == expected
