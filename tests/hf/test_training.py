"""Losses, gradients, `Trainer` and PEFT."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from flexmemory.model.checkpoint import Checkpoint
from tests.hf.conftest import opened

CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)
"""Its name in this version of transformers."""


def test_the_loss_is_that_of_the_next_token(load, tokens):
    model, ids = load("nano-flex3"), tokens(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    outputs = model(ids, labels=labels)
    expected = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(outputs.loss, expected)


@pytest.mark.parametrize("name", ["nano-base", "nano-memory", "nano-flex3"])
def test_gradient_checkpointing_changes_no_gradient(load, tokens, name):
    model, ids = load(name, dtype=torch.float64), tokens(2, 9)
    plain, kept = _gradients(model, ids)
    getattr(model, f"{CHECKPOINTING}_enable")()
    again, fewer = _gradients(model, ids)
    assert plain.keys() == again.keys()
    for parameter, gradient in plain.items():
        torch.testing.assert_close(again[parameter], gradient, rtol=1e-12, atol=1e-14)
    assert fewer < 0.8 * kept  # rows are computed before the blocks


def _gradients(model: Any, ids: torch.Tensor) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients by name, and the numbers that blocks kept for the backward pass."""
    model.train()
    model.zero_grad()
    kept: list[int] = []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = model(ids, labels=ids).loss
    numbers = sum(kept)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, numbers


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_fine_tunes_and_saves_a_checkpoint(load, tokens, tmp_path, checkpointing):
    pytest.importorskip("accelerate")
    model, ids = load("nano-flex3"), tokens(8, 16)
    before = float(model(ids, labels=ids).loss.detach())
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=8,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        **{CHECKPOINTING: checkpointing},
        report_to="none",
        save_strategy="no",
        logging_steps=4,
        disable_tqdm=True,
        use_cpu=True,
    )
    data: Any = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    model.eval()
    after = float(model(ids, labels=ids).loss.detach())
    assert after < before - 0.5
    trainer.save_model(str(tmp_path / "tuned"))
    saved = Checkpoint.open(tmp_path / "tuned")
    torch.testing.assert_close(saved.load()(ids), model(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks by the old name
def test_lora_trains_attention_and_ffn_c_alone(checkpoint, tokens, tmp_path):
    peft = pytest.importorskip("peft")
    folder, ids = checkpoint("nano-flex3"), tokens(4, 12)
    model = opened(folder)
    expected = model(ids).logits
    targets = r".*\.(attention\.(qkv|output)|ffn_c\.(gate|up|down))"
    lora = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    trained = {name for name, parameter in lora.named_parameters() if parameter.requires_grad}
    assert len(trained) == 3 * 5 * 2  # layers, matrices of each, two of LoRA for each
    torch.testing.assert_close(lora(input_ids=ids).logits, expected)
    optimizer = torch.optim.AdamW((p for p in lora.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = lora(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    lora.eval()
    tuned = lora(input_ids=ids).logits
    generated = lora.generate(input_ids=ids[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    lora.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(opened(folder), tmp_path / "adapter")
    torch.testing.assert_close(again(input_ids=ids).logits, tuned)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, tuned, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(Checkpoint.open(tmp_path / "merged").load()(ids), tuned, rtol=1e-4, atol=1e-5)
    assert torch.equal(merged.generate(ids[:1], max_new_tokens=4, do_sample=False, pad_token_id=0), generated)
