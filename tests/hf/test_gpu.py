"""On a GPU: what transformers does with our models there, with rows computed and looked up."""

import pytest
import torch
from transformers import GenerationConfig, Trainer, TrainingArguments
from transformers.generation import ContinuousBatchingConfig

from flexmemory.model.checkpoint import Checkpoint
from flexmemory.tol.build import build_store
from tests.hf.conftest import opened

pytestmark = pytest.mark.gpu
GREEDY = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 12}
KINDS = ["nano-base", "nano-memory", "nano-flex3", "grouped-query"]


@pytest.mark.parametrize("name", KINDS)
def test_tokens_are_those_of_the_cpu(checkpoint, tokens, name):
    folder, prompt = checkpoint(name, dtype=torch.float64), tokens(2, 9)
    expected = opened(folder).generate(prompt, **GREEDY)
    for attention in ("sdpa", "eager"):
        model = opened(folder, attn_implementation=attention).cuda()
        for options in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
            assert torch.equal(model.generate(prompt.cuda(), **GREEDY, **options).cpu(), expected), options


@pytest.mark.parametrize("rows", ["disk", "host", "device"])
def test_rows_are_looked_up_for_a_gpu(checkpoint, tokens, tmp_path, rows):
    folder, prompt = checkpoint("nano-flex3"), tokens(2, 9)
    build_store(Checkpoint.open(folder), tmp_path / "tol", codec="fp32")
    computed = opened(folder).cuda()
    model = opened(folder, tol=tmp_path / "tol", rows=rows, device_map={"": "cuda"})
    assert not any(".memory." in name for name, _ in model.named_parameters())
    torch.testing.assert_close(model(prompt.cuda()).logits, computed(prompt.cuda()).logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.generate(prompt.cuda(), **GREEDY), computed.generate(prompt.cuda(), **GREEDY))


@pytest.mark.filterwarnings("ignore")  # of what PyTorch itself imports and compiles
@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention", "kernels-community/flash-attn2"])
def test_other_attention_is_that_of_sdpa_or_says_what_is_missing(checkpoint, tokens, attention):
    folder, ids = checkpoint("nano-flex3", dtype=torch.bfloat16), tokens(2, 16).cuda()
    expected = opened(folder, dtype=torch.bfloat16).cuda()(ids).logits
    try:
        model = opened(folder, dtype=torch.bfloat16, attn_implementation=attention).cuda()
    except (ImportError, ValueError, OSError) as error:
        pytest.skip(f"{attention}: {str(error)[:200]}")
    torch.testing.assert_close(model(ids).logits, expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("name", ["nano-base", "nano-flex3"])
def test_the_trainer_learns(checkpoint, tokens, tmp_path, name):
    model = opened(checkpoint(name))
    data = [{"input_ids": row, "labels": row} for row in tokens(1, 32).repeat(64, 1)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), per_device_train_batch_size=8, max_steps=20, learning_rate=3e-3,
        bf16=True, report_to=[], save_strategy="no", logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=data)  # pyright: ignore[reportArgumentType] - a list
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert next(model.parameters()).is_cuda
    assert losses[-1] < losses[0] - 1


def test_continuous_batching_generates_what_generate_does(checkpoint, tokens):
    folder = checkpoint("nano-flex3")
    plain, model = opened(folder).cuda(), opened(folder, attn_implementation="paged|sdpa").cuda()
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (3, 11, 6, 20)]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=511, pad_token_id=0)
    batching = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)
    found = model.generate_batch(prompts, generation_config=config, continuous_batching_config=batching)
    generated = {tuple(output.prompt_ids): output.generated_tokens for output in found.values()}
    for prompt in prompts:
        expected = plain.generate(torch.tensor([prompt]).cuda(), generation_config=config)[0, len(prompt) :]
        assert generated[tuple(prompt)] == expected.tolist()
