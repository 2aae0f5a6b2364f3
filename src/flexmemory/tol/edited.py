"""What a manifest says of rows that were edited (docs/editing.md)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Edited:
    """One edit: patches that were applied together."""

    patches: tuple[str, ...]
    """SHA-256 of each."""
    fingerprint: str
    """Fingerprint of the checkpoint with this edit and those before it: it computes the rows that are stored."""
    tokens: tuple[int, ...]
    """Whose rows it changed."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Edited:
        """From what a manifest says.

        Raises:
            KeyError: it says less.
        """
        return cls(patches=tuple(values["patches"]), fingerprint=values["fingerprint"], tokens=tuple(values["tokens"]))


def edited_tokens(edits: Sequence[Edited]) -> tuple[int, ...]:
    """The tokens whose rows some edit changed, ascending."""
    return tuple(sorted({token for edit in edits for token in edit.tokens}))
