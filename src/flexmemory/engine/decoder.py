"""Decode steps: the interface that the engine needs, and the decoder that any device can run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from flexmemory.engine.reference import RowSource
from flexmemory.engine.slots import Slots
from flexmemory.model.memory import Rows
from flexmemory.model.transformer import Transformer


@runtime_checkable
class Ticket(Protocol):
    """Tokens that a device may still be choosing."""

    def tokens(self) -> list[int]:
        """The tokens, one a slot from slot 0 (of those that are not active: anything); waits until they are known."""
        ...


@runtime_checkable
class Decoder(Protocol):
    """Moves slots on by one token at a time."""

    @property
    def ahead(self) -> int:
        """Launched steps whose tokens may be unknown when the next one is launched."""
        ...

    def launch(self, num_slots: int) -> Ticket:
        """Begin a decode step over the slots [0, num_slots), at least one of them active, as `Slots` defines it.

        Raises:
            UnreadableRowsError: nothing was launched, and cannot be before the slots it names are closed.
        """
        ...


class UnreadableRowsError(OSError):
    """The rows that some slots need cannot be read."""

    def __init__(self, errors: Mapping[int, OSError]) -> None:
        """Say why, for each slot concerned."""
        super().__init__(f"the rows of slots {sorted(errors)} cannot be read")
        self.errors = errors


class CopiedTokens:
    """A ticket for tokens on any device: a copy of them is on its way to the host."""

    def __init__(self, token_ids: Int[Tensor, " n"]) -> None:
        """Begin the copy; on a GPU nothing waits for it."""
        self._event = torch.cuda.Event() if token_ids.is_cuda else None
        self._tokens = torch.empty_like(token_ids, device="cpu", pin_memory=token_ids.is_cuda)
        self._tokens.copy_(token_ids, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def tokens(self) -> list[int]:
        """The tokens, once they are here."""
        if self._event is not None:
            self._event.synchronize()
        return self._tokens.tolist()


class EagerDecoder:
    """The model's own forward over the slots, one step at a time."""

    ahead = 0

    def __init__(self, model: Transformer, slots: Slots, row_source: RowSource | None) -> None:
        """Decode with `model`; rows are computed unless `row_source` gives them."""
        self._model, self._slots, self._row_source = model, slots, row_source

    def launch(self, num_slots: int) -> CopiedTokens:
        """As `Decoder.launch`."""
        slots = self._slots
        active = slots.active[:num_slots]
        # A slot that is not active borrows a token, so that no row is read for it.
        some = active.int().argmax()
        token_ids = torch.where(active, slots.token_ids[:num_slots], slots.token_ids[some])[:, None]
        rows = self._rows(token_ids, active)
        lengths = slots.lengths[:num_slots]
        cache = slots.step_cache(num_slots, longest=int(lengths.max()))
        hidden = self._model.hidden_states(token_ids, rows, cache, lengths[:, None])[:, -1]  # (n, D)
        return CopiedTokens(slots.advance(self._model.head(hidden), slots.how))

    def _rows(self, token_ids: Int[Tensor, "n 1"], active: Bool[Tensor, " n"]) -> Rows | None:
        if self._row_source is None:
            return None
        try:
            return self._row_source(token_ids)
        except OSError as error:
            together = error
        used = active.nonzero().flatten().tolist()
        errors: dict[int, OSError] = {}
        for slot in used:
            try:
                self._row_source(token_ids[slot : slot + 1])
            except OSError as error:
                errors[slot] = error
        raise UnreadableRowsError(errors or dict.fromkeys(used, together)) from together
