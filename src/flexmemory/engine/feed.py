"""Rows of a decode step's tokens, where its kernels can read them, whatever tier they come from.

A step is captured once and replayed, so what fetches its rows is part of it. A table on the device is read in place.
From a table in pinned host memory the GPU itself copies the rows of the step's tokens into a buffer. From disk the host
puts them into a mailbox in pinned memory, and the step, launched ahead, waits for those that the hot set lacks. Rows in
few bits go the same ways as they are stored, and one kernel decodes them where they arrive (`tol.decode_kernel`).
Dimension key: S slots, n slots of a step, P slices of a row, D model width.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportCallIssue=false, reportArgumentType=false, reportReturnType=false

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int64
from torch import Tensor

from flexmemory.engine.plain import RowOf
from flexmemory.engine.slots import Slots
from flexmemory.tol.coded_rows import CodedRows, RowIndex
from flexmemory.tol.decode_kernel import PATIENCE, WORDS, Hot, KernelDecoder
from flexmemory.tol.disk import DiskRows
from flexmemory.tol.hot import HotRows, HotSet
from flexmemory.tol.tiers import DeviceRows, HostRows, RowTier


@triton.jit
def _stage(
    token_ids_ptr, active_ptr, hot_slot_ptr, hot_ptr, below_ptr, ready_ptr, steps_ptr, out_ptr, num_slots, words,
    HAS_HOT: tl.constexpr, MAILBOX: tl.constexpr, WORDS: tl.constexpr, PATIENCE: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    columns = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    mask = columns < words
    token = tl.load(token_ids_ptr + b)
    place = token * 0 - 1
    if HAS_HOT:
        place = tl.load(hot_slot_ptr + token).to(tl.int64)
    if place >= 0:
        row = tl.load(hot_ptr + place * words + columns, mask=mask)
    elif MAILBOX:
        step = tl.load(steps_ptr + b)
        if tl.load(active_ptr + b):
            looks = 0
            while (tl.load(ready_ptr + b, volatile=True) < step) & (looks < PATIENCE):
                looks += 1
        tl.debug_barrier()
        row = tl.load(below_ptr + (step % 2 * num_slots + b) * words + columns, mask=mask)
    else:
        row = tl.load(below_ptr + token * words + columns, mask=mask)
    tl.store(out_ptr + b.to(tl.int64) * words + columns, row, mask=mask)


class RowFeed:
    """Rows of the tokens of slots [0, n) in a step."""

    def __init__(self, tier: RowTier, slots: Slots, *, steps: Int64[Tensor, " S"]) -> None:
        """Feed from a `tier` of `tol.tiers.open_rows`, or from `HotRows` over one; `steps` counts each slot's."""
        self._slots, self._steps = slots, steps
        hot, below = (tier.hot, tier.tier) if isinstance(tier, HotRows) else (None, tier)
        first = int(tier.embedding)
        self._places = {layer: first + number for number, layer in enumerate(tier.layers)}
        self._has_embedding = tier.embedding
        self._table = below.table if isinstance(below, DeviceRows) else None
        self._disk = below if isinstance(below, DiskRows) else None
        self._hot = hot
        self._event: torch.cuda.Event | None = None
        self._coded: _CodedFeed | None = None
        if self._table is not None:
            return
        device, num_slots = slots.token_ids.device, len(slots.token_ids)
        self._side = torch.cuda.Stream(device)
        self._staged = torch.zeros((num_slots, tier.num_slices, tier.hidden_size), dtype=tier.dtype, device=device)
        self._own = torch.arange(num_slots, device=device)
        self._words = self._staged[0].nbytes // 4
        if isinstance(below, CodedRows) or (isinstance(below, DiskRows) and not below.store.plain):
            self._coded = _CodedFeed(below, slots, steps=steps)
        if isinstance(below, HostRows):
            self._below = below.table
        if isinstance(below, DiskRows):
            pitch = self._staged[0].nbytes if self._coded is None else self._coded.kernel.pitch
            self._below = torch.zeros((2, num_slots, pitch), dtype=torch.uint8, pin_memory=True)
            self._ready = torch.zeros(num_slots, dtype=torch.int64, pin_memory=True)
            self._mail = self._below.numpy()[:, :, : below.store.row_bytes]  # (2, S, row_bytes)
            self._ready_view = self._ready.numpy()

    def use(self, hot: HotSet) -> None:
        """Take another hot set; steps captured so far must not run again."""
        self._hot = hot

    @property
    def from_host(self) -> bool:
        """Whether the host must be told tokens, to put rows into the mailbox."""
        return self._disk is not None

    def stage(self, num_slots: int) -> None:
        """Begin to fetch, on a stream of its own; to be captured at the start of a step."""
        if self._table is not None:
            return
        main = torch.cuda.current_stream()
        self._side.wait_stream(main)
        with torch.cuda.stream(self._side):
            if self._coded is None:
                self._stage_plain(num_slots)
            else:
                mailbox = None if self._disk is None else (self._below, self._ready)
                self._coded.stage(self._staged[:num_slots], self._hot, mailbox=mailbox)
            self._event = torch.cuda.Event()
            self._event.record()

    def _stage_plain(self, num_slots: int) -> None:
        slots, hot = self._slots, self._hot
        staged = _words(self._staged)
        hot_slot, hot_table = (staged, staged) if hot is None else (hot.slot, _words(hot.table))
        ready = self._steps if self._disk is None else self._ready
        _stage[num_slots, triton.cdiv(self._words, WORDS)](
            slots.token_ids, slots.active, hot_slot, hot_table, _words(self._below), ready, self._steps, staged,
            len(self._staged), self._words,
            HAS_HOT=hot is not None, MAILBOX=self._disk is not None, WORDS=WORDS, PATIENCE=PATIENCE,
        )  # fmt: skip

    def arrive(self) -> None:
        """Wait, on the current stream, for what `stage` began; once is enough."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)
            self._event = None

    def embeddings(self, num_slots: int) -> Float[Tensor, "n D"] | None:
        """Input embeddings, if rows carry them."""
        if not self._has_embedding:
            return None
        if self._table is not None:
            return self._table[:, 0].index_select(0, self._slots.token_ids[:num_slots])
        self.arrive()
        return self._staged[:num_slots, 0].contiguous()

    def row(self, layer: int) -> RowOf | None:
        """Where the rows of a layer are."""
        place = self._places.get(layer)
        if place is None:
            return None
        if self._table is not None:
            return RowOf(self._table[:, place], self._slots.token_ids)
        self.arrive()
        return RowOf(self._staged[:, place], self._own)

    def deliver(self, slot: int, token: int, *, step: int) -> OSError | None:
        """Put the row of `token` where step number `step` of `slot` looks for it, if rows come from the host.

        Returns:
            Why it could not be read; the step goes on with zeros.
        """
        error = None
        if self._disk is None:
            return None
        if self._hot is None or int(self._hot.host_slot[token]) < 0:
            mail: np.ndarray = self._mail[step % 2, slot]
            try:
                self._disk.read_row(token, mail)
            except OSError as failure:
                error = failure
                mail[:] = 0
        self._ready_view[slot] = step
        return error


class _CodedFeed:
    """Rows in few bits: fetched as they are stored, unless they are on the device, and decoded."""

    def __init__(self, below: CodedRows | DiskRows, slots: Slots, *, steps: Int64[Tensor, " S"]) -> None:
        device = slots.token_ids.device
        kernel = below.decoder(device).kernel
        assert kernel is not None
        self.kernel: KernelDecoder = kernel
        self._slots, self._steps = slots, steps
        self._offset: Tensor | None = None
        if isinstance(below, CodedRows):
            self._data = below.data
            self._offset, self._band = below.located(device)
        else:
            self._data = None
            self._band = RowIndex(below.store).band.to(device)
        self._staged = None
        if self._data is None or not self._data.is_cuda:
            shape = (len(slots.token_ids), kernel.pitch)
            self._staged = torch.zeros(shape, dtype=torch.uint8, device=device)

    def stage(self, out: Float[Tensor, "n P D"], hot: HotSet | None, *, mailbox: tuple[Tensor, Tensor] | None) -> None:
        """Put the rows of the first n slots into `out`; `mailbox` is where the host puts them and says so."""
        slots, kernel = self._slots, self.kernel
        chosen = slots.token_ids[: len(out)]
        held = None if hot is None else Hot(hot.slot, hot.table)
        if self._staged is None:
            kernel.decode(self._data, self._band, out, chosen=chosen, offset=self._offset, hot=held)
            return
        box = None
        if mailbox is not None:
            box = (slots.active, mailbox[1], self._steps)
        kernel.fetch(
            self._data if mailbox is None else mailbox[0].view(-1), self._staged, chosen=chosen, count=len(out),
            band=self._band, offset=self._offset, mailbox=box, hot_slot=None if hot is None else hot.slot,
        )  # fmt: skip
        kernel.decode(self._staged.view(-1), self._band, out, chosen=chosen, pitch=kernel.pitch, hot=held)


def _words(tensor: Tensor) -> Tensor:
    """The same memory as words of four bytes."""
    return tensor.flatten().view(torch.int32) if tensor.numel() else tensor.view(torch.int32)
