"""Reaps orphaned processes.

A conmon process detaches from its parent and is adopted by the nearest subreaper.  That would be pid 1, which often
does not reap if it is in a container or a playground.  So the node process becomes the subreaper.  asyncio reaps the
node process's own children at once, so a zombie that is found twice, seconds apart, must be an orphan.
"""

import ctypes
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from skep.aio.clock import Clock, tick
from skep.linux.processes import stat_of

# Source: linux/prctl.h.
_PR_SET_CHILD_SUBREAPER = 36
_LOOK_EVERY_S = 5.0
"""Seconds between checks for zombies.  A zombie only costs an entry in the kernel's process table."""


def adopt_orphans() -> None:
    """Make this process a subreaper: the parent of all descendants whose own parent ends."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


async def reap_orphans(clock: Clock) -> None:
    """Reap orphans every 5 s until cancelled."""
    seen: frozenset[int] = frozenset()
    while True:
        await tick(clock, _LOOK_EVERY_S)
        zombies = frozenset(pid for pid in _children() if _is_zombie(pid)) if _has_zombie() else frozenset()
        _reap(zombies & seen)
        seen = zombies - seen


def _has_zombie() -> bool:
    """Return whether any child has ended and was not reaped.  One call of the kernel, unlike the list of children."""
    try:
        return os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # there are no children
        return False


def _reap(pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def _children() -> list[int]:
    """Return the pids of this process's children, or none if the kernel does not list them."""
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):
            found += map(int, (task / "children").read_text().split())
    return found


def _is_zombie(pid: int) -> bool:
    try:
        stat = stat_of(pid)
    except OSError:  # the next round retries
        return False
    return stat is not None and stat.has_ended
