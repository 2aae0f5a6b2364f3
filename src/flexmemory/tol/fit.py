"""Fit what one codec needs for all rows: means, gains, bases and codebooks, from one pass over the vocabulary.

`RowStatistics` is what the pass keeps, in memory that does not grow with the vocabulary; `fit` makes a `Scheme` of it.
Dimension key: U tokens, P slices of a row, D model width, N coefficients, S rows of the sample, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from tqdm import tqdm

from flexmemory.tol.coding import Coding, SliceTensors, coding_of, levels_of
from flexmemory.tol.scheme import Band, Scheme, round_basis

RowSource = Callable[[Int64[Tensor, " U"]], Float[Tensor, "U P D"]]
"""Rows of tokens in at least fp32: the input embedding, then all layers (`tol.build.RowSource`)."""
CHUNK_TOKENS = 1024
"""Rows that exist at once."""
SAMPLE_BYTES = 256 * 2**20
"""Of rows that codebooks are trained on, at most."""
SAMPLE_ROWS = 16_384
"""The same in rows: 64 for each vector of a codebook."""
FAISS = "product quantisation trains codebooks with faiss, which is not installed; pip install 'flexmemory[compress]'"
LEAST_SPREAD = 1e-3
"""Of a coefficient, as a share of the largest one's: what is smaller has no gain of its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowStatistics:
    """What is kept of rows that went by; bands hold tokens of like frequency, in the order of `sizes`."""

    weight: Float[Tensor, " bands"]
    """Sum of the weights of each band's tokens; of all, 1."""
    mean: Float[Tensor, "bands P D"]
    """Weighted by token, within the band."""
    square: Float[Tensor, "bands P D"]
    """Mean of the squares, likewise."""
    largest: Float[Tensor, "bands P D"]
    """Largest absolute value of each channel."""
    norm: Float[Tensor, "bands P"]
    """Largest Euclidean norm of a slice."""
    second: Float[Tensor, "P D D"] | None
    """Weighted mean of x x^T over all bands, where it was wanted."""
    sample: Float[Tensor, "S P D"] | None
    """Rows of tokens drawn evenly from all places, where they were wanted."""

    @property
    def overall_mean(self) -> Float[Tensor, "P D"]:
        """Weighted mean of all rows."""
        return torch.einsum("b,bpd->pd", self.weight, self.mean)

    def covariance(self, place: int) -> Float[Tensor, "D D"]:
        """Of slice `place` over all bands."""
        assert self.second is not None
        mean = self.overall_mean[place]
        return self.second[place] - torch.outer(mean, mean)


