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

    def tokens(self) -> list[int | OSError]:
        """The tokens, one a slot from slot 0 (of those that are not active: anything); waits until they are known.

        In place of a token, why the rows that it takes could not be read; the slot is of no use from then on.
        """
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
            torch.OutOfMemoryError: the device has no room for it; nothing was begun, and it can be launched again.
        """
        ...

    def shrink(self) -> bool:
        """Give up memory of the device, as it is out of it; no rows are being fetched. False: there is nothing left."""
        ...

    def relearn(self) -> None:
        """Look whether other rows are frequent than those kept at hand; no rows are being fetched."""
        ...


class CopiedTokens:
    """A ticket for tokens on any device: a copy of them is on its way to the host."""

    def __init__(self, token_ids: Int[Tensor, " n"], errors: Mapping[int, OSError] | None = None) -> None:
        """Begin the copy; on a GPU nothing waits for it. `errors` stand in place of the tokens of some slots."""
        self._errors = errors or {}
        self._event = torch.cuda.Event() if token_ids.is_cuda else None
        self._tokens = torch.empty_like(token_ids, device="cpu", pin_memory=token_ids.is_cuda)
        self._tokens.copy_(token_ids, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def tokens(self) -> list[int | OSError]:
        """The tokens, once they are here."""
        if self._event is not None:
            self._event.synchronize()
        tokens: list[int | OSError] = self._tokens.tolist()
        for slot, error in self._errors.items():
            tokens[slot] = error
        return tokens


class EagerDecoder:
    """The model's own forward over the slots, one step at a time."""

    ahead = 0

    def __init__(self, model: Transformer, slots: Slots, row_source: RowSource | None) -> None:
        """Decode with `model`; rows are computed unless `row_source` gives them."""
        self._model, self._slots, self._row_source = model, slots, row_source

    def launch(self, num_slots: int) -> CopiedTokens:
        """As `Decoder.launch`."""
        slots = self._slots
        token_ids, active = slots.token_ids[:num_slots], slots.active[:num_slots]
        errors: dict[int, OSError] = {}
        try:
            rows = self._rows(token_ids, active)
        except OSError as error:
            errors, readable = self._unreadable(token_ids, active, error)
            if not readable.any():
                return CopiedTokens(token_ids, errors)
            rows = self._rows(token_ids, readable)
            active = readable
        lengths = slots.lengths[:num_slots]
        cache = slots.step_cache(num_slots, longest=int(lengths.max()))
        inputs = _borrowed(token_ids, active)[:, None]
        hidden = self._model.hidden_states(inputs, rows, cache, lengths[:, None])[:, -1]  # (n, D)
        return CopiedTokens(slots.advance(self._model.head(hidden), slots.how), errors)

    def shrink(self) -> bool:
        """As `Decoder.shrink`: it keeps nothing that could be given up."""
        return False

    def relearn(self) -> None:
        """As `Decoder.relearn`: it keeps no rows."""

    def _rows(self, token_ids: Int[Tensor, " n"], active: Bool[Tensor, " n"]) -> Rows | None:
        return None if self._row_source is None else self._row_source(_borrowed(token_ids, active)[:, None])

    def _unreadable(
        self, token_ids: Int[Tensor, " n"], active: Bool[Tensor, " n"], together: OSError
    ) -> tuple[dict[int, OSError], Bool[Tensor, " n"]]:
        """Which slots' rows cannot be read and why, and the active slots without them."""
        assert self._row_source is not None
        used = active.nonzero().flatten().tolist()
        errors: dict[int, OSError] = {}
        for slot in used:
            try:
                self._row_source(token_ids[slot : slot + 1, None])
            except OSError as error:
                errors[slot] = error
        readable = active.clone()
        readable[list(errors or used)] = False
        return errors or dict.fromkeys(used, together), readable


def _borrowed(token_ids: Int[Tensor, " n"], active: Bool[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The ids, those of slots that are not active replaced by another slot's, so that no row is read for them."""
    return torch.where(active, token_ids, token_ids[active.int().argmax()])
