"""A claim of the paper beside what was found, and the rule by which a verdict follows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

Verdict = Literal["holds", "holds in direction", "does not hold here", "cannot be told here"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """One row of the table."""

    source: str
    """Where the paper says it."""
    claim: str
    paper: str
    ours: str
    verdict: Verdict
    rule: str
    """What the verdict follows from."""


def verdict_of(signs: Sequence[bool], strong: Sequence[bool]) -> Verdict:
    """`holds` where all are right and strong, `in direction` where most are right, else not."""
    if not signs:
        return "cannot be told here"
    if all(signs) and all(strong):
        return "holds"
    return "holds in direction" if sum(signs) * 2 > len(signs) else "does not hold here"


def percent(change: float) -> str:
    """A change, with its sign."""
    return f"{100 * change:+.1f} %"
