"""Checks that the operations on one register are linearizable.

They are linearizable if they can be ordered so that each operation has its observed result, and comes after all
operations that returned before it began.  An operation of unknown outcome may take effect at any time after it began,
or never.

Source: Wing & Gong, "Testing and verifying concurrent objects" (1993), with Lowe's cache of visited states.
"""

from collections.abc import Sequence
from math import inf

import msgspec


class Operation(msgspec.Struct, frozen=True):
    """One operation on a register, which holds a value or None.  ``returned`` is infinity if the outcome is unknown."""

    began: float
    returned: float
    expects: str | None = None
    """Value before the operation.  Only valid if ``is_seen``."""
    is_seen: bool = False
    writes: str | None = None
    """Value after the operation.  Only valid if ``is_write``."""
    is_write: bool = False


def is_linearizable(operations: Sequence[Operation], first: str | None = None) -> bool:
    """Return whether the operations are linearizable for a register whose initial value is ``first``."""
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
    """Return the operations that may be next: those not ``done`` that began before any other of them returned."""
    left = [(place, one) for place, one in enumerate(ordered) if not done >> place & 1]
    until = min(one.returned for _, one in left)
    return [
        (done | 1 << place, one.writes if one.is_write else value)
        for place, one in left
        if one.began <= until and (not one.is_seen or one.expects == value)
    ]
