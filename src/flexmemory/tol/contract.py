"""What every tier of rows can do. Dimension key: U unique ids, D model width, V vocabulary."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flexmemory.model.transformer import check_token_ids


@runtime_checkable
class RowTier(Protocol):
    """A source of rows by token id. A row has slices of D numbers: the embedding where it is carried, then layers."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the rows."""
        ...

    @property
    def embedding(self) -> bool:
        """Whether a row begins with the token's input embedding."""
        ...

    @property
    def layers(self) -> tuple[int, ...]:
        """The model's layers that a row holds, in the row's order."""
        ...

    @property
    def num_slices(self) -> int:
        """Slices of a row: layers, and one for the embedding where it is carried."""
        ...

    @property
    def hidden_size(self) -> int:
        """D."""
        ...

    @property
    def vocab_size(self) -> int:
        """V."""
        ...

    def gather(self, token_ids: Int[Tensor, " U"], out: Float[Tensor, "U slices D"]) -> None:
        """Write the rows of `token_ids`, in any order and repeated at will, over all of `out`.

        Args:
            token_ids: On any device; those on the CPU are checked to be in range.
            out: Contiguous, of the tier's dtype, on any device.

        Raises:
            OSError: the rows cannot be read. Each row of `out` is then what it was, what it should be, or one that
                could not be read; the next call is served as if nothing had been.
            ValueError: an id is out of range, or `out` has another shape or dtype.
        """
        ...


def check_gather(tier: RowTier, token_ids: Int[Tensor, " U"], out: Tensor) -> None:
    """Refuse what `RowTier.gather` refuses.

    Raises:
        ValueError: as said there.
    """
    check_out(tier, len(token_ids), out)
    if token_ids.device.type == "cpu":
        check_token_ids(token_ids, tier.vocab_size)


def check_out(tier: RowTier, num_ids: int, out: Tensor) -> None:
    """Refuse an `out` that `RowTier.gather` refuses.

    Raises:
        ValueError: as said there.
    """
    shape = (num_ids, tier.num_slices, tier.hidden_size)
    if out.shape != shape or out.dtype != tier.dtype or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous {tier.dtype} of shape {list(shape)}, got {out.dtype} of shape {list(out.shape)} "
            f"and strides {list(out.stride())}"
        )
