"""`generate` and caches: every way equals the plain one."""

import pytest
import torch
from transformers import AutoTokenizer, DynamicCache, GenerationConfig, StaticCache

from flexmemory.engine.reference import generate as reference
from flexmemory.model.checkpoint import Checkpoint
from tests.hf.conftest import MINI, opened

NAMES = ["nano-base", "nano-memory", "nano-flex3", "grouped-query"]
GREEDY = {"do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_the_reference_loops(checkpoint, tokens, name):
    folder, prompt = checkpoint(name), tokens(1, 9)
    expected = list(reference(Checkpoint.open(folder).load(), prompt[0].tolist(), max_new_tokens=12))
    model = opened(folder)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}):
        found = model.generate(prompt, max_new_tokens=12, **GREEDY, **options)
        assert found[0, 9:].tolist() == expected, options


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["nano-flex3", "grouped-query"])
def test_left_padding_changes_nothing(load, tokens, name, attention):
    model, ids = load(name, attn_implementation=attention), tokens(1, 11)
    alone = model(ids).logits
    padded = torch.cat((torch.full((1, 6), 5), ids), dim=1)
    seen = torch.cat((torch.zeros(1, 6, dtype=torch.int64), torch.ones_like(ids)), dim=1)
    positions = (seen.cumsum(1) - 1).clamp(min=0)
    beside = model(
        torch.cat((padded, tokens(1, 17, seed=3))),
        attention_mask=torch.cat((seen, torch.ones_like(seen))),
        position_ids=torch.cat((positions, torch.arange(17)[None])),
    ).logits
    torch.testing.assert_close(beside[:1, 6:], alone, rtol=1e-4, atol=1e-5)
    # RoPE is relative: positions counted from the pads on give the same.
    shifted = model(padded, attention_mask=seen).logits
    torch.testing.assert_close(shifted[:, 6:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_padded_batch_generates_what_each_prompt_does(load, tokens, cache):
    model = load("nano-flex3")
    prompts = [tokens(1, length, seed=length) for length in (5, 9, 12)]
    expected = [model.generate(prompt, max_new_tokens=10, **GREEDY)[0, prompt.shape[1] :] for prompt in prompts]
    batch = torch.cat([torch.nn.functional.pad(prompt, (12 - prompt.shape[1], 0), value=7) for prompt in prompts])
    mask = torch.stack([(torch.arange(12) >= 12 - prompt.shape[1]).long() for prompt in prompts])
    found = model.generate(batch, attention_mask=mask, max_new_tokens=10, cache_implementation=cache, **GREEDY)
    assert torch.equal(found[:, 12:], torch.stack(expected))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_gives_the_logits_of_the_whole(load, tokens, kind):
    model, ids = load("grouped-query"), tokens(2, 16)
    whole = model(ids).logits
    cache = (
        DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=20)
    )
    parts = [
        model(ids[:, start:stop], past_key_values=cache, cache_position=torch.arange(start, stop)).logits
        for start, stop in ((0, 7), (7, 8), (8, 13), (13, 16))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_a_cropped_cache_goes_on_as_a_shorter_one(load, tokens):
    model, ids = load("nano-flex3"), tokens(1, 12)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    cache.crop(-4)
    torch.testing.assert_close(model(ids[:, 8:], past_key_values=cache).logits, model(ids).logits[:, 8:])


def test_beams_are_those_of_a_search_without_cache(load, tokens):
    model, prompt = load("nano-flex3"), tokens(2, 6)
    beams = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 8, **GREEDY}
    assert torch.equal(model.generate(prompt, **beams), model.generate(prompt, use_cache=False, **beams))


def test_an_assistant_changes_no_token():
    model = opened(MINI / "mini-flex3", dtype=torch.float32)
    assistant = opened(MINI / "mini-memory", dtype=torch.float32)
    prompt = AutoTokenizer.from_pretrained(MINI / "mini-flex3")("The capital of the country", return_tensors="pt")
    plain = model.generate(**prompt, max_new_tokens=8, **GREEDY)
    assert torch.equal(model.generate(**prompt, assistant_model=assistant, max_new_tokens=8, **GREEDY), plain)
    lookup = model.generate(**prompt, prompt_lookup_num_tokens=3, max_new_tokens=8, **GREEDY)
    assert torch.equal(lookup, plain)


def test_samples_depend_on_the_seed_alone(load, tokens):
    model, prompt = load("nano-memory"), tokens(2, 6)
    config = GenerationConfig(do_sample=True, temperature=0.8, top_p=0.9, max_new_tokens=8, pad_token_id=0)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(model.generate(prompt, generation_config=config))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_what_a_model_can_say_beside_logits(load, tokens):
    model, ids = load("nano-flex3", attn_implementation="eager"), tokens(2, 7)
    outputs = model(ids, output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in outputs.hidden_states] == [(2, 7, model.config.hidden_size)] * 4
    assert torch.equal(outputs.hidden_states[0], model.get_input_embeddings()(ids))
    assert torch.equal(model.lm_head(outputs.hidden_states[-1]), outputs.logits)
    assert [weights.shape for weights in outputs.attentions] == [(2, model.config.num_heads, 7, 7)] * 3
    torch.testing.assert_close(outputs.attentions[0].sum(-1), torch.ones(2, model.config.num_heads, 7))
    assert torch.equal(model(ids, logits_to_keep=2).logits, outputs.logits[:, -2:])
    assert torch.equal(model(ids, logits_to_keep=torch.tensor([1, 5])).logits, outputs.logits[:, [1, 5]])
    assert outputs.past_key_values.get_seq_length() == 7
    assert model(ids, use_cache=False).past_key_values is None
    assert torch.equal(model(ids, return_dict=False)[0], outputs.logits)
