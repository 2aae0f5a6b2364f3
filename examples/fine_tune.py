"""Fine-tune a model with transformers' Trainer: all weights, or low-rank adapters on attention and FFN-C.

    python examples/fine_tune.py --model models/mini-flex3 --text README.md --out runs/tuned [--lora]

What it writes without --lora is a checkpoint of flexmemory as well, for `flexmemory tol build` for one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import flexmemory.hf  # noqa: F401 - registers the model

LORA_TARGETS = r".*\.(attention\.(qkv|output)|ffn_c\.(gate|up|down))"


def main() -> None:
    """Train, say how the loss went, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/mini-flex3")
    parser.add_argument("--text", nargs="+", type=Path, default=[Path("README.md")])
    parser.add_argument("--out", type=Path, default=Path("runs/tuned"))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--lora", action="store_true", help="train adapters of rank 8 and leave the weights")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    if options.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, target_modules=LORA_TARGETS, task_type="CAUSAL_LM"))
    data = sequences(tokenizer, options.text, length=options.length)
    arguments = TrainingArguments(
        output_dir=str(options.out / "trainer"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=options.lr,
        logging_steps=max(1, options.steps // 5),
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    before = loss(trainer, data)
    trainer.train()
    print(f"loss on {len(data)} sequences: {before:.3f} before, {loss(trainer, data):.3f} after")
    model.save_pretrained(options.out / "model")
    tokenizer.save_pretrained(options.out / "model")
    print(f"saved {options.out / 'model'}")


def sequences(tokenizer, paths: list[Path], *, length: int) -> list[dict[str, Tensor]]:
    """The texts' ids, cut into sequences; each text begins with the boundary token, as in training."""
    ids: list[int] = []
    for path in paths:
        ids += [tokenizer.bos_token_id, *tokenizer(path.read_text(encoding="utf-8"))["input_ids"]]
    count = len(ids) // length
    if count == 0:
        raise SystemExit(f"the texts have {len(ids)} tokens, fewer than one sequence of {length}: give more text")
    return [{"input_ids": row, "labels": row} for row in torch.tensor(ids[: count * length]).view(count, length)]


def loss(trainer: Trainer, data: list[dict[str, Tensor]]) -> float:
    """Mean loss over the sequences."""
    return trainer.evaluate(data)["eval_loss"]


if __name__ == "__main__":
    main()
