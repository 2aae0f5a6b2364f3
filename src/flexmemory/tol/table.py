"""What each codec costs in each layer and band of tokens: a table for people, predicted and, on request, measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from flexmemory.model.transformer import Transformer
from flexmemory.tol.fit import RowSource, band_sizes, fit, gather_statistics
from flexmemory.tol.plan import draw_sample
from flexmemory.tol.rise import DecodedRows, compare_rises
from flexmemory.tol.scheme import Scheme, as_stored
from flexmemory.tol.sensitivity import Sensitivity

CODECS = ("int8", "int4", "int3", "int2", "normal4", "normal2", "drop")


@torch.inference_mode()
def sensitivity_table(
    source: RowSource,
    sensitivity: Sensitivity,
    *,
    counts: Int64[Tensor, " V"],
    model: Transformer,
    windows: Int64[Tensor, "B T"] | None = None,
    codecs: Sequence[str] = CODECS,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Rises of the perplexity in per cent where one layer alone is coded.

    Args:
        source: Where rows come from.
        sensitivity: What errors cost.
        counts: How often each token occurs.
        model: To measure with.
        windows: A text to measure on; only predicted without one.
        codecs: Names of codecs; `drop` leaves the layer out.
        seed: Of the sample of tokens.
        device: Where rows are coded.
    """
    sensitivity = sensitivity.moved(device)
    layers, width = sensitivity.blocks.shape[0], sensitivity.blocks.shape[2]
    tokens = band_sizes(len(counts))
    order = counts.argsort(descending=True, stable=True)
    sample = draw_sample(source, sensitivity, counts=counts, order=order, tokens=tokens, seed=seed)
    statistics = gather_statistics(
        source, places=range(1, layers + 1), sizes=[len(counts)], weights=counts.double() + 0.5, device=device
    )
    predicted: dict[str, list[list[float]]] = {}
    measured: dict[str, list[dict[str, float]]] = {}
    for codec in codecs:
        scheme = None
        if codec != "drop":
            scheme = fit(
                codec,
                source,
                vocab_size=len(counts),
                hidden_size=width,
                layers=range(layers),
                counts=counts,
                statistics=statistics,
                device=device,
            )
            scheme = (scheme if codec in ("bf16", "fp32") else _stored(scheme)).moved(device)
        decoded = torch.zeros_like(sample.rows)
        for part in torch.arange(len(decoded)).split(4096):
            if scheme is not None:
                decoded[part] = scheme.decode(scheme.encode(sample.rows[part], 0), 0)
        predicted[codec] = []
        for layer in range(layers):
            error = decoded[:, layer] - sample.rows[:, layer]
            cost = ((error @ sensitivity.blocks[layer, 0]) * error).sum(1) * sample.share
            predicted[codec].append([50 * float(cost[sample.of(band)].sum()) for band in range(len(tokens))])
        if windows is not None:
            measured[codec] = _measured(source, scheme, model=model, windows=windows, device=device)
    table: dict[str, Any] = {
        "unit": "per cent of perplexity",
        "bands": list(tokens),
        "predicted (codec, layer, band)": predicted,
    }
    return table | ({"measured (codec, layer)": measured} if windows is not None else {})


def _stored(scheme: Scheme) -> Scheme:
    return dataclasses.replace(scheme, tensors=as_stored(scheme))


def _measured(
    source: RowSource,
    scheme: Scheme | None,
    *,
    model: Transformer,
    windows: Int64[Tensor, "B T"],
    device: torch.device | str,
) -> list[dict[str, float]]:
    """The rise of each layer alone."""
    layers = range(model.config.num_layers)

    def rows_of(layer: int) -> DecodedRows:
        def rows(ids: Tensor) -> Tensor:
            exact = source(ids)[:, 1:].to(device, torch.float32)
            exact[:, layer] = 0 if scheme is None else scheme.decode(scheme.encode(exact, 0), 0)[:, layer]
            return exact

        return rows

    found = compare_rises(model, windows, {str(layer): rows_of(layer) for layer in layers}, layers=layers)
    return [{"rise": found[str(layer)].percent, "stderr": found[str(layer)].percent_stderr} for layer in layers]
