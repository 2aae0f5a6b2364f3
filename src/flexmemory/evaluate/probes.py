"""Plug-n-play probes: scale or drop what the FFNs add, without touching the model (Table 1, Fig. 4, 7, 12)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from flexmemory.engine.reference import RowSource
from flexmemory.model.memory import ScaledRows
from flexmemory.model.transformer import DenseBlock, Transformer


def layer_alphas(num_layers: int, *, alpha: float = 1.0, drop_layers: Sequence[int] = ()) -> tuple[float, ...]:
    """A factor per layer: `alpha`, and 0 for dropped layers.

    Raises:
        ValueError: a layer to drop does not exist.
    """
    for layer in drop_layers:
        if not 0 <= layer < num_layers:
            raise ValueError(f"layer {layer} cannot be dropped: the model has layers 0 to {num_layers - 1}")
    return tuple(0.0 if layer in drop_layers else alpha for layer in range(num_layers))


@contextlib.contextmanager
def scaled_ffn(
    model: Transformer, alphas: Sequence[float], row_source: RowSource | None = None
) -> Iterator[RowSource | None]:
    """Within the block, each layer's FFN output is times its factor; yields the row source to use.

    For memory and flex models the rows are scaled (FFN-C is left alone); for the dense base the FFN's output.

    Raises:
        ValueError: there is not one factor for each layer.
    """
    if len(alphas) != model.config.num_layers:
        raise ValueError(f"expected a factor for each of {model.config.num_layers} layers, got {len(alphas)}")
    if model.config.has_memory:
        source = row_source or model.rows
        yield lambda token_ids: ScaledRows(source(token_ids), alphas)
        return

    def scale_by(alpha: float):
        return lambda _module, _inputs, output: output * alpha

    blocks = [block for block in model.blocks if isinstance(block, DenseBlock)]
    handles = [block.ffn.register_forward_hook(scale_by(alpha)) for block, alpha in zip(blocks, alphas, strict=True)]
    try:
        yield None
    finally:
        for handle in handles:
            handle.remove()
