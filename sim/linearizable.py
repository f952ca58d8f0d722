"""Is there an order of all operations upon one register in which each answers as it did?  (Linearizability.)

The order must keep to time: what was answered before another one began comes first.  An operation whose outcome nobody
knows may have happened at any time after it began, or not at all.

Source: Wing & Gong, "Testing and verifying concurrent objects" (1993), with Lowe's memory of states already tried.
"""

from collections.abc import Sequence
from math import inf

import msgspec


class Operation(msgspec.Struct, frozen=True):
    """One operation upon a register, which holds a value or None.  ``returned`` infinity: its outcome is unknown."""

    began: float
    returned: float
    expects: str | None = None
    """What the register holds before it; asked only if ``is_seen``."""
    is_seen: bool = False
    writes: str | None = None
    """What the register holds afterwards; asked only if ``is_write``."""
    is_write: bool = False


def is_linearizable(operations: Sequence[Operation], first: str | None = None) -> bool:
    """Whether there is such an order, for a register that holds ``first`` to begin with."""
    ordered = sorted(operations, key=lambda one: (one.began, one.returned))
    known = sum(1 << place for place, one in enumerate(ordered) if one.returned < inf)
    tried: set[tuple[int, str | None]] = set()
    branches: list[tuple[int, str | None]] = [(0, first)]
    while branches:
        branch = branches.pop()
        if branch in tried:
            continue
        tried.add(branch)
        done, value = branch
        if done & known == known:
            return True
        branches += _next(ordered, done, value)
    return False


def _next(ordered: Sequence[Operation], done: int, value: str | None) -> list[tuple[int, str | None]]:
    """What may come first of what is not ``done``: what began before anything else of it was answered."""
    left = [(place, one) for place, one in enumerate(ordered) if not done >> place & 1]
    until = min(one.returned for _, one in left)
    return [
        (done | 1 << place, one.writes if one.is_write else value)
        for place, one in left
        if one.began <= until and (not one.is_seen or one.expects == value)
    ]
