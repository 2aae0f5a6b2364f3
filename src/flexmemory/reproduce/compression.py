"""Rows in fewer bits (Table 7) and of lower rank (Table 8), and the spectra of the tables of rows (Fig. 13)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from flexmemory.model.memory import MemoryRows
from flexmemory.reproduce.runs import Run
from flexmemory.reproduce.study import Job, Study, reference
from flexmemory.tol.build import ModelRows
from flexmemory.tol.fit import fit
from flexmemory.tol.plan import store_bytes
from flexmemory.tol.rise import coded_rows

CODECS = ("bf16", "int8", "int4")
KEPT_RANK = (0.9, 0.8, 0.7, 0.6, 0.5)
"""The paper's cuts of 10 to 50 %; in bf16."""


def jobs(study: Study) -> dict[str, Job]:
    """Codecs and ranks over texts and tasks, then singular values."""
    found: dict[str, Job] = {}
    for size, run in reference(study, ["memory", "flex3"]):
        name = f"{size.family}-{run.variant}"
        width = study.checkpoint(run).config.hidden_size
        for codec in (*CODECS, *(f"svd{round(width * share)}" for share in KEPT_RANK)):
            found[f"{name} {codec}"] = functools.partial(_coded, run=run, codec=codec)
        found[f"{name} spectra"] = functools.partial(_spectra, run=run)
    return found


def table_of(study: Study, run: Run) -> Tensor:
    """The embedding and the rows of the whole vocabulary, (V, 1 + L, D), on the CPU."""
    source = ModelRows(study.checkpoint(run), device="cpu")
    vocab_size = study.checkpoint(run).config.vocab_size
    return torch.cat([source(ids) for ids in torch.arange(vocab_size).split(1024)]).clone()


def _coded(study: Study, run: Run, codec: str) -> dict[str, Any]:
    model, table = study.load(run), table_of(study, run)
    vocab, layers = model.config.vocab_size, model.config.num_layers
    scheme = fit(
        codec, lambda ids: table[ids], vocab_size=vocab, hidden_size=model.config.hidden_size, layers=range(layers)
    )
    rows = torch.zeros_like(table[:, 1:])
    rows[:, list(scheme.layers)] = coded_rows(scheme, lambda ids: table[ids], torch.arange(vocab))
    rows = rows.to(model.device)
    facts = {
        "size": run.size.family,
        "variant": run.variant,
        "codec": codec,
        "bytes": store_bytes(scheme, num_layers=layers).total,
        "bf16_bytes": 2 * rows.numel(),
    }
    return facts | study.judge(model, lambda ids: MemoryRows(rows, ids.to(model.device), fixed=True))


def _spectra(study: Study, run: Run) -> dict[str, Any]:
    table = table_of(study, run)[:, 1:]
    values = [torch.linalg.svdvals(table[:, layer].double()) for layer in range(table.shape[1])]
    shares = [(value.square().cumsum(0) / value.square().sum()) for value in values]
    return {
        "size": run.size.family,
        "variant": run.variant,
        "singular_values": [[round(number, 5) for number in value.tolist()] for value in values],
        "rank_of_90_percent": [int((share < 0.9).sum()) + 1 for share in shares],
        "rank_of_99_percent": [int((share < 0.99).sum()) + 1 for share in shares],
    }
