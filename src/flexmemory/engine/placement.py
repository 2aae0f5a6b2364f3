"""What lives where: weights, KV cache and rows, over the memory of a device, of the host, and the disk.

A function of numbers: nothing is allocated. Sizes are exact but for the workspace, which is an estimate.
"""

from __future__ import annotations

import dataclasses
import re

import torch
from jaxtyping import Int64
from torch import Tensor

from flexmemory.config import ModelConfig
from flexmemory.engine.int8 import Int8Part, int8_names
from flexmemory.model.accounting import kv_cache_bytes, row_numbers
from flexmemory.model.transformer import Transformer
from flexmemory.tol.tiers import Where

PREFILL_TOKENS = 2048
"""Tokens of a prompt computed at once, at most."""
_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for suffix, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT", start=1)
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Bytes that may be used."""

    device: int
    """Memory of the device that the model runs on; for a CPU, all memory."""
    host: int | None
    """Host memory beside a GPU; None where the model runs on a CPU."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StoreFacts:
    """What a placement depends on of a ToL store."""

    row_bytes: int
    """Bytes of one token's rows as numbers."""
    disk_bytes: int
    """Bytes of all rows on disk."""
    vocab_size: int
    """V."""
    embedding: bool
    """Whether a row carries the input embedding, so that the model does without that table."""
    counts: Int64[Tensor, " V"] | None = None
    """How often each token occurs, where known."""
    coded: CodedFacts | None = None
    """Where rows are in few bits."""

    @property
    def table_bytes(self) -> int:
        """Bytes of all rows in memory."""
        return self.vocab_size * self.row_bytes if self.coded is None else self.coded.table_bytes

    @property
    def stored_row_bytes(self) -> int:
        """Bytes of one token's rows as they are stored, the most where they differ."""
        return self.row_bytes if self.coded is None else self.coded.row_bytes


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CodedFacts:
    """What a placement depends on of rows in few bits."""

    row_bytes: int
    """Bytes of one token's rows as they are stored, the most where they differ."""
    table_bytes: int
    """Bytes of all rows in memory."""
    decoder_bytes: int
    """Bytes on the device of what they are decoded with, and of where each is."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One thing that takes memory."""

    name: str
    place: Where
    nbytes: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """A plan that fits its budget."""

    items: tuple[Item, ...]
    budget: Budget
    rows: Where | None
    """Where all rows are; None where they are computed, or the model has none."""
    hot_rows: int
    """Rows of frequent tokens kept on the device beside `rows`."""
    store: StoreFacts | None

    def used(self, place: Where) -> int:
        """Bytes in `place`."""
        return sum(item.nbytes for item in self.items if item.place == place)

    @property
    def hot_share(self) -> float | None:
        """Share of tokens whose rows are in the hot set, by the store's counts; None where there are none."""
        if self.store is None or self.store.counts is None or not self.hot_rows:
            return None
        counts = self.store.counts.sort(descending=True).values
        return float(counts[: self.hot_rows].sum()) / max(1, int(counts.sum()))

    def table(self) -> str:
        """The plan as aligned text."""
        notes = {"hot rows": f"{self.hot_rows:,} rows" if self.hot_share is None else self._hot_note()}
        lines = [
            f"{item.name:<12}{item.place:<8}{format_size(item.nbytes):>11}  {notes.get(item.name, '')}".rstrip()
            for item in self.items
        ]
        lines.append(_total("device", self.used("device"), self.budget.device))
        if self.budget.host is not None:
            lines.append(_total("host", self.used("host"), self.budget.host))
        return "\n".join(lines)

    def _hot_note(self) -> str:
        return f"{self.hot_rows:,} rows, {self.hot_share:.1%} of tokens"


