"""Works around versions of runc that lose the soft limit of open files of an exec.

The Go runtime raises the soft limit to the hard limit when a program starts.  runc sets the limits of an exec from
outside, possibly before its child's runtime has started: then the command has the hard limit as its soft limit.  Go
restores the limit since 1.19.9, and runc sets it later since 1.1.13.  So the limit is set repeatedly until the child
becomes the command.

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
"""runc's child needs several milliseconds from the start of its Go runtime to the command."""
_INIT: Final = b"runc:["
"""Prefix of the name of runc's child until it becomes the command."""


def open_files_of(process: dict[str, Any]) -> tuple[int, int] | None:
    """Return soft and hard limit of open files of a process specification, or None if equal or not given."""
    for limit in process.get("rlimits") or ():
        if limit["type"] == "RLIMIT_NOFILE" and limit["soft"] != limit["hard"]:
            return limit["soft"], limit["hard"]
    return None


@contextmanager
def held(process: Path, pids: Callable[[], Collection[int]]) -> Iterator[None]:
    """Hold the limit while the block starts an exec with the specification ``process``.  ``pids``: the container's."""
    limits = open_files_of(msgspec.json.decode(process.read_bytes()))
    if limits is None:
        yield
        return
    done = threading.Event()
    # A thread: the event loop may be busy for longer than runc's child needs.
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
    """Set runc's children's ``limits`` of open files repeatedly until ``done``.  Runs in a thread.

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
    with suppress(OSError, ValueError):  # it has ended
        if Path(f"/proc/{pid}/comm").read_bytes().startswith(_INIT):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
