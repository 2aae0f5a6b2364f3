"""How all rows of a model are written: which codings, for which tokens, and the tensors that they need.

Tokens may be divided into bands by frequency, each with codings of its own: rows are then stored in the order of
frequency, and `order` says which token is where. A scheme is made by `tol.fit` (one codec for all) or `tol.plan` (a
budget), and `tol.build` writes rows by it. Dimension key: U tokens, P slices of a row, D model width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int8, Int64, UInt8
from torch import Tensor

from flexmemory.tol.coding import Coding, SliceTensors, decode_slice, encode_slice

_SHARED = ("mean", "basis", "codebook", "analysis")
"""Tensors of a slice that all bands share; the others are of one band."""
_ENCODER = ("analysis", "weight")
_DTYPES = {"analysis": torch.float32, "weight": torch.float32, "gain": torch.bfloat16}
"""As stored, where not fp16. Codes are chosen for gains as they are stored, so that few digits do."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Band:
    """Tokens whose rows are written alike."""

    tokens: int
    """How many."""
    slices: tuple[Coding | None, ...]
    """The coding of each slice in the row's order; None where the slice is dropped."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's rows, before padding."""
        return sum(coding.nbytes for coding in self.slices if coding)

    def offsets(self) -> tuple[int, ...]:
        """The byte of a row at which each slice starts."""
        offsets, at = [], 0
        for coding in self.slices:
            offsets.append(at)
            at += coding.nbytes if coding else 0
        return tuple(offsets)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """How rows are written."""

    codec: str
    """A name for it: that of the codec, or `planned`."""
    layers: tuple[int, ...]
    """The model's layers in a row, in the row's order: the first is the last to drop."""
    embedding: bool
    """Whether a row begins with the token's input embedding."""
    hidden_size: int
    """D."""
    bands: tuple[Band, ...]
    """The most frequent tokens first."""
    tensors: tuple[tuple[SliceTensors, ...], ...]
    """What each slice of each band is coded with: `tensors[band][slice]`."""
    order: Int64[Tensor, " V"] | None = None
    """The token at each place; None where rows are in the order of ids."""
    feedback: Mapping[int, Mapping[int, Float[Tensor, "D D"]]] = dataclasses.field(default_factory=dict)
    """What an error of a layer's row takes off the rows of later layers: `feedback[layer][later] @ error`. The residual
    stream keeps an error, so later rows can make up for part of it; decoding does not know."""
    encoder: tuple[tuple[SliceTensors, ...], ...] | None = None
    """What codes are chosen for, where that is not `tensors`: these can be tuned for given codes."""

    @property
    def num_slices(self) -> int:
        """P."""
        return self.embedding + len(self.layers)

    @property
    def vocab_size(self) -> int:
        """V."""
        return sum(band.tokens for band in self.bands)

    def encode(self, rows: Float[Tensor, "U P D"], band: int) -> UInt8[Tensor, "U row_bytes"]:
        """Rows of tokens of one band as bytes."""
        codings, tensors = self.bands[band].slices, (self.encoder or self.tensors)[band]
        targets = {place: rows[:, place].float() for place in range(self.num_slices)}
        places = {layer: self.embedding + number for number, layer in enumerate(self.layers)}
        parts: list[Tensor] = [rows.new_empty((len(rows), 0), dtype=torch.uint8)] * self.num_slices
        in_model_order = ([0] if self.embedding else []) + [places[layer] for layer in sorted(places)]
        for place in in_model_order:
            coding, layer = (
                codings[place],
                None if self.embedding and place == 0 else self.layers[place - self.embedding],
            )
            target = targets[place]
            if coding is None:
                decoded = torch.zeros_like(target)
            else:
                parts[place] = encode_slice(target, coding, tensors[place])
                if layer not in self.feedback:
                    continue
                decoded = decode_slice(parts[place], coding, tensors[place])
            for later, matrix in self.feedback.get(-1 if layer is None else layer, {}).items():
                if later in places:
                    targets[places[later]] = targets[places[later]] - (decoded - target) @ matrix.T
        return torch.cat(parts, dim=1)

    def decode(self, data: UInt8[Tensor, "U row_bytes"], band: int) -> Float[Tensor, "U P D"]:
        """The rows that bytes of one band hold, slice by slice: the reference of `tol.decoder`."""
        codings = self.bands[band].slices
        rows = torch.zeros((len(data), len(codings), self.hidden_size), device=data.device)
        for place, (coding, offset) in enumerate(zip(codings, self.bands[band].offsets(), strict=True)):
            if coding is not None:
                part = data[:, offset : offset + coding.nbytes]
                rows[:, place] = decode_slice(part, coding, self.tensors[band][place])
        return rows

    def moved(self, device: torch.device | str) -> Scheme:
        """The same with its tensors on another device."""
        there: dict[int, Tensor] = {}  # by the id of what is here: bands share most tensors

        def to(tensors: SliceTensors) -> SliceTensors:
            values = {field.name: getattr(tensors, field.name) for field in dataclasses.fields(tensors)}
            for value in values.values():
                if value is not None and id(value) not in there:
                    there[id(value)] = value.to(device)
            return SliceTensors(**{name: None if v is None else there[id(v)] for name, v in values.items()})

        return dataclasses.replace(
            self,
            tensors=tuple(tuple(map(to, band)) for band in self.tensors),
            encoder=self.encoder and tuple(tuple(map(to, band)) for band in self.encoder),
            feedback={
                layer: {later: matrix.to(device) for later, matrix in matrices.items()}
                for layer, matrices in self.feedback.items()
            },
        )


