"""Plan how rows are coded so that a store fits a byte budget and the loss rises as little as can be.

    PLAN/
      plan.json           bands, codings, bytes, predicted and measured rise, fingerprints; written last
      plan.safetensors    what rows are encoded and decoded with (`tol.scheme`)

A plan is made in passes: transforms are fitted to what is to be written, bytes are allocated, rows are coded with
errors fed back to later layers, which changes what is to be written. One half of the calibration text says what errors
cost, the other half measures the rise. Dimension key: V vocabulary, U tokens, B windows, T tokens, L layers, D width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from flexmemory.model.checkpoint import Checkpoint
from flexmemory.storage import atomic_folder, read_json, write_json
from flexmemory.tol.allocate import HEADER, Allocation, Choice, Sizes, allocate, at_price
from flexmemory.tol.coding import WIDTHS
from flexmemory.tol.fit import CHUNK_TOKENS, RowSource, band_sizes, check_finite
from flexmemory.tol.format import DATA_OFFSET, ToLMismatchError
from flexmemory.tol.layout import layout_of
from flexmemory.tol.rise import Rise
from flexmemory.tol.scheme import Scheme, as_stored, bands_from_json, bands_to_json, tensors_from_file, tensors_to_file
from flexmemory.tol.sensitivity import Feedback, Sensitivity
from flexmemory.tol.transform import BASIS_POWER, Sample, Transform, coded, fed_back, fit_transform, make_scheme

FORMAT = "flexmemory-tol-plan"
FORMAT_VERSION = 1
PLAN = "plan.json"
TENSORS = "plan.safetensors"
_CHOOSING = "encoder."
"""Begins the names of tensors that codes are chosen for, where others decode them."""
PASSES = 4
SAMPLE_BYTES = 2**30
"""Of rows that plans are made with, at most."""
LEAST_WINDOWS = 32
"""Of the calibration text: half of them for the error bar."""

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreBytes:
    """Bytes of a store's files that depend on a scheme."""

    rows: int
    """Of the files of rows, headers included."""
    tensors: int
    """Of what they are decoded with."""
    order: int
    """Of the list of which token is where."""

    @property
    def total(self) -> int:
        """Of all."""
        return self.rows + self.tensors + self.order


