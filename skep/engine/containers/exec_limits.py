"""Works around versions of runc that lose the soft limit of open files of an exec.

When a Go program starts, its runtime raises the soft limit to the hard limit.  runc sets the limits of an exec's child
process from outside.  If it does so before the child's Go runtime has started, the command ends up with the hard limit
as its soft limit.  (Go restores the limit since 1.19.9, and runc sets it later since 1.1.13.)  So this module sets the
limit repeatedly until the child becomes the command.

Source: opencontainers/runc#4195; golang/go#46279.
"""

import resource
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import msgspec

from skep.errors import SkepError

_PERIOD_S: Final = 0.0005
"""Seconds between two settings.

runc's child needs several milliseconds from the start of its Go runtime to the command.
"""
_INIT: Final = b"runc:["
"""Prefix of the name of runc's child until it becomes the command."""


def open_files_of(process: dict[str, Any]) -> tuple[int, int] | None:
    """Return the soft and hard limit of open files in a process specification.  None if unset or if both are equal."""
    for limit in process.get("rlimits") or ():
        if limit["type"] == "RLIMIT_NOFILE" and limit["soft"] != limit["hard"]:
            return limit["soft"], limit["hard"]
    return None


@contextmanager
def held(process: Path, pids: Callable[[], Collection[int]]) -> Iterator[None]:
    """Keep the limit of open files set while the block starts an exec.

    ``process`` is the file with the exec's process specification.  ``pids`` returns the container's processes.
    """
    limits = open_files_of(msgspec.json.decode(process.read_bytes()))
    if limits is None:
        yield
        return
    done = threading.Event()
    # In a thread, because the event loop may be busy for longer than runc's child needs.
    threading.Thread(target=hold, args=(pids, pids(), limits, done), name="open files", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def hold(
    pids: Callable[[], Collection[int]],
    before: Collection[int],
    limits: tuple[int, int],
    done: threading.Event,
) -> None:
    """Set the ``limits`` of open files of runc's child processes repeatedly until ``done`` is set.  Runs in a thread.

    Args:
        pids: Returns the processes of the container.
        before: Processes that existed before the exec.
    """
    while not done.wait(_PERIOD_S):
        with suppress(OSError, SkepError):
            for pid in pids():
                if pid not in before:
                    _limit(pid, limits)


def _limit(pid: int, limits: tuple[int, int]) -> None:
    with suppress(OSError, ValueError):  # the process has ended
        if Path(f"/proc/{pid}/comm").read_bytes().startswith(_INIT):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