@torch.inference_mode()
def gather_statistics(
    source: RowSource,
    *,
    places: Sequence[int],
    sizes: Sequence[int],
    weights: Float[Tensor, " V"] | None = None,
    order: Int64[Tensor, " V"] | None = None,
    second: bool = False,
    sample: bool = False,
    device: torch.device | str = "cpu",
    chunk_tokens: int = CHUNK_TOKENS,
) -> RowStatistics:
    """One pass over all rows.

    Args:
        source: Where rows come from.
        places: Which slices of the source's rows to look at: 0 is the embedding, 1 + l is layer l.
        sizes: Tokens in each band.
        weights: What each token counts; all the same by default.
        order: The token at each place, by which bands are cut; that of ids by default.
        second: Whether to keep second moments (P D^2 numbers).
        sample: Whether to keep a sample of rows.
        device: Where to keep it.
        chunk_tokens: Rows to hold at once.

    Raises:
        ValueError: a number is not finite.
    """
    vocab_size = sum(sizes)
    order = torch.arange(vocab_size) if order is None else order
    share = torch.ones(vocab_size) if weights is None else weights.double().cpu()
    share = (share / share.sum()).to(torch.float64)
    sums: dict[str, Tensor] = {}
    moments: Tensor | None = None
    kept: list[Tensor] = []
    step = 1
    with tqdm(total=vocab_size, desc="row statistics", unit="token", leave=False, disable=None) as bar:
        for band, first, stop in _chunks(sizes, chunk_tokens):
            ids = order[first:stop]
            rows = source(ids)[:, list(places)].to(device, torch.float32)
            check_finite(rows, ids, places=places)
            if not sums:
                shape = (len(sizes), *rows.shape[1:])
                sums = {
                    name: torch.zeros(shape, device=device, dtype=torch.float64)
                    for name in ("mean", "square", "largest")
                }
                sums["norm"] = torch.zeros(shape[:2], device=device)
                step = -(-vocab_size // max(1, min(SAMPLE_ROWS, SAMPLE_BYTES // (4 * rows[0].numel()))))
            weight = share[ids].to(device)
            sums["mean"][band] += torch.einsum("u,upd->pd", weight, rows.double())
            sums["square"][band] += torch.einsum("u,upd->pd", weight, rows.double().square())
            sums["largest"][band] = torch.maximum(sums["largest"][band], rows.abs().amax(0))
            sums["norm"][band] = torch.maximum(sums["norm"][band], rows.norm(dim=-1).amax(0))
            if second:
                turned = rows.transpose(0, 1)  # (P, U, D)
                found = (turned * weight.float()[None, :, None]).mT @ turned
                moments = found if moments is None else moments.add_(found)
            if sample:
                kept.append(rows[(-first) % step :: step].clone())
            bar.update(len(ids))
    ends = torch.tensor([0, *sizes]).cumsum(0)
    total = torch.stack([share[order[a:b]].sum() for a, b in itertools.pairwise(ends.tolist())]).to(device)
    divisor = total.clamp(min=1e-30)[:, None, None]
    return RowStatistics(
        weight=total.float(),
        mean=(sums["mean"] / divisor).float(),
        square=(sums["square"] / divisor).float(),
        largest=sums["largest"].float(),
        norm=sums["norm"],
        second=moments,
        sample=torch.cat(kept) if sample else None,
    )


def _chunks(sizes: Sequence[int], chunk_tokens: int) -> Iterator[tuple[int, int, int]]:
    """Band, first place and the one after the last of every chunk."""
    start = 0
    for band, size in enumerate(sizes):
        for first in range(start, start + size, chunk_tokens):
            yield band, first, min(first + chunk_tokens, start + size)
        start += size


def check_finite(rows: Float[Tensor, "U P D"], token_ids: Int64[Tensor, " U"], *, places: Sequence[int]) -> None:
    """Refuse rows with NaN or infinity.

    Raises:
        ValueError: as said, naming the token and the layer.
    """
    finite = rows.isfinite()
    if not finite.all():
        token, place, element = (~finite).nonzero()[0].tolist()
        name = f"layer {places[place] - 1}" if places[place] else "the embedding"
        raise ValueError(
            f"the row of token {int(token_ids[token])} in {name} is not finite "
            f"({float(rows[token, place, element])} at {element}); the checkpoint is damaged or its training diverged: "
            "fit another one"
        )


def fit(
    codec: str,
    source: RowSource,
    *,
    vocab_size: int,
    hidden_size: int,
    layers: Sequence[int],
    embedding: bool = False,
    counts: Int64[Tensor, " V"] | None = None,
    statistics: RowStatistics | None = None,
    device: torch.device | str = "cpu",
    chunk_tokens: int = CHUNK_TOKENS,
    seed: int = 0,
) -> Scheme:
    """A scheme that writes all slices by one codec; an embedding in the row is bf16, or fp32 where the codec is.

    Args:
        codec: A name that `tol.coding.coding_of` reads.
        source: Where rows come from.
        vocab_size: V.
        hidden_size: D.
        layers: The model's layers to write, the most important first.
        embedding: Whether a row begins with the input embedding.
        counts: How often each token occurs: what means, gains and bases are weighted by; all tokens alike by default.
        statistics: Of all layers' rows in one band, where they are there; by default they are gathered.
        device: Where to compute; the scheme is on the CPU.
        chunk_tokens: Rows to hold at once.
        seed: Of codebooks.

    Raises:
        ImportError: the codec needs faiss, which is not there.
        ValueError: there is no such codec, a number is not finite, or codebooks need more tokens than there are.
    """
    coding = coding_of(codec, hidden_size)
    if coding.levels == "pq":
        _faiss()
    layers = tuple(layers)
    places = [1 + layer for layer in layers]
    tensors = [SliceTensors() for _ in layers]
    if not coding.plain:
        statistics = statistics or gather_statistics(
            source,
            places=places,
            sizes=[vocab_size],
            weights=None if counts is None else counts.double() + 0.5,
            second=coding.basis,
            sample=coding.levels == "pq",
            device=device,
            chunk_tokens=chunk_tokens,
        )
        tensors = [_fit_slice(coding, statistics, number, seed=seed) for number in range(len(layers))]
    codings: list[Coding] = [coding] * len(layers)
    if embedding:
        tensors = [SliceTensors(), *tensors]
        codings = [coding_of("fp32" if coding.levels == "fp32" else "bf16", hidden_size), *codings]
    return Scheme(
        codec=codec,
        layers=layers,
        embedding=embedding,
        hidden_size=hidden_size,
        bands=(Band(tokens=vocab_size, slices=tuple(codings)),),
        tensors=(tuple(tensors),),
    ).moved("cpu")


def _fit_slice(coding: Coding, statistics: RowStatistics, place: int, *, seed: int) -> SliceTensors:
    """Tensors of one slice, all tokens in one band."""
    mean = statistics.overall_mean[place].half().float()
    if coding.basis:
        basis = round_basis(principal_basis(statistics.covariance(place))[: coding.num_coefficients], bits=8)
        analysis = torch.linalg.pinv(basis.double()).float()
        spread = torch.einsum("dn,de,en->n", analysis, statistics.covariance(place), analysis).clamp(min=0).sqrt()
        # No coefficient is larger than the row is long.
        bound = (statistics.norm[0, place] + mean.norm()) * analysis.norm(dim=0)
    else:
        basis = analysis = None
        spread = (statistics.square[0, place] - statistics.mean[0, place].square()).clamp(min=0).sqrt()
        bound = statistics.largest[0, place] + mean.abs()
    if coding.levels in ("fp32", "bf16"):
        return SliceTensors(mean=mean, basis=basis, analysis=analysis)
    gain = safe_gain(coding, spread=spread, bound=bound)
    fitted = SliceTensors(mean=mean, gain=gain, basis=basis, analysis=analysis, weight=gain.square())
    if coding.levels != "pq":
        return fitted
    assert statistics.sample is not None
    numbers = (statistics.sample[:, place] - mean) / gain
    numbers = numbers / numbers.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-20)
    return dataclasses.replace(fitted, codebook=codebooks(numbers, vector=coding.vector, seed=seed))


