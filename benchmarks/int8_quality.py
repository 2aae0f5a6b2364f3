"""What int8 weights cost in quality: perplexity of the repository's small models, as JSON.

    python benchmarks/int8_quality.py --wikitext wiki.test.raw --out benchmarks/results/int8_quality.json

The text is tokenised as one document. Numbers are computed in fp32 but for `bf16`; where int8 decodes one token at a
time on a CPU, activations are rounded to bf16 as well, which costs what `bf16` costs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from flexmemory.cli.eval import read_text
from flexmemory.engine.int8 import Int8Linear, quantize
from flexmemory.engine.loading import load_model
from flexmemory.evaluate.perplexity import perplexity
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.provenance import provenance

MODELS = Path(__file__).parents[1] / "models"
CHOICES = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "int8 head": (torch.float32, "head"),
    "int8 all": (torch.float32, "all"),
}


def measured(checkpoint: Checkpoint, stream: np.ndarray, *, dtype: torch.dtype, int8: str | None) -> dict[str, float]:
    """Perplexity and weight bytes of one choice."""
    model = load_model(checkpoint, dtype=dtype).model
    if int8 is not None:
        quantize(model, int8)
    result = perplexity(model, stream)
    int8_bytes = sum(m.weight.nbytes + m.scale.nbytes for m in model.modules() if isinstance(m, Int8Linear))
    return {
        "perplexity": result.perplexity,
        "perplexity_stderr": result.perplexity_stderr,
        "nats_per_token": result.loss,
        "tokens": result.num_tokens,
        "int8_bytes": int8_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wikitext", type=Path, required=True, help="text file, for instance WikiText-2 raw test")
    parser.add_argument("--max-tokens", type=int, help="only the first tokens")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    results: dict[str, object] = {}
    for name in ("mini-memory", "mini-flex3"):
        checkpoint = Checkpoint.open(MODELS / name)
        stream = read_text(args.wikitext, checkpoint, split="validation", text_field="text").stream[: args.max_tokens]
        results[name] = {
            label: measured(checkpoint, stream, dtype=dtype, int8=int8) for label, (dtype, int8) in CHOICES.items()
        }
    results["provenance"] = provenance()
    args.out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
