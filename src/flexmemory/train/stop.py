"""Stopping on a signal without losing work."""

from __future__ import annotations

import signal
from types import FrameType


class StopSignal:
    """While entered, the first SIGINT or SIGTERM is only noted; a second one acts as it did before.

    For the main thread.
    """

    def __init__(self) -> None:
        """Note nothing yet."""
        self.number: int | None = None
        """The signal that asked for a stop."""
        self._previous = {}

    def __enter__(self) -> StopSignal:
        """Start to note signals."""
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        """Handle signals as before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.number = number
        self.__exit__()
