"""Generate text with onnxruntime and a memory-mapped ToL store: no PyTorch, no feed-forward weights.

flexmemory export onnx CHECKPOINT --out GRAPH
flexmemory tol build CHECKPOINT --out STORE
python examples/onnx_generate.py GRAPH STORE "The memory"
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

graph, store, prompt = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
interface = json.loads((graph / "interface.json").read_text())
tol = json.loads((store / "manifest.json").read_text())
same_model = tol["checkpoint_fingerprint"] == interface["checkpoint_fingerprint"]
if not same_model or tol["codec"] != "bf16" or tol["embedding"]:
    sys.exit(f"{store} is not a bf16 store, without embedding, of the model in {graph}")
layers, width, stride = tol["layers"], tol["hidden_size"], tol["stride_bytes"]
shards = [
    np.memmap(store / s["file"], np.uint8, "r", offset=s["data_offset"], shape=(s["tokens"], stride))
    for s in tol["shards"]
]
starts = [s["first_token"] for s in tol["shards"]]


def rows_of(token: int) -> np.ndarray:
    """(L, D): what each layer adds for one token, zero for layers that the store leaves out."""
    shard = int(np.searchsorted(starts, token, side="right")) - 1
    numbers = shards[shard][token - starts[shard], : 2 * len(layers) * width].view(np.uint16)
    rows = np.zeros((tol["num_layers"], width), np.float32)
    rows[layers] = (numbers.astype(np.uint32) << 16).view(np.float32).reshape(len(layers), width)  # bf16
    return rows


tokenizer = Tokenizer.from_file(str(graph / "tokenizer.json"))
boundary = json.loads((graph / "tokenizer_config.json").read_text())["bos_token"]
session = onnxruntime.InferenceSession(graph / "model.onnx")
past = np.zeros([{"batch": 1, "before": 0}.get(n, n) for n in interface["past_shape"]], np.float32)
ids = new = [tokenizer.token_to_id(boundary), *tokenizer.encode(prompt, add_special_tokens=False).ids]
for _ in range(24):
    rows = np.stack([rows_of(token) for token in new])[None]
    logits, past = session.run(None, {"token_ids": np.array([new]), "rows": rows, "past": past})
    new = [int(logits[0, -1].argmax())]
    ids = ids + new
print(tokenizer.decode(ids))
