"""All rows of a store in few bits, in memory as they are stored, on a device or the host; decoded when asked for.

Dimension key: U unique ids, V vocabulary, P slices of a row, D model width.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Int32, Int64
from torch import Tensor

from flexmemory.tol.contract import check_gather
from flexmemory.tol.decoder import RowDecoder
from flexmemory.tol.store import ToLStore

GATHER_ROWS = 512
"""Rows that are put together at once before they are decoded."""


class RowIndex:
    """Where the row of each token is when all are in memory, band after band, each row at a multiple of four bytes."""

    def __init__(self, store: ToLStore) -> None:
        """For the rows of a coded store."""
        assert not store.plain
        positions = torch.arange(store.vocab_size) if store.positions is None else store.positions
        self.pitches = tuple(pitch_of(band.row_bytes) for band in store.bands)
        """Bytes from one row of each band to the next."""
        self.band: Int32[Tensor, " V"] = store.band_of(positions).int()
        tokens = torch.tensor([band.tokens for band in store.bands])
        sizes = tokens * torch.tensor(self.pitches)
        first_byte, first_place = sizes.cumsum(0) - sizes, tokens.cumsum(0) - tokens
        self.starts: list[int] = first_byte.tolist()
        """The byte at which each band begins."""
        band = self.band.long()
        self.place: Int64[Tensor, " V"] = positions - first_place[band]
        """The place of each row in its band."""
        self.offset: Int64[Tensor, " V"] = first_byte[band] + self.place * torch.tensor(self.pitches)[band]
        """The byte at which each row begins."""
        self.nbytes = int(sizes.sum())
        """Of all rows."""


def pitch_of(row_bytes: int) -> int:
    """Bytes from one row of a band to the next in memory."""
    return -(-row_bytes // 4) * 4


class CodedRows:
    """Every row of a coded store in memory: that of a device, or of the host, pinned where a GPU is to read it."""

    def __init__(self, store: ToLStore, *, device: torch.device | str, pinned: bool = False) -> None:
        """Load and check every row.

        Raises:
            OSError: a file cannot be read.
            ValueError: the store is damaged.
        """
        self.dtype = store.decoded_dtype
        self.embedding, self.layers, self.num_slices = store.embedding, store.layers, store.num_slices
        self.hidden_size, self.vocab_size = store.hidden_size, store.vocab_size
        self.index = RowIndex(store)
        self.data = torch.empty(self.index.nbytes, dtype=torch.uint8, device=device, pin_memory=pinned)
        """Rows as they are stored, where `index` says."""
        store.read_packed(self.data, self.index.pitches)
        self._store, self._pinned = store, pinned
        self._decoders: dict[torch.device, RowDecoder] = {}
        self._located: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of rows, without what they are decoded with."""
        return self.data.nbytes

    def bytes_on(self, device: torch.device) -> int:
        """Bytes on a device: rows, if they are there, and as far as it decoded any, what it does so with."""
        held = self.data.nbytes if self.data.device == device else 0
        held += sum(tensor.nbytes for tensor in self._located.get(device, ()))
        return held + (self._decoders[device].nbytes if device in self._decoders else 0)

    def decoder(self, device: torch.device) -> RowDecoder:
        """What decodes these rows on a device, made once."""
        if device not in self._decoders:
            self._decoders[device] = RowDecoder(
                self._store.bands, self._store.tensors, hidden_size=self.hidden_size, device=device
            )
        return self._decoders[device]

    def located(self, device: torch.device) -> tuple[Int64[Tensor, " V"], Int32[Tensor, " V"]]:
        """The byte at which the row of each token begins, and its band, on a device."""
        if device not in self._located:
            self._located[device] = self.index.offset.to(device), self.index.band.to(device)
        return self._located[device]

    def gather(self, token_ids: Int[Tensor, " U"], out: Float[Tensor, "U slices D"]) -> None:
        """As `RowTier.gather`."""
        if self.data.device.type == "cpu":
            token_ids = token_ids.cpu()
        check_gather(self, token_ids, out)
        if self.data.is_cuda or (out.is_cuda and self._pinned):
            self._gather_on_gpu(token_ids, out)
        elif out.device.type == "cpu":
            self._gather(token_ids.long(), out)
        else:
            rows = out.new_empty(out.shape, device="cpu")
            self._gather(token_ids.long(), rows)
            out.copy_(rows)

    def _gather(self, token_ids: Int64[Tensor, " U"], out: Float[Tensor, "U slices D"]) -> None:
        """On the CPU, band by band."""
        index, decoder = self.index, self.decoder(out.device)
        bands = index.band[token_ids]
        for number in bands.unique().tolist():
            start, pitch = index.starts[number], index.pitches[number]
            stop = index.starts[number + 1] if number + 1 < len(index.starts) else index.nbytes
            table = self.data[start:stop].view(-1, pitch)
            chosen = (bands == number).nonzero()[:, 0]
            whole = len(chosen) == len(token_ids)
            for first in range(0, len(chosen), GATHER_ROWS):
                part = chosen[first : first + GATHER_ROWS]
                data = table.index_select(0, index.place[token_ids[part]])
                if whole:
                    decoder.decode_band(data, number, out[first : first + GATHER_ROWS])
                else:
                    rows = out.new_empty((len(part), *out.shape[1:]))
                    decoder.decode_band(data, number, rows)
                    out.index_copy_(0, part, rows)

    def _gather_on_gpu(self, token_ids: Int[Tensor, " U"], out: Float[Tensor, "U slices D"]) -> None:
        device = self.data.device if self.data.is_cuda else out.device
        kernel = self.decoder(device).kernel
        assert kernel is not None
        offset, band = self.located(device)
        ids = token_ids.to(device, non_blocking=True).long()
        rows = out if out.device == device else out.new_empty(out.shape, device=device)
        for first in range(0, len(ids), GATHER_ROWS):
            part, decoded = ids[first : first + GATHER_ROWS], rows[first : first + GATHER_ROWS]
            if self.data.is_cuda:
                kernel.decode(self.data, band, decoded, chosen=part, offset=offset)
                continue
            # Few bytes cross the bus, and become many where they are needed.
            staged = torch.empty((len(part), kernel.pitch), dtype=torch.uint8, device=device)
            kernel.fetch(self.data, staged, chosen=part, count=len(part), band=band, offset=offset)
            kernel.decode(staged.view(-1), band, decoded, chosen=part, pitch=kernel.pitch)
        if rows is not out:
            out.copy_(rows)
