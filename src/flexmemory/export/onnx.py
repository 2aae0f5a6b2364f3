"""A model as an ONNX graph whose rows are an input: the table stays outside, on whatever storage a device has.

The graph holds attention, FFN-C, embedding and head; FFN-M is not in it. Its interface, with B sequences, T new tokens
and P tokens before them:

    token_ids  (B, T)              int64
    rows       (B, T, L, D)        float32   what a ToL store holds of each token, layer by layer
    past       (L, 2, B, G, P, E)  float32   keys and values of the tokens before; P may be 0
    logits     (B, T, V)           float32
    present    (L, 2, B, G, P+T, E)          the next call's past

Dimension key: L layers, D model width, V vocabulary, G key and value heads, E head width.
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from flexmemory.config import to_dict
from flexmemory.model.checkpoint import Checkpoint
from flexmemory.model.memory import MemoryRows
from flexmemory.model.transformer import Transformer
from flexmemory.storage import atomic_folder, write_json

GRAPH = "model.onnx"
FORMAT_VERSION = 1


class _Past:
    """Keys and values as values: what is appended makes a new tensor."""

    def __init__(self, past: Float[Tensor, "L 2 B G P E"]) -> None:
        self._past = past
        self.layers: list[Tensor] = []

    def get_seq_length(self) -> int:
        return self._past.shape[-2]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, /) -> tuple[Tensor, Tensor]:
        keys = torch.cat((self._past[layer_idx, 0], key_states), dim=2)
        values = torch.cat((self._past[layer_idx, 1], value_states), dim=2)
        self.layers.append(torch.stack((keys, values)))
        return keys, values


class RowGraph(nn.Module):
    """The forward pass as a function of tensors alone."""

    def __init__(self, model: Transformer) -> None:
        """Wrap `model`, whose own memory is not used."""
        super().__init__()
        self.model = model

    def forward(
        self,
        token_ids: Int64[Tensor, "B T"],
        rows: Float[Tensor, "B T L D"],
        past: Float[Tensor, "L 2 B G P E"],
    ) -> tuple[Float[Tensor, "B T V"], Float[Tensor, "L 2 B G S E"]]:
        """Logits, and keys and values of all tokens so far."""
        batch, length = token_ids.shape
        cache = _Past(past)
        here = torch.arange(batch * length, device=rows.device).view(batch, length)
        positions = (cache.get_seq_length() + torch.arange(length, device=rows.device)).expand(batch, length)
        logits = self.model(token_ids, MemoryRows(rows.flatten(0, 1), here), cache, positions)
        return logits, torch.stack(cache.layers)


def export_onnx(checkpoint: Checkpoint, out: Path) -> None:
    """Write the folder `out`: the graph, its interface as JSON, and the tokenizer.

    Args:
        checkpoint: A memory or flex model.
        out: A folder that does not exist.

    Raises:
        ValueError: the model is dense: it has no rows.
        ImportError: onnxscript is not installed.
        FileExistsError: `out` exists.
    """
    config = checkpoint.config
    if not config.has_memory:
        raise ValueError(f"{checkpoint.path} is a dense model: it has no rows to give to a graph")
    if importlib.util.find_spec("onnxscript") is None:
        raise ImportError("exporting needs onnx and onnxscript: pip install 'flexmemory[export]'")
    graph = RowGraph(checkpoint.load(memory=False, dtype=torch.float32).requires_grad_(False))
    sizes = (config.num_layers, 2, 2, config.num_kv_heads, 5, config.head_size)
    example = (
        torch.zeros(2, 3, dtype=torch.int64),
        torch.zeros(2, 3, config.num_layers, config.hidden_size),
        torch.zeros(sizes),
    )
    batch, length, before = (torch.export.Dim(name) for name in ("batch", "length", "before"))
    with atomic_folder(out) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, of deprecations inside it
        torch.onnx.export(
            graph,
            example,
            folder / GRAPH,
            dynamo=True,
            input_names=["token_ids", "rows", "past"],
            output_names=["logits", "present"],
            dynamic_shapes=({0: batch, 1: length}, {0: batch, 1: length}, {2: batch, 4: before}),
            external_data=True,
            verbose=False,
        )
        if checkpoint.tokenizer_fingerprint:
            checkpoint.tokenizer().save(folder)
        interface = {
            "format": "flexmemory-onnx",
            "format_version": FORMAT_VERSION,
            "checkpoint_fingerprint": checkpoint.fingerprint,
            "past_shape": [config.num_layers, 2, "batch", config.num_kv_heads, "before", config.head_size],
            "config": to_dict(config),
        }
        write_json(folder / "interface.json", interface)
