"""Tests that measure need the machine for themselves (``pytest.mark.alone``): other workers of pytest-xdist wait.

Every test holds a lock while it runs, one that is alone holds it for itself.  Who waits for that holds the door, so
that the others do not take turns for ever.
"""

import fcntl
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class Turns:
    """``room`` and ``door``: two files that every worker has; nothing is written."""

    def __init__(self, room: Path, door: Path) -> None:
        self._room, self._door = room, door

    @contextmanager
    def taken(self, *, alone: bool) -> Iterator[None]:
        """Hold the lock, exclusively if ``alone``."""
        with self._room.open() as room:
            with self._door.open() as door:
                fcntl.flock(door, fcntl.LOCK_EX)
                fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            yield

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Waiting is not counted by a test's deadline."""
        with self.taken(alone=item.get_closest_marker("alone") is not None):
            return (yield)
