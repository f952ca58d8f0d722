"""Processes that outlive the node process.

Each has a name, a lock that makes it unique, and a pid file to find it again.

The pid file also has the start time of the process, because a pid alone may have been reused.
"""

import ctypes
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from skep import __version__
from skep.errors import FailedPrecondition
from skep.linux import processes
from skep.linux.files import replace_file

# Source: linux/prctl.h.
_PR_SET_NAME = 15
_LOCK_POLL_S = 0.02
"""Seconds between two attempts to take a lock."""


class ProcessIdentity(msgspec.Struct, frozen=True):
    """A process, and its version of skep."""

    pid: int
    start_time: int
    """Clock ticks from boot to its start (field 22 of ``/proc/<pid>/stat``)."""
    version: str = ""


def identify(pid: int, version: str = "") -> ProcessIdentity | None:
    """Return the process with this pid, or None if it does not exist or is a zombie."""
    started = processes.start_ticks_of(pid)
    return None if started is None else ProcessIdentity(pid, started, version)


def is_alive(process: ProcessIdentity) -> bool:
    """Return whether the process runs.  A zombie does not."""
    return processes.start_ticks_of(process.pid) == process.start_time


def open_pidfd(process: ProcessIdentity) -> int | None:
    """Return a descriptor that is readable once ``process`` ends, or None if it has ended.  The caller closes it."""
    return processes.open_pidfd(process.pid, process.start_time)


def write_pid_file(path: Path, process: ProcessIdentity) -> None:
    """Replace the pid file ``path``.  The caller must hold the lock of the process name."""
    replace_file(path, msgspec.json.encode(process), is_durable=False)


def read_pid_file(path: Path) -> ProcessIdentity | None:
    """Return the process named in ``path`` if it is alive, or None.

    Raises: OSError: that cannot be determined now (for example without a free descriptor).
    """
    try:
        process = msgspec.json.decode(path.read_bytes(), type=ProcessIdentity)
    except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    return process if is_alive(process) else None


@contextmanager
def detached(name: str, *, lock: Path, pid_file: Path, lock_wait_s: float = 0.0) -> Iterator[None]:
    """Make this process the node's only process called ``name`` while the context is open.

    Args:
        lock_wait_s: Time to wait for a predecessor that is about to end.

    Raises:
        FailedPrecondition: another process holds the lock.
    """
    set_title(f"skep-{name}")
    with held_lock(lock, wait_s=lock_wait_s):
        this = identify(os.getpid(), __version__)
        assert this is not None, "this process is alive"
        write_pid_file(pid_file, this)
        try:
            yield
        finally:
            pid_file.unlink(missing_ok=True)


@contextmanager
def held_lock(path: Path, *, wait_s: float = 0.0) -> Iterator[None]:
    """Hold ``path`` exclusively.  The kernel releases it however this process ends.  Blocks for about ``wait_s``.

    Raises: FailedPrecondition: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    attempts_left = round(wait_s / _LOCK_POLL_S)
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if not attempts_left:
                    raise FailedPrecondition(f"{path} is held by another process") from error
                attempts_left -= 1
                time.sleep(_LOCK_POLL_S)  # flock has no deadline
        yield


def set_title(title: str) -> None:
    """Set this process's name in ``ps`` and ``top`` (its first 15 bytes)."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, title.encode()[:15], 0, 0, 0)
