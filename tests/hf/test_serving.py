"""What engines that host transformers' models need: attention functions, packed sequences, continuous batching, TP."""

import datetime

import pytest
import torch
import torch.multiprocessing as mp
from torch import distributed as dist
from transformers import AttentionInterface, AutoModel, GenerationConfig, StaticCache
from transformers.distributed import DistributedConfig
from transformers.generation import ContinuousBatchingConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from flexmemory.model.checkpoint import Checkpoint
from flexmemory.tol.build import build_store
from tests.hf.conftest import opened


def test_another_attention_function_gets_all_that_the_caller_gives(checkpoint, tokens):
    """As vLLM's backend calls a base model: one packed row, positions, no cache, its own attention by layer."""
    folder, ids = checkpoint("grouped-query"), tokens(1, 9)
    called = []

    def hosted(module, query, key, value, attention_mask, *, scaling, attention_instances, **options):
        assert (module.num_key_value_groups, module.is_causal, module.training) == (2, True, False)
        called.append(attention_instances[module.layer_idx])
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, **options)

    AttentionInterface.register("hosted", hosted)
    expected = AutoModel.from_pretrained(folder)(ids).last_hidden_state
    model = AutoModel.from_pretrained(folder, attn_implementation="hosted")
    found = model(
        input_ids=ids,
        inputs_embeds=None,
        use_cache=False,
        position_ids=torch.arange(9)[None],
        attention_instances={0: "zero", 1: "one", 2: "two"},
        return_dict=False,
    )[0]
    assert called == ["zero", "one", "two"]
    torch.testing.assert_close(found, expected)


def test_the_attention_function_can_be_changed(load, tokens):
    model, ids = load("grouped-query"), tokens(2, 9)
    expected = model(ids).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_packed_sequences_do_not_see_each_other(load, tokens):
    model = load("nano-flex3")
    first, second = tokens(1, 5), tokens(1, 8, seed=1)
    positions = torch.cat((torch.arange(5), torch.arange(8)))[None]
    packed = model(torch.cat((first, second), dim=1), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed[:, :5], model(first).logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed[:, 5:], model(second).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "paged|eager"])
@pytest.mark.parametrize("rows", [None, "disk"])
def test_continuous_batching_generates_what_generate_does(checkpoint, tokens, tmp_path, rows, attention):
    folder = checkpoint("nano-flex3")
    options = {}
    if rows:
        build_store(Checkpoint.open(folder), tmp_path / "tol", codec="fp32")
        options = {"tol": tmp_path / "tol", "rows": rows}
    plain = opened(folder)
    model = opened(folder, attn_implementation=attention, **options)
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (3, 11, 6, 20)]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=511, pad_token_id=0)
    batching = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)
    found = model.generate_batch(prompts, generation_config=config, continuous_batching_config=batching)
    generated = {tuple(output.prompt_ids): output.generated_tokens for output in found.values()}
    for prompt in prompts:
        expected = plain.generate(torch.tensor([prompt]), generation_config=config)[0, len(prompt) :]
        assert generated[tuple(prompt)] == expected.tolist()


def _shard(rank: int, folders: list[str], rendezvous: str, ids: torch.Tensor, expected: list[torch.Tensor]) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    for folder, logits in zip(folders, expected, strict=True):
        model = opened(folder, distributed_config=DistributedConfig(tp_size=2))
        block = model.model.core.blocks[0]
        assert len(block.attention.qkv.weight.to_local()) == len(block.attention.qkv.weight) / 2
        torch.testing.assert_close(model(ids).logits, logits, rtol=1e-4, atol=1e-5)
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_share_a_model(checkpoint, tokens, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # where there is a GPU, each process would want its own
    folders, ids = (
        [str(checkpoint(name)) for name in ("grouped-query", "square-1", "untied", "nano-base")],
        tokens(2, 9),
    )
    expected = [opened(folder)(ids).logits.detach() for folder in folders]
    rendezvous = str(tmp_path / "rendezvous")
    # Started afresh: a forked one would inherit the process group of a test before it.
    mp.start_processes(_shard, (folders, rendezvous, ids, expected), nprocs=2, start_method="spawn")


@pytest.mark.compile
@pytest.mark.parametrize("name", ["nano-base", "nano-flex3", "ffn+table"])
@torch.no_grad()
def test_the_model_is_one_graph(load, tokens, name):
    model, ids = load(name), tokens(2, 9)
    expected = model(ids).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(ids[:, :8], past_key_values=cache)
    last = compiled(ids[:, 8:], past_key_values=cache, position_ids=torch.full((2, 1), 8)).logits
    torch.testing.assert_close(last, expected[:, 8:], rtol=1e-4, atol=1e-5)