def as_stored(scheme: Scheme) -> tuple[tuple[SliceTensors, ...], ...]:
    """A scheme's tensors as a reader of the store gets them, with what encoding needs beside."""
    stored = tensors_to_file(scheme.tensors, encoder=True)
    return tensors_from_file(stored, bands=scheme.bands, hidden_size=scheme.hidden_size)


def bands_to_json(bands: Sequence[Band]) -> list[dict[str, Any]]:
    """What a manifest or plan says of bands."""
    return [
        {"tokens": band.tokens, "slices": [coding and coding.to_json() for coding in band.slices]} for band in bands
    ]


def bands_from_json(values: Sequence[Mapping[str, Any]]) -> tuple[Band, ...]:
    """The inverse of `bands_to_json`.

    Raises:
        ValueError: a coding is unknown.
    """
    return tuple(
        Band(
            tokens=int(band["tokens"]),
            slices=tuple(None if coding is None else Coding.from_json(coding) for coding in band["slices"]),
        )
        for band in values
    )


def tensors_to_file(tensors: Sequence[Sequence[SliceTensors]], *, encoder: bool) -> dict[str, Tensor]:
    """Named tensors as stored: bases in 4 or 8 bits with a scale for each coefficient, gains in bf16, others in fp16.

    Args:
        tensors: Of each slice of each band.
        encoder: Whether to add what only encoding needs, in fp32.
    """
    stored: dict[str, Tensor] = {}
    for band, slices in enumerate(tensors):
        for place, values in enumerate(slices):
            for field in dataclasses.fields(values):
                value: Tensor | None = getattr(values, field.name)
                if value is None or (field.name in _ENCODER and not encoder):
                    continue
                name = f"{field.name}.{place}" if field.name in _SHARED else f"{field.name}.{place}.{band}"
                if name in stored:
                    continue
                if field.name == "basis":
                    stored[name], stored[f"basis_scale.{place}"] = (part.cpu() for part in pack_basis(value))
                else:
                    stored[name] = value.to(_DTYPES.get(field.name, torch.float16)).cpu()
    return {name: value.contiguous() for name, value in stored.items()}


def tensors_from_file(
    stored: Mapping[str, Tensor], *, bands: Sequence[Band], hidden_size: int
) -> tuple[tuple[SliceTensors, ...], ...]:
    """The inverse of `tensors_to_file`, up to its rounding.

    Raises:
        KeyError: a coding lacks a tensor that it needs.
    """
    slices = len(bands[0].slices)
    shared: list[dict[str, Tensor]] = []
    for place in range(slices):
        values = {name: stored[f"{name}.{place}"].float() for name in _SHARED if f"{name}.{place}" in stored}
        if "basis" in values:
            values["basis"] = unpack_basis(stored[f"basis.{place}"], stored[f"basis_scale.{place}"])
        shared.append(values)
    tensors = tuple(
        tuple(
            SliceTensors(
                **shared[place],
                **{
                    name: stored[f"{name}.{place}.{band}"].float()
                    for name in ("gain", "weight")
                    if f"{name}.{place}.{band}" in stored
                },
            )
            for place in range(slices)
        )
        for band in range(len(bands))
    )
    for number, band in enumerate(bands):
        for place, coding in enumerate(band.slices):
            if coding is not None:
                _check(coding, tensors[number][place], hidden_size, where=f"slice {place} of band {number}")
    return tensors


def round_basis(basis: Float[Tensor, "R D"], *, bits: int) -> Float[Tensor, "R D"]:
    """The basis as a store holds it in 4 or 8 bits, so that coefficients can be those of it."""
    largest = (1 << (bits - 1)) - 1
    scale = basis.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / largest
    return (basis / scale).round() * scale


def pack_basis(
    basis: Float[Tensor, "R D"],
) -> tuple[Int8[Tensor, "R D"] | UInt8[Tensor, "R half"], Float[Tensor, "R 1"]]:
    """Whole numbers of 8 bits and the scale of each row; of 4 bits, two in a byte, where these hold it exactly."""
    largest = basis.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
    few = basis / largest * 7
    if basis.shape[1] % 2 == 0 and bool((few - few.round()).abs().max() < 1e-3):
        whole = (few.round() + 8).to(torch.uint8)
        return whole[:, ::2] | whole[:, 1::2] << 4, largest / 7
    return (basis / (largest / 127)).round().to(torch.int8), largest / 127


def unpack_basis(
    stored: Int8[Tensor, "R D"] | UInt8[Tensor, "R half"], scale: Float[Tensor, "R 1"]
) -> Float[Tensor, "R D2"]:
    """The inverse of `pack_basis`."""
    if stored.dtype == torch.int8:
        return stored.float() * scale
    return (torch.stack((stored & 15, stored >> 4), dim=2).flatten(1).float() - 8) * scale


def _check(coding: Coding, tensors: SliceTensors, hidden_size: int, *, where: str) -> None:
    """Refuse tensors that do not fit a coding."""
    count = coding.num_coefficients
    width = count if coding.basis else hidden_size
    shapes: dict[str, tuple[tuple[int, ...], Tensor | None]] = {
        "mean": ((hidden_size,), tensors.mean),
        "gain": ((count,), tensors.gain),
        "basis": ((count, hidden_size), tensors.basis if tensors.basis is None else tensors.basis[:count]),
        "codebook": ((count // coding.vector, 256, coding.vector), tensors.codebook),
    }
    if count != width or coding.basis != (tensors.basis is not None):
        raise KeyError(f"{where} has {count} coefficients of {hidden_size} numbers, and needs a basis")
    if coding.levels == "pq" and tensors.codebook is None:
        raise KeyError(f"{where} needs a codebook")
    for name, (shape, tensor) in shapes.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise KeyError(f"{where}: {name} has shape {list(tensor.shape)}, expected {list(shape)}")