def principal_basis(covariance: Float[Tensor, "D D"]) -> Float[Tensor, "D D"]:
    """Orthonormal directions, as rows, that of the largest variance first."""
    return torch.linalg.eigh(covariance.double()).eigenvectors.flip(1).T.float()


def safe_gain(coding: Coding, *, spread: Float[Tensor, " N"], bound: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Gains in proportion to `spread` with which no token needs a scale above 1, the largest that there is.

    Args:
        coding: Of the slice.
        spread: Standard deviation of each coefficient.
        bound: What no coefficient of any token exceeds.
    """
    spread = torch.maximum(spread, LEAST_SPREAD * spread.max()).clamp(min=1e-12)
    relative = bound / spread
    if coding.levels in ("normal", "trellis", "pq"):  # scales are about the root mean square, at most 13 steps above it
        most = relative.square().mean().sqrt() * 2 ** (13.5 / 16)
    else:  # scales are the largest number over the largest level, at most 4 steps above it
        top = levels_of(coding.levels, coding.widths[0][0]).abs().max()
        most = relative.max() / top * 2 ** (4.5 / 16)
    return spread * most.clamp(min=1e-12)


def codebooks(numbers: Float[Tensor, "S N"], *, vector: int, seed: int) -> Float[Tensor, "M 256 vector"]:
    """Vectors with about the least squared error for each group of `vector` numbers, by k-means.

    Raises:
        ImportError: faiss is not installed.
        ValueError: there are fewer rows than vectors.
    """
    faiss = _faiss()
    if len(numbers) < 256:
        raise ValueError(f"codebooks of 256 vectors need as many tokens, got {len(numbers)}; choose another codec")
    books = []
    for part in numbers.cpu().split(vector, dim=1):
        means = faiss.Kmeans(vector, 256, niter=25, seed=seed + 1, min_points_per_centroid=1)
        means.train(part.contiguous().numpy())
        books.append(torch.tensor(means.centroids))
    return torch.stack(books).half().float().to(numbers.device)


def _faiss():
    try:
        import faiss
    except ImportError as error:
        raise ImportError(FAISS) from error
    return faiss


def band_sizes(vocab_size: int) -> tuple[int, ...]:
    """Tokens in each band, the most frequent first: ends at 1/128, 1/32, 1/8, 1/4 and 1/2 of the vocabulary."""
    ends = sorted({math.ceil(vocab_size / part) for part in (128, 32, 8, 4, 2, 1)})
    return tuple(stop - start for start, stop in zip([0, *ends[:-1]], ends, strict=True))