def store_bytes(scheme: Scheme, *, num_layers: int) -> StoreBytes:
    """Bytes of the store that `tol.build` writes by a scheme, manifest and counts apart."""
    manifest = layout_of(
        vocab_size=scheme.vocab_size,
        hidden_size=scheme.hidden_size,
        num_layers=num_layers,
        codec=scheme.codec,
        embedding=scheme.embedding,
        layers=scheme.layers,
        scheme=scheme,
    )
    order = 0 if scheme.order is None else len(save({"order": scheme.order.to(torch.int32)}))
    return StoreBytes(
        rows=sum(map(manifest.shard_bytes, manifest.shards)),
        tensors=len(save(tensors_to_file(scheme.tensors, encoder=False))),
        order=order,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A scheme, and what is known of it."""

    scheme: Scheme
    size: StoreBytes
    predicted: float
    """Rise of the loss in nats a token, by the quadratic estimate on the tokens that the plan was made with."""


def make_plan(
    source: RowSource,
    sensitivity: Sensitivity,
    *,
    counts: Int64[Tensor, " V"],
    budget_bytes: int,
    embedding: bool = False,
    basis: bool | None = None,
    low_rank: bool = False,
    feedback: bool = True,
    passes: int = PASSES,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Plan:
    """Choose codings for all layers and bands.

    Args:
        source: Where rows come from: the embedding, then all layers.
        sensitivity: What errors of rows cost.
        counts: How often each token occurs in text like that of interest.
        budget_bytes: Of the store (`store_bytes`).
        embedding: Whether rows begin with the input embedding, in bf16.
        basis: Whether layers have bases; by default both ways are tried.
        low_rank: Whether coefficients are bf16 numbers, so that only their number is chosen.
        feedback: Whether errors are fed back to later layers.
        passes: How often transforms and widths are fitted.
        seed: Of the sample of tokens, where not all fit in memory.
        device: Where all is computed; the scheme is on the CPU.

    Raises:
        ValueError: the budget is too small, or a row is not finite.
    """
    layers, width = sensitivity.blocks.shape[0], sensitivity.blocks.shape[2]
    tokens = band_sizes(len(counts))
    order = counts.argsort(descending=True, stable=True)
    sensitivity = sensitivity.moved(device)
    sample = draw_sample(source, sensitivity, counts=counts, order=order, tokens=tokens, seed=seed)
    back = _rounded(sensitivity.feedback()) if feedback else sensitivity.alone()
    names = sorted(range(layers), key=lambda layer: -_drop_cost(sample, sensitivity, layer))
    fixed = len(tokens) * DATA_OFFSET + len(save({"order": order.to(torch.int32)})) + HEADER
    sizes = Sizes(
        tokens=tokens,
        width=width,
        fixed=fixed + embedding * 2 * width * len(counts),
        widths=(16,) if low_rank else WIDTHS,
    )
    best: tuple[float, Scheme] | None = None
    for kind in _basis_bits(basis, low_rank=low_rank):
        targets = sample.rows
        sizes = dataclasses.replace(sizes, basis_bits=kind)
        for number in range(passes):
            power = 1.0 if low_rank else BASIS_POWER
            transforms = [
                fit_transform(targets[:, layer], sample, layer, back.cost[layer], basis=kind, power=power)
                for layer in range(layers)
            ]

            def scheme_of(
                allocation: Allocation,
                transforms: Sequence[Transform] = transforms,
                targets: Float[Tensor, "U L D"] = targets,
            ) -> Scheme:
                made = make_scheme(
                    transforms, allocation, targets, sample, tokens=tokens, layers=names, order=order,
                    embedding=embedding, feedback=back,
                )  # fmt: skip
                return dataclasses.replace(made, tensors=as_stored(made))

            scheme = _within(budget_bytes, [transform.choice for transform in transforms], sizes, scheme_of)
            decoded = coded(scheme, sample)
            targets = fed_back(sample.rows, decoded, back)
            predicted = float(sensitivity.rise(decoded - sample.rows, sample.share))
            logger.info(
                "pass %d, %d bits a number of bases: predicted rise of the perplexity %.4f %%",
                number + 1, kind, 100 * predicted,
            )  # fmt: skip
            if best is None or predicted < best[0]:
                best = predicted, scheme
    assert best is not None
    scheme = best[1].moved("cpu")
    return Plan(scheme=scheme, size=store_bytes(scheme, num_layers=layers), predicted=best[0])


def _basis_bits(basis: bool | None, *, low_rank: bool) -> tuple[int, ...]:
    """Bits of the numbers of bases to try; 0 is no basis."""
    if low_rank:
        return (8,)
    return {None: (4, 0), True: (4,), False: (0,)}[basis]


def _within(
    budget_bytes: int, choices: Sequence[Choice], sizes: Sizes, scheme_of: Callable[[Allocation], Scheme]
) -> Scheme:
    """The scheme of the best allocation that fits the budget to the byte."""
    target = budget_bytes
    for _ in range(20):
        allocation = allocate(choices, sizes, budget_bytes=target)
        if allocation is None:
            break
        scheme = scheme_of(allocation)
        excess = store_bytes(scheme, num_layers=len(choices)).total - budget_bytes
        if excess <= 0:
            return scheme
        target -= excess
    smallest = store_bytes(scheme_of(at_price(choices, sizes, price=1e30)), num_layers=len(choices)).total
    raise ValueError(f"a budget of {budget_bytes:,} bytes is too small; the smallest possible is {smallest:,} bytes")


def draw_sample(
    source: RowSource,
    sensitivity: Sensitivity,
    *,
    counts: Int64[Tensor, " V"],
    order: Int64[Tensor, " V"],
    tokens: Sequence[int],
    seed: int,
    sample_bytes: int = SAMPLE_BYTES,
) -> Sample:
    """All rows, or as many of each band as memory allows, which then stand for the others; where `sensitivity` is.

    Raises:
        ValueError: a row is not finite.
    """
    layers, width = sensitivity.blocks.shape[0], sensitivity.blocks.shape[2]
    most = max(1, sample_bytes // (4 * layers * width) // len(tokens))
    share = (counts.double() + 0.5) / float(counts.sum() + 0.5 * len(counts))
    generator = torch.Generator().manual_seed(seed)
    ids, shares, bands, first = [], [], [], 0
    for band, size in enumerate(tokens):
        members = order[first : first + size]
        first += size
        drawn = members if size <= most else members[torch.randperm(size, generator=generator)[:most].sort().values]
        ids.append(drawn)
        shares.append(share[drawn] * (share[members].sum() / share[drawn].sum()))
        bands.append(torch.full((len(drawn),), band))
    chosen, device = torch.cat(ids), sensitivity.blocks.device
    rows = []
    for part in chosen.split(CHUNK_TOKENS):
        found = source(part)[:, 1:].to(device, torch.float32)
        check_finite(found, part, places=range(1, layers + 1))
        rows.append(found)
    return Sample(
        rows=torch.cat(rows),
        share=torch.cat(shares).to(device, torch.float32),
        band=torch.cat(bands),
        factor=_factors(sensitivity, ids).to(device),
    )


def _factors(sensitivity: Sensitivity, ids: Sequence[Tensor]) -> Float[Tensor, "bands L"]:
    """What errors cost at the tokens of each band, relative to all; 1 where the text says little of a band."""
    overall = sensitivity.token_squares.sum(0) / max(1, sensitivity.positions)
    factors = []
    for members in ids:
        positions = int(sensitivity.token_counts[members].sum())
        mean = sensitivity.token_squares[members].sum(0) / max(1, positions)
        trust = positions / (positions + 1000)
        factors.append(trust * mean / overall.clamp(min=1e-30) + 1 - trust)
    return torch.stack(factors)


def _drop_cost(sample: Sample, sensitivity: Sensitivity, layer: int) -> float:
    rows = sample.rows[:, layer]
    return float((sample.share * ((rows @ sensitivity.blocks[layer, 0]) * rows).sum(1)).sum())


def _rounded(feedback: Feedback) -> Feedback:
    """With matrices as a plan's file holds them, so that it encodes as was measured."""
    matrices = {
        layer: {later: matrix.half().float() for later, matrix in each.items()}
        for layer, each in feedback.matrices.items()
    }
    return Feedback(cost=feedback.cost, matrices=matrices)


def save_plan(folder: Path, plan: Plan, checkpoint: Checkpoint, *, extra: dict[str, Any]) -> None:
    """Write a plan to the new folder `folder`, with what else is to be said of it.

    Raises:
        FileExistsError: `folder` exists.
        OSError: a file could not be written.
    """
    scheme = plan.scheme
    tensors = tensors_to_file(scheme.tensors, encoder=scheme.encoder is None)
    if scheme.order is not None:
        tensors["order"] = scheme.order.to(torch.int32)
    if scheme.encoder is not None:
        tensors |= {_CHOOSING + name: each for name, each in tensors_to_file(scheme.encoder, encoder=True).items()}
    for layer, matrices in scheme.feedback.items():
        tensors |= {f"feedback.{layer}.{later}": matrix.half().contiguous() for later, matrix in matrices.items()}
    with atomic_folder(folder) as partial:
        try:
            save_file(tensors, partial / TENSORS)
        except SafetensorError as error:
            raise OSError(f"could not write {TENSORS} ({error}); is the disk full?") from error
        values = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "checkpoint_fingerprint": checkpoint.fingerprint,
            "tensors_sha256": hashlib.sha256((partial / TENSORS).read_bytes()).hexdigest(),
            "bytes": {**dataclasses.asdict(plan.size), "total": plan.size.total},
            "layers": list(scheme.layers),
            "embedding": scheme.embedding,
            "hidden_size": scheme.hidden_size,
            "predicted_rise": plan.predicted,
            **extra,
            "bands": bands_to_json(scheme.bands),
        }
        write_json(partial / PLAN, json.loads(json.dumps(values)))


