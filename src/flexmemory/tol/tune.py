"""Tune what codes are decoded with: means, gains and bases, by the gradient of the model's loss, codes kept.

Codes are chosen by a quadratic estimate of the loss; what decodes them is few numbers for all tokens, and can be
fitted to the loss itself. All coefficients are in memory meanwhile: V L D numbers.
Dimension key: V vocabulary, U tokens, B windows, T tokens, D model width, N coefficients.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from flexmemory.model.memory import MemoryRows
from flexmemory.model.transformer import Transformer
from flexmemory.tol.coding import SliceTensors, decode_slice
from flexmemory.tol.fit import CHUNK_TOKENS, RowSource
from flexmemory.tol.scheme import Scheme, as_stored, pack_basis

RATES = {"mean": 0.01, "gain": 0.01, "basis": 0.002}
"""Largest steps: of means and bases as a share of their numbers' root mean square, of gains as a share of each."""


class _Slices(nn.Module):
    """One layer's slices of all tokens, from their codes."""

    def __init__(self, scheme: Scheme, place: int, data: list[Tensor], *, device: torch.device) -> None:
        """Decode slice `place` of the bytes of each band's tokens; `scheme` is on `device`."""
        super().__init__()
        self.numbers, self.gains = [], nn.ParameterList()
        tensors = [band[place] for band in scheme.tensors]
        for band, rows in zip(scheme.bands, data, strict=True):
            coding = band.slices[place]
            numbers = None
            if coding:
                plain, at = dataclasses.replace(coding, basis=False), band.offsets()[place]
                numbers = decode_slice(rows[:, at : at + coding.nbytes], plain, SliceTensors()).to(device)
            self.numbers.append(numbers)
            self.gains.append(nn.Parameter(torch.zeros(0 if numbers is None else numbers.shape[1], device=device)))
        self.scales = [tensor.gain for tensor in tensors]
        first = next((t for t, band in zip(tensors, scheme.bands, strict=True) if band.slices[place]), None)
        mean = None if first is None else first.mean
        self.mean = nn.Parameter(torch.zeros(scheme.hidden_size, device=device))
        self.start_mean = torch.zeros(scheme.hidden_size, device=device) if mean is None else mean
        basis = None if first is None else first.basis
        self.start_basis = basis
        fine = basis is not None and pack_basis(basis)[0].dtype == torch.int8  # 4 bits are too few to tune
        self.basis = nn.Parameter(torch.zeros_like(basis)) if basis is not None and fine else None
        self.size = 1.0
        with torch.no_grad():
            if self.numbers[0] is not None:
                first_row = self(torch.zeros(1, dtype=torch.int64, device=device), 0)
                self.size = float(first_row.square().mean().sqrt()) or 1.0

    def tuned_gain(self, band: int) -> Float[Tensor, " N"] | None:
        """Gains of a band."""
        scale = self.scales[band]
        return None if scale is None else scale * self.gains[band].exp()

    def tuned_mean(self) -> Float[Tensor, " D"]:
        """The mean."""
        return self.start_mean + self.mean * self.size

    def tuned_basis(self) -> Float[Tensor, "N D"] | None:
        """The basis."""
        if self.start_basis is None or self.basis is None:
            return self.start_basis
        return self.start_basis + self.basis * self.start_basis.square().mean(1, keepdim=True).sqrt()

    def forward(self, places: Int64[Tensor, " U"], band: int) -> Float[Tensor, "U D"]:
        """Slices of tokens at some places of a band."""
        numbers = self.numbers[band]
        if numbers is None:
            return self.start_mean.new_zeros((len(places), len(self.start_mean)))
        numbers = numbers[places]
        gain, basis = self.tuned_gain(band), self.tuned_basis()
        numbers = numbers if gain is None else numbers * gain
        numbers = numbers if basis is None else numbers @ basis[: numbers.shape[1]]
        return numbers + self.tuned_mean()


