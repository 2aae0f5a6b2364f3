"""Decode steps: the interface that the engine needs, and the decoder that any device can run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from flexmemory.engine.reference import RowSource
from flexmemory.engine.sampling import Likelihood, log_probabilities
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

    def likelihoods(self) -> list[Likelihood] | None:
        """Those of `tokens`, after which it is asked for; None where no slot's were wanted."""
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


class HostCopy:
    """Tensors of one device on their way to the host; on a GPU nothing waits for them but `tensors`."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Begin the copies."""
        on_gpu = tensors[0].is_cuda
        self._event = torch.cuda.Event() if on_gpu else None
        self._copies = [torch.empty_like(tensor, device="cpu", pin_memory=on_gpu) for tensor in tensors]
        for copy, tensor in zip(self._copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def tensors(self) -> list[Tensor]:
        """The copies, once they are here."""
        if self._event is not None:
            self._event.synchronize()
        return self._copies

    def likelihoods(self) -> list[Likelihood]:
        """Where the tensors are those of `log_probabilities`: what they say of each token."""
        logprobs, top, top_ids = (copy.tolist() for copy in self.tensors())
        return [
            Likelihood(logprob, tuple(zip(ids, logs, strict=True)))
            for logprob, logs, ids in zip(logprobs, top, top_ids, strict=True)
        ]


class CopiedTokens:
    """A ticket for tokens on any device."""

    def __init__(
        self,
        token_ids: Int[Tensor, " n"],
        errors: Mapping[int, OSError] | None = None,
        *,
        logits: Float[Tensor, "n V"] | None = None,
    ) -> None:
        """Take the tokens.

        Args:
            token_ids: They, of each slot.
            errors: What stands in place of the tokens of some slots.
            logits: What they were chosen from, where their likelihoods are wanted.
        """
        self._errors = errors or {}
        self._tokens = HostCopy([token_ids])
        self._scores = None if logits is None else HostCopy(log_probabilities(logits, token_ids))

    def tokens(self) -> list[int | OSError]:
        """The tokens, once they are here."""
        tokens: list[int | OSError] = self._tokens.tensors()[0].tolist()
        for slot, error in self._errors.items():
            tokens[slot] = error
        return tokens

    def likelihoods(self) -> list[Likelihood] | None:
        """As `Ticket.likelihoods`."""
        return None if self._scores is None else self._scores.likelihoods()


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
        logits = self._model.head(hidden)  # (n, V)
        return CopiedTokens(slots.advance(logits, slots.how), errors, logits=logits if slots.scored else None)

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
