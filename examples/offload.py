"""Generate with transformers while the feed-forward memory stays on disk.

flexmemory tol build models/mini-memory --out runs/tol
python examples/offload.py --model models/mini-memory --tol runs/tol --rows disk
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import flexmemory.hf  # noqa: F401 - registers the model


def main() -> None:
    """Load without FFN-M's weights, continue prompts of different lengths together, say what is in memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/mini-memory")
    parser.add_argument("--tol", default="runs/tol")
    parser.add_argument("--rows", choices=["disk", "host", "device"], default="disk")
    parser.add_argument("--prompt", action="append", help="may be given again")
    parser.add_argument("--tokens", type=int, default=24)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(options.model, tol=options.tol, rows=options.rows)
    prompts = tokenizer(options.prompt or ["The history of", "In the"], return_tensors="pt", padding=True)
    continued = model.generate(
        **prompts,
        max_new_tokens=options.tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    for text in tokenizer.batch_decode(continued, skip_special_tokens=True):
        print(text)
    print(f"{model.get_memory_footprint() / 1e6:.1f} MB of weights in memory; rows: {options.rows}")


if __name__ == "__main__":
    main()