def place(
    config: ModelConfig,
    *,
    budget: Budget,
    dtype: torch.dtype,
    store: StoreFacts | None = None,
    rows: Where | None = None,
    int8: Int8Part | None = None,
    sequences: int = 1,
    length: int | None = None,
) -> Placement:
    """Decide what lives where: rows as near as they fit, and frequent ones in what is left of a GPU's memory.

    On a CPU rows stay on disk unless `rows` says otherwise: the page cache keeps those in use while memory is free.

    Args:
        config: The model.
        budget: What may be used.
        dtype: Of weights, KV cache and computation.
        store: The rows to look up; without it they are computed from weights on the device.
        rows: Where all rows are to be; by default the planner chooses.
        int8: What of the weights is int8.
        sequences: Sequences at once.
        length: Their longest length; by default the model's.

    Raises:
        ValueError: it does not fit, or rows are given a place without a store.
    """
    if rows is not None and store is None:
        raise ValueError(f"rows on {rows} need a ToL store: give one, or leave the place of rows out")
    length = length or config.max_seq_len
    carried = store is not None and store.embedding
    weights, embedding = weight_bytes(config, dtype=dtype, int8=int8, memory=store is None, embedding=not carried)
    required = [
        Item(name="weights", place="device", nbytes=weights),
        Item(name="embedding", place="device", nbytes=embedding),
        Item(name="KV cache", place="device", nbytes=sequences * _cache_bytes(config, dtype, length)),
        Item(name="workspace", place="device", nbytes=_workspace_bytes(config, dtype, store, sequences, length)),
    ]
    if store is not None and store.coded is not None:
        required.append(Item(name="decoder", place="device", nbytes=store.coded.decoder_bytes))
    needed = sum(item.nbytes for item in required)
    if needed > budget.device:
        parts = ", ".join(f"{item.name} {format_size(item.nbytes)}" for item in required if item.nbytes)
        remedies = _remedies(config, dtype=dtype, store=store, int8=int8)
        raise ValueError(
            f"the memory budget of {format_size(budget.device)} is too small: {parts} make {format_size(needed)}; "
            f"raise it to that, take fewer or shorter sequences{remedies}"
        )
    items = [item for item in required if item.nbytes]
    if store is None:
        return Placement(items=tuple(items), budget=budget, rows=None, hot_rows=0, store=None)
    placed = _place_rows(store, rows, budget=budget, left=budget.device - needed, length=length)
    table = next(item for item in placed if item.name == "rows")
    plan = Placement(items=(*items, *placed), budget=budget, rows=table.place, hot_rows=0, store=store)
    return plan if budget.host is None or table.place == "device" else _with_hot_rows(plan, _hot_rows(plan, store))


def weight_bytes(
    config: ModelConfig, *, dtype: torch.dtype, int8: Int8Part | None, memory: bool, embedding: bool
) -> tuple[int, int]:
    """Bytes of weights but the embedding, and of the embedding; a head tied to it counts as the embedding."""
    with torch.device("meta"):
        model = Transformer(config, with_memory=memory, with_embedding=embedding)
    table = 0 if model.embedding is None else model.embedding.weight.numel() * dtype.itemsize
    total = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize - table
    for name in int8_names(model, int8):
        weight = model.get_parameter(f"{name}.weight")
        replaced = 0 if model.embedding is not None and weight is model.embedding.weight else dtype.itemsize
        total += weight.numel() * (1 - replaced) + 4 * len(weight)
    return total, table


def parse_size(text: str) -> int:
    """Bytes of a size such as `800MB`, `2GiB` or `123456`.

    Raises:
        ValueError: it is no such size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise ValueError(f"{text!r} is no size; expected a number of bytes, or for instance 800MB or 2GiB")
    return int(float(match[1]) * units[match[2].lower()])


def format_size(nbytes: int) -> str:
    """A size for people, in decimal units."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if nbytes >= factor:
            return f"{nbytes / factor:,.2f} {unit}"
    return f"{nbytes} B"


