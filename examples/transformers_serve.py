"""transformers' own server and command line, told of this model.

pip install "transformers[serving]"
python examples/transformers_serve.py serve models/mini-flex3 --device cpu --port 8000
curl http://localhost:8000/v1/completions -H "Content-Type: application/json" \\
    -d '{"model": "models/mini-flex3", "prompt": "The city of", "max_tokens": 16, "temperature": 0}'
"""

from __future__ import annotations

import transformers
from transformers.cli.transformers import main

from flexmemory.hf import FlexMemoryForCausalLM

if __name__ == "__main__":
    # The server looks the class that config.json names up in transformers itself, and nowhere else.
    transformers.FlexMemoryForCausalLM = FlexMemoryForCausalLM
    main()