def rise_to_json(rise: Rise) -> dict[str, Any]:
    """What a plan's file says of a measurement."""
    return {**dataclasses.asdict(rise), "perplexity_percent": rise.percent, "percent_stderr": rise.percent_stderr}


def load_plan(folder: Path, checkpoint: Checkpoint) -> Scheme:
    """The scheme of a plan that was made for `checkpoint`.

    Raises:
        FileNotFoundError: there is no plan in `folder`.
        ToLMismatchError: it is for another checkpoint.
        ValueError: it is damaged, or needs a newer version.
    """
    if not (folder / PLAN).is_file():
        raise FileNotFoundError(f"no plan in {folder}: expected {PLAN}; run `flexmemory tol plan`")
    values = read_json(folder / PLAN)
    if values.get("format") != FORMAT:
        raise ValueError(f"{folder} is not a ToL plan: its {PLAN} does not say {FORMAT!r}")
    if values.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has plan format {values.get('format_version')!r}; this version reads {FORMAT_VERSION}: "
            "update flexmemory"
        )
    if values.get("checkpoint_fingerprint") != checkpoint.fingerprint:
        raise ToLMismatchError(f"{folder} is a plan for another checkpoint than {checkpoint.path}; make one for it")
    try:
        data = (folder / TENSORS).read_bytes()
        if hashlib.sha256(data).hexdigest() != values["tensors_sha256"]:
            raise ValueError(f"{folder / TENSORS} does not match its checksum; make the plan again")
        return _scheme(values, load_file(folder / TENSORS))
    except (KeyError, TypeError, SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{folder} is damaged: missing or ill-typed entry ({error}); make the plan again") from error


def _scheme(values: dict[str, Any], stored: dict[str, Tensor]) -> Scheme:
    bands = bands_from_json(values["bands"])
    choosing = {name.removeprefix(_CHOOSING): each for name, each in stored.items() if name.startswith(_CHOOSING)}
    feedback: dict[int, dict[int, Tensor]] = {}
    for name, matrix in stored.items():
        if name.startswith("feedback."):
            layer, later = map(int, name.split(".")[1:])
            feedback.setdefault(layer, {})[later] = matrix.float()
    return Scheme(
        codec="planned",
        layers=tuple(values["layers"]),
        embedding=values["embedding"],
        hidden_size=values["hidden_size"],
        bands=bands,
        tensors=tensors_from_file(stored, bands=bands, hidden_size=values["hidden_size"]),
        order=stored["order"].long() if "order" in stored else None,
        feedback=feedback,
        encoder=tensors_from_file(choosing, bands=bands, hidden_size=values["hidden_size"]) if choosing else None,
    )
