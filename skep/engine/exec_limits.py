"""The soft limit of open files of an exec, which some versions of runc lose.

The Go runtime raises the soft limit to the hard one when a program begins.  runc sets the limits of an exec from
outside, perhaps before its child's runtime has begun: then the command has the hard limit as its soft one.  Go restores
the limit since 1.19.9, and runc sets it later since 1.1.13.  Until the child becomes the command, its limit is set
again and again.

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
"""runc's child needs several milliseconds from the begin of its Go runtime to the command."""
_INIT: Final = b"runc:["
"""What the name of runc's child begins with, until it becomes the command."""


def open_files_of(process: dict[str, Any]) -> tuple[int, int] | None:
    """Return the soft and hard limit of open files of a process specification.  None: they are equal or not given."""
    for limit in process.get("rlimits") or ():
        if limit["type"] == "RLIMIT_NOFILE" and limit["soft"] != limit["hard"]:
            return limit["soft"], limit["hard"]
    return None


@contextmanager
def held(process: Path, pids: Callable[[], Collection[int]]) -> Iterator[None]:
    """In the block, an exec with the specification ``process`` is started in the container with these ``pids``."""
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
    """Give runc's children their ``limits`` of open files until ``done``.  For a thread.

    Args:
        pids: the processes of the container.
        before: those that were there before the exec.
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
