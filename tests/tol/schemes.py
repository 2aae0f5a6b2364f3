"""Schemes with everything that rows can be coded by, and random rows in their bytes."""

import torch

from flexmemory.tol.coding import PLAIN, Coding, Levels, SliceTensors, coding_of
from flexmemory.tol.scheme import Band, Scheme


def mixed(*runs: tuple[int, int], group: int | None = None, basis: bool = False, levels: Levels = "normal") -> Coding:
    """Codes in runs of widths."""
    count = sum(count for _, count in runs)
    return Coding(levels=levels, widths=runs, group=count if group is None else group, basis=basis)


def tensors_of(coding: Coding | None, width: int, *, mean: bool, shared: SliceTensors | None = None) -> SliceTensors:
    """Random tensors for a coding, those that bands share from `shared`."""
    if coding is None:
        return SliceTensors() if shared is None else SliceTensors(mean=shared.mean, basis=shared.basis)
    count = coding.num_coefficients
    basis, codebook = None, None
    if coding.basis:
        basis = torch.linalg.qr(torch.randn(width, width)).Q if shared is None else shared.basis
    if coding.levels == "pq":
        codebook = torch.randn(count // coding.vector, 256, coding.vector) if shared is None else shared.codebook
    return SliceTensors(
        mean=(torch.randn(width) if shared is None else shared.mean) if mean else None,
        gain=None if coding.levels in PLAIN else torch.rand(count) + 0.5,
        basis=basis,
        codebook=codebook,
    )


def scheme_of(
    *bands: tuple[int, list[Coding | None]], width: int, means: bool = True, embedding: bool = False
) -> Scheme:
    """A scheme of (tokens, codings) for each band; every other slice has a mean."""
    first: list[SliceTensors | None] = [None] * len(bands[0][1])
    tensors = []
    for _, codings in bands:
        of_band = []
        for place, coding in enumerate(codings):
            of_slice = tensors_of(coding, width, mean=means and place % 2 == 0, shared=first[place])
            first[place] = first[place] or (of_slice if coding else None)
            of_band.append(of_slice)
        tensors.append(tuple(of_band))
    tokens = sum(count for count, _ in bands)
    return Scheme(
        codec="planned",
        layers=tuple(range(len(bands[0][1]) - embedding)),
        embedding=embedding,
        hidden_size=width,
        bands=tuple(Band(tokens=count, slices=tuple(codings)) for count, codings in bands),
        tensors=tuple(tensors),
        order=torch.randperm(tokens) if len(bands) > 1 else None,
    )


def several_bands(width: int = 48) -> Scheme:
    """Four bands: numbers as they are, runs of widths, bases, a trellis and dropped slices."""
    rank, half = width - 5, width // 16 * 8 + width % 8 // 2
    return scheme_of(
        (5, [
            coding_of("bf16", width), mixed((8, rank), basis=True), coding_of("fp32", width), coding_of("int4", width),
        ]),
        (40, [
            mixed((5, 7), (3, width - 7)), mixed((6, 9), (4, 12), (2, rank - 21), basis=True),
            coding_of("normal3", width), coding_of("nf4", width),
        ]),
        (36, [mixed((3, 13), (1, width - 13), group=16), mixed((4, 12), basis=True), coding_of("bf16", width), None]),
        (31, [
            mixed((3, half), (1, width - half), levels="trellis"),
            mixed((5, 8), (2, 9), (1, 6), basis=True, levels="trellis"), None,
            mixed((6, 4), (2, width - 12), (1, 8), group=16, levels="trellis"),
        ]),
        width=width,
    )  # fmt: skip


def one_codec(codec: str, width: int, *, slices: int = 3, tokens: int = 30) -> Scheme:
    """One codec for all slices."""
    return scheme_of((tokens, [coding_of(codec, width)] * slices), width=width)


CODECS = [
    "bf16", "fp8", "int8", "int6", "int4", "int3", "int2", "nf4", "normal8", "normal5", "normal1", "pq4x8",
    "svd16", "svd24+int8", "svd16+normal3", "trellis3", "svd16+trellis1",
]  # fmt: skip


def encoded(scheme: Scheme, count: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random rows as bytes, rows of short bands filled up with noise, and the band of each."""
    generator = torch.Generator().manual_seed(seed)
    band = torch.randint(len(scheme.bands), (count,), generator=generator)
    size = max(one.row_bytes for one in scheme.bands)
    data = torch.randint(256, (count, size), generator=generator, dtype=torch.uint8)
    rows = torch.randn((count, scheme.num_slices, scheme.hidden_size), generator=generator)
    for number in band.unique().tolist():
        one = scheme.bands[number]
        data[band == number, : one.row_bytes] = scheme.encode(rows[band == number], number)
    return data, band


def decoded(scheme: Scheme, data: torch.Tensor, band: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same decoded by the reference."""
    rows = torch.zeros((len(data), scheme.num_slices, scheme.hidden_size), dtype=dtype)
    for number in band.unique().tolist():
        one, chosen = scheme.bands[number], band == number
        rows[chosen] = scheme.decode(data[chosen][:, : one.row_bytes], number).to(dtype)
    return rows
