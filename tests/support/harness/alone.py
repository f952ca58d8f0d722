"""Tests that measure time need the machine for themselves (``pytest.mark.alone``): other pytest-xdist workers wait.

Every test holds a shared lock (``room``) while it runs, and such a test holds it exclusively.  A worker that waits for
the exclusive lock holds ``door``, so that new shared locks cannot delay it forever.
"""

import fcntl
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class Turns:
    """Locks on ``room`` and ``door``, two files that all workers share.  Nothing is written to them."""

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
        """Wait for the lock before the test's deadline begins."""
        with self.taken(alone=item.get_closest_marker("alone") is not None):
            return (yield)
