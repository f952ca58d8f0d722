"""Calls between the pauses of sliced work: the same on any machine, however busy."""

import sys
from collections.abc import Iterable
from types import FrameType


def most_calls_between_pauses(work: Iterable[object]) -> int:
    """Of functions, built in or not."""
    most = calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        for _ in work:
            most, calls = max(most, calls), 0
    finally:
        sys.setprofile(None)
    return max(most, calls)
