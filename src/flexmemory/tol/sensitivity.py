"""How much the loss rises when rows are a little off: Fisher blocks over rows, from a text.

With rows changed by e (all layers of a position's token), the loss rises by about 0.5 * mean over positions of e^T J e,
where J = E[g g^T] and g is the gradient of the loss with respect to the rows of one position, the next token drawn from
the model itself: the Fisher information, which is the Gauss-Newton part of the Hessian. J is kept in blocks of layers:
`blocks[l, j]` is that of layer l with layer l + j.

The residual stream keeps an error, so J's blocks off the diagonal matter: rows of later layers can make up for part of
the error of an earlier one. `feedback` says by how much, and what of the error then still counts.
Dimension key: B windows, T tokens, L layers, D model width, R blocks of a layer, V vocabulary, U tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from flexmemory.model.memory import MemoryRows
from flexmemory.model.transformer import Transformer
from flexmemory.storage import read_json, write_json

MEMORY_BYTES = 2 * 2**30
"""Of all blocks, at most: it says how many later layers each layer has blocks with."""
LOGIT_BYTES = 2**30
"""Of one pass's logits, at most, where that is a window or more."""
DAMPING = 0.03
"""Share of the diagonal that is added to it before blocks are inverted."""
VERSION = 1
"""Of the estimator: cached figures of another one are not used."""

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Feedback:
    """What errors cost when later layers make up for what they can."""

    cost: Float[Tensor, "L D D"]
    """What is left of the cost of an error of each layer: the Schur complement of the later layers' block."""
    matrices: dict[int, dict[int, Float[Tensor, "D D"]]]
    """`matrices[layer][later] @ error` is to be taken off the rows of the later layer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """Fisher information of rows."""

    blocks: Float[Tensor, "L R D D"]
    """`blocks[l, j]` is E[g_l g_(l+j)^T]; zero past the last layer."""
    token_squares: Float[Tensor, "V L"]
    """Sum of |g_l|^2 over the positions of each token."""
    token_counts: Int64[Tensor, " V"]
    """Positions of each token."""

    @property
    def positions(self) -> int:
        """Positions that gradients were taken at."""
        return int(self.token_counts.sum())

    def rise(self, errors: Float[Tensor, "U L D"], weights: Float[Tensor, " U"]) -> Float[Tensor, ""]:
        """The predicted rise of the loss in nats a token.

        Args:
            errors: What is added to the rows of each token.
            weights: The share of positions that each token has.
        """
        layers, reach = self.blocks.shape[:2]
        total = errors.new_zeros(())
        for layer in range(layers):
            for step in range(min(reach, layers - layer)):
                pushed = errors[:, layer] @ self.blocks[layer, step].to(errors)
                # Blocks off the diagonal count twice, for their transposes.
                total = total + (1 + (step > 0)) * (weights * (pushed * errors[:, layer + step]).sum(-1)).sum()
        return total / 2

    def moved(self, device: torch.device | str) -> Sensitivity:
        """The same with its blocks on another device."""
        return dataclasses.replace(self, blocks=self.blocks.to(device))

    def feedback(self, *, damping: float = DAMPING) -> Feedback:
        """What later layers can make up for, and what is left."""
        layers, reach, width = self.blocks.shape[:3]
        cost, matrices = [], {}
        for layer in range(layers):
            later = range(layer + 1, min(layer + reach, layers))
            own = self._damped(layer, damping)
            if not later:
                cost.append(own)
                continue
            joint = torch.zeros(len(later) * width, len(later) * width, dtype=torch.float64, device=own.device)
            for row, first in enumerate(later):
                for step in range(min(reach, later.stop - first)):
                    block = self.blocks[first, step].double() if step else self._damped(first, damping)
                    here, there = _span(row, width), _span(row + step, width)
                    joint[here, there] = block
                    joint[there, here] = block.T
            cross = torch.cat([self.blocks[layer, number - layer].double().T for number in later])  # (later D, D)
            solved = torch.linalg.solve(joint, cross)
            cost.append(own - cross.T @ solved)
            matrices[layer] = {number: solved[_span(row, width)].float() for row, number in enumerate(later)}
        stacked = torch.stack(cost)
        return Feedback(cost=((stacked + stacked.mT) / 2).float(), matrices=matrices)

    def alone(self) -> Feedback:
        """No feedback: each layer's errors cost what they cost alone."""
        return Feedback(cost=self.blocks[:, 0], matrices={})

    def _damped(self, layer: int, damping: float) -> Float[Tensor, "D D"]:
        block = self.blocks[layer, 0].double()
        return block + damping * block.diagonal().diag()


def _span(number: int, width: int) -> slice:
    return slice(number * width, (number + 1) * width)