def _place_rows(store: StoreFacts, rows: Where | None, *, budget: Budget, left: int, length: int) -> list[Item]:
    """The rows in the nearest place that they fit, or in the one asked for."""
    size = store.table_bytes
    staging = 2 * min(length, PREFILL_TOKENS) * store.stored_row_bytes
    on_cpu = budget.host is None
    options: dict[Where, tuple[list[Item], int]] = {
        "device": ([Item(name="rows", place="device", nbytes=size)], left),
        "host": ([Item(name="rows", place="host", nbytes=size)], budget.host or 0),
        "disk": (
            [
                Item(name="rows", place="disk", nbytes=store.disk_bytes),
                Item(name="staging", place="host", nbytes=staging),
            ],
            budget.host or 0,
        ),
    }
    if on_cpu:  # one memory: host rows are device rows, and rows are read to where they are used
        options["host"] = options["device"]
        options["disk"] = (options["disk"][0][:1], left)
    wanted: list[Where] = [rows] if rows is not None else ["disk"] if on_cpu else ["device", "host", "disk"]
    refusals = []
    for where in wanted:
        items, limit = options[where]
        takes = sum(item.nbytes for item in items if item.place != "disk")
        if takes <= limit:
            return items
        refusals.append(f"{where} takes {format_size(takes)} of {format_size(limit)} left")
    remedy = "; give more memory or another place for rows" if rows is not None else "; give more host memory"
    raise ValueError(f"there is no room for rows: {', '.join(refusals)}{remedy}")


def _hot_rows(plan: Placement, store: StoreFacts) -> int:
    """Rows that fit in what is left of the device, of tokens that occur."""
    left = plan.budget.device - plan.used("device") - _slot_bytes(store)
    known = store.vocab_size if store.counts is None else int((store.counts > 0).sum())
    return max(0, min(known, left // store.row_bytes))


def _with_hot_rows(plan: Placement, hot_rows: int) -> Placement:
    assert plan.store is not None
    items = tuple(item for item in plan.items if item.name != "hot rows")
    if hot_rows:
        nbytes = hot_rows * plan.store.row_bytes + _slot_bytes(plan.store)
        items += (Item(name="hot rows", place="device", nbytes=nbytes),)
    return dataclasses.replace(plan, items=items, hot_rows=hot_rows)


def _slot_bytes(store: StoreFacts) -> int:
    """The place of each id in the hot set (`tol.hot.HotSet.slot`)."""
    return 4 * store.vocab_size


def _total(where: Where, used: int, limit: int) -> str:
    return f"{'total':<12}{where:<8}{format_size(used):>11}  of {format_size(limit)}"


def _cache_bytes(config: ModelConfig, dtype: torch.dtype, length: int) -> int:
    return kv_cache_bytes(config, context=length, bytes_per_number=dtype.itemsize)


def _workspace_bytes(
    config: ModelConfig, dtype: torch.dtype, store: StoreFacts | None, sequences: int, length: int
) -> int:
    """An estimate: activations of a chunk of a prompt, its rows, and logits with two fp32 copies for sampling."""
    cells = config.intermediate_size if config.architecture == "dense" or store is None else 0
    if config.architecture == "flex":
        cells = max(cells, config.ffn_c_size)
    activations = (8 * config.hidden_size + 3 * cells) * dtype.itemsize
    rows = row_numbers(config) * dtype.itemsize + (store.row_bytes if store else 0)
    if store is not None and store.coded is not None:  # as they are stored, beside what they are decoded to
        rows += store.stored_row_bytes
    return min(length, PREFILL_TOKENS) * (activations + rows) + sequences * config.vocab_size * (dtype.itemsize + 8)


def _remedies(config: ModelConfig, *, dtype: torch.dtype, store: StoreFacts | None, int8: Int8Part | None) -> str:
    """What else would make the model smaller, and by how much."""
    choices: list[tuple[str, Int8Part | None, bool, bool]] = []
    carried = store is not None and store.embedding
    if int8 != "all":
        choices.append(("int8 weights", "all", store is None, not carried))
    if store is None and config.has_memory:
        choices.append(("a ToL store", int8, False, True))
    if not carried and config.has_memory and not config.tie_embeddings:
        choices.append(("a ToL store that carries the embedding", int8, False, False))
    now = sum(weight_bytes(config, dtype=dtype, int8=int8, memory=store is None, embedding=not carried))
    text = ""
    for label, part, memory, embedding in choices:
        then = sum(weight_bytes(config, dtype=dtype, int8=part, memory=memory, embedding=embedding))
        text += f", or {label} (saves {format_size(now - then)})"
    return text
