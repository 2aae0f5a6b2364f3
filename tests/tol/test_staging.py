"""Staging: no buffer is filled while the GPU may be reading it. The GPU here is a list of copies still to be made."""

import pytest
import torch

from flexmemory.tol import staging
from flexmemory.tol.staging import Staging


@pytest.mark.parametrize("count", [0, 1, 4, 5, 23])
@pytest.mark.parametrize("staging_bytes", [1, 64, 10_000])
def test_late_copies_see_what_was_staged_for_them(count, staging_bytes, monkeypatch):
    asked, events = [], []

    class Event:
        """Copies asked for before `record` are made at the latest when somebody waits for it."""

        def __init__(self):
            self.before = []
            events.append(self)

        def record(self, stream):
            self.before = asked.copy()
            asked.clear()

        def synchronize(self):
            for copy in self.before:
                copy()
            self.before = []

    empty = torch.empty
    monkeypatch.setattr(staging, "STAGING_BYTES", staging_bytes)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    with monkeypatch.context() as patch:  # pinned memory needs a GPU
        patch.setattr(torch, "empty", lambda size, dtype, pin_memory: empty(size, dtype=dtype))
        through = Staging(torch.device("cpu"), row_bytes=16)
    source = torch.randn(23, 2, 2, dtype=torch.float32)
    raw = source.view(torch.uint8).flatten(1)
    sizes = []

    def fill(part, buffer):
        sizes.append(len(buffer))
        buffer.copy_(raw[part])

    out = torch.full((count, 2, 2), float("nan"))
    for _ in range(3):  # buffers are used again
        through.send(
            out,
            fill=fill,
            decode=lambda part, buffer: asked.append(lambda: out[part].view(torch.uint8).flatten(1).copy_(buffer)),
        )
    for event in events:
        event.synchronize()
    assert torch.equal(out, source[:count])
    assert sum(sizes) == 3 * count
    assert max(sizes, default=1) <= max(1, staging_bytes // 16)