def reach_of(num_layers: int, width: int, *, memory_bytes: int = MEMORY_BYTES) -> int:
    """Blocks that each layer can have in `memory_bytes`: with itself and later ones.

    Raises:
        ValueError: not even one fits.
    """
    reach = min(num_layers, memory_bytes // (4 * num_layers * width * width))
    if reach < 1:
        needed = 4 * num_layers * width * width
        raise ValueError(f"Fisher blocks of this model need {needed:,} bytes at least, got {memory_bytes:,}")
    return reach


def measure_sensitivity(
    model: Transformer,
    windows: Int64[Tensor, "B T"],
    *,
    reach: int | None = None,
    batch_size: int = 4,
    seed: int = 0,
) -> Sensitivity:
    """Estimate the Fisher information of a model's rows on a text.

    Args:
        model: A memory or flex model with all of its weights, in fp32 at least.
        windows: Token ids; next tokens are drawn from the model, so those of the text do not matter.
        reach: Blocks of each layer, with itself and later ones; by default what fits in 2 GiB.
        batch_size: Windows in one pass, fewer where their logits would take more than `LOGIT_BYTES`.
        seed: Of the draws.
    """
    config, device = model.config, model.device
    layers, width = config.num_layers, config.hidden_size
    batch_size = max(1, min(batch_size, LOGIT_BYTES // (4 * windows.shape[1] * config.vocab_size)))
    blocks = torch.zeros(layers, reach or reach_of(layers, width), width, width, device=device)
    squares = torch.zeros(config.vocab_size, layers, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with tqdm(total=windows.numel(), desc="sensitivity", unit="token", leave=False, disable=None) as bar:
        for batch in windows.split(batch_size):
            ids = batch.to(device)
            gradient = _gradients(model, ids, generator)  # (L, B T, D)
            for layer in range(layers):
                for step in range(min(blocks.shape[1], layers - layer)):
                    blocks[layer, step].addmm_(gradient[layer].T, gradient[layer + step])
            squares.index_add_(0, ids.flatten(), gradient.square().sum(-1).T)
            bar.update(ids.numel())
    counts = torch.bincount(windows.flatten(), minlength=config.vocab_size)
    return Sensitivity(blocks=(blocks / windows.numel()).cpu(), token_squares=squares.cpu(), token_counts=counts)


def _gradients(model: Transformer, ids: Int64[Tensor, "B T"], generator: torch.Generator) -> Float[Tensor, "L N D"]:
    """Gradients with respect to the rows at each position, next tokens drawn from the model."""
    with torch.no_grad():
        unique, index = torch.unique(ids, return_inverse=True)
        rows = model.compute_rows(unique)[index].flatten(0, 1)  # (B T, L, D): a row of its own for each position
    rows.requires_grad_()
    positions = torch.arange(ids.numel(), device=ids.device).view_as(ids)
    with torch.enable_grad():
        logits = model.head(model.hidden_states(ids, MemoryRows(rows, positions))).flatten(0, 1).float()
        with torch.no_grad():
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        loss = F.cross_entropy(logits, drawn, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, rows)
    return gradient.float().transpose(0, 1)


def cached_sensitivity(
    model: Transformer,
    windows: Int64[Tensor, "B T"],
    *,
    folder: Path | None,
    fingerprint: str,
    seed: int = 0,
    batch_size: int = 4,
) -> Sensitivity:
    """As `measure_sensitivity`, kept in `folder` for the next time that the same is asked for.

    Args:
        model: As there.
        windows: As there.
        folder: Where to look and to keep; nothing is kept without one, or in one that cannot be written.
        fingerprint: Of the checkpoint that `model` is of.
        seed: As there.
        batch_size: As there.
    """
    key: dict[str, Any] = {
        "version": VERSION,
        "checkpoint": fingerprint,
        "text_sha256": hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest(),
        "windows": list(windows.shape),
        "reach": reach_of(model.config.num_layers, model.config.hidden_size),
        "batch_size": batch_size,
        "seed": seed,
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    if folder is not None and (found := _read_cached(folder / name, key)) is not None:
        logger.info("sensitivity read from %s", folder / f"{name}.safetensors")
        return found
    measured = measure_sensitivity(model, windows, reach=key["reach"], seed=seed, batch_size=batch_size)
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tensors = {field.name: getattr(measured, field.name) for field in dataclasses.fields(measured)}
            save_file(tensors, folder / f"{name}.safetensors")
            write_json(folder / f"{name}.json", key)  # last: it says that the other file is whole
        except (OSError, SafetensorError) as error:
            logger.warning("sensitivity is not kept: %s cannot be written (%s)", folder, error)
    return measured


def _read_cached(path: Path, key: dict[str, Any]) -> Sensitivity | None:
    """What was kept under `key`, or nothing where it is absent or damaged."""
    said, tensors = path.with_suffix(".json"), path.with_suffix(".safetensors")
    if not said.is_file() or not tensors.is_file():
        return None
    try:
        if read_json(said) != key:
            return None
        return Sensitivity(**load_file(tensors))
    except (ValueError, SafetensorError, TypeError) as error:
        logger.warning("%s is damaged (%s); measuring again", tensors, error)
        return None