def tune(
    scheme: Scheme,
    model: Transformer,
    source: RowSource,
    windows: Int64[Tensor, "B T"],
    *,
    own: float = 1.0,
    batch_size: int = 4,
    rates: dict[str, float] = RATES,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Scheme:
    """The scheme with tensors for which the loss is less, and the old ones to choose codes for.

    Args:
        scheme: Its tensors are those of a store (`as_stored`), and its feedback and encoder stay.
        model: The model, with all of its weights.
        source: Where rows come from.
        windows: Text to tune on, each window with one more token than is read; once through.
        own: Share of the model's own predictions in the targets; the rest are the text's next tokens.
        batch_size: Windows a step.
        rates: Of Adam, for `mean`, `gain` and `basis`.
        seed: Of the order of windows.
        device: Where codes are chosen; all else is done where the model is.
    """
    data = _encoded(scheme, source, device=device)
    offset, scheme = int(scheme.embedding), scheme.moved(model.device)
    slices = [_Slices(scheme, offset + number, data, device=model.device) for number in range(len(scheme.layers))]
    order = torch.arange(scheme.vocab_size) if scheme.order is None else scheme.order
    place = torch.empty(scheme.vocab_size, dtype=torch.int64)
    place[order] = torch.arange(scheme.vocab_size)
    place = place.to(model.device)
    groups = [
        {"params": [each.mean for each in slices], "lr": rates["mean"]},
        {"params": [gain for each in slices for gain in each.gains], "lr": rates["gain"]},
        {"params": [each.basis for each in slices if each.basis is not None], "lr": rates["basis"]},
    ]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]], betas=(0.9, 0.98))
    shuffled = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))]
    batches = shuffled.split(batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 5) * (1 - step / len(batches))
    )
    for batch in tqdm(batches, desc="tuning", unit="step", leave=False, disable=None):
        loss = _loss(model, batch.to(model.device), slices, scheme, place, own=own)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    tensors = [list(band) for band in scheme.tensors]
    for number, each in enumerate(slices):
        for band in range(len(scheme.bands)):
            old = scheme.tensors[band][offset + number]
            with torch.no_grad():
                tensors[band][offset + number] = dataclasses.replace(
                    old,
                    mean=None if old.mean is None else each.tuned_mean().detach(),
                    gain=None if old.gain is None else each.tuned_gain(band),
                    basis=each.tuned_basis(),
                )
    tuned = dataclasses.replace(scheme, tensors=tuple(map(tuple, tensors)), encoder=scheme.encoder or scheme.tensors)
    tuned = tuned.moved("cpu")
    return dataclasses.replace(tuned, tensors=as_stored(tuned))


@torch.inference_mode()
def _encoded(scheme: Scheme, source: RowSource, *, device: torch.device | str) -> list[Tensor]:
    """Bytes of all tokens, by band."""
    scheme = scheme.moved(device)
    order = torch.arange(scheme.vocab_size) if scheme.order is None else scheme.order
    slices = ([0] if scheme.embedding else []) + [1 + layer for layer in scheme.layers]
    data = []
    for number, ids in enumerate(order.split([band.tokens for band in scheme.bands])):
        data.append(
            torch.cat(
                [
                    scheme.encode(source(part)[:, slices].to(device, torch.float32), number).cpu()
                    for part in ids.split(CHUNK_TOKENS)
                ]
            )
        )
    return [part.clone() for part in data]


def _loss(
    model: Transformer,
    batch: Int64[Tensor, "B T"],
    slices: list[_Slices],
    scheme: Scheme,
    place: Int64[Tensor, " V"],
    *,
    own: float,
) -> Float[Tensor, ""]:
    """The cross entropy of coded rows' predictions to the targets."""
    ids, following = batch[:, :-1], batch[:, 1:].flatten()
    unique, index = torch.unique(ids, return_inverse=True)
    places = place[unique].sort()
    ends = torch.tensor([0, *(band.tokens for band in scheme.bands)], device=ids.device).cumsum(0)
    bounds = torch.searchsorted(places.values, ends).tolist()
    parts = []
    for band, (first, stop) in enumerate(itertools.pairwise(bounds)):
        local = places.values[first:stop] - ends[band]
        parts.append(torch.stack([each(local, band) for each in slices], dim=1))
    back = torch.empty_like(places.indices)
    back[places.indices] = torch.arange(len(back), device=ids.device)
    rows = MemoryRows(torch.cat(parts), back[index], layers=scheme.layers)
    with torch.no_grad():
        exact = model.head(model.hidden_states(ids)).flatten(0, 1).softmax(-1)
        targets = own * exact + (1 - own) * F.one_hot(following, exact.shape[1])
    logits = model.head(model.hidden_states(ids, rows)).flatten(0, 1)
    return F.cross_entropy(logits, targets)
