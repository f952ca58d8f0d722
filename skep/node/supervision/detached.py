"""What a process that outlives its node process does first: a name, a lock, a pid file."""

import ctypes
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from skep import __version__
from skep.aio.clock import SystemClock
from skep.errors import FailedPrecondition
from skep.node.supervision.identity import identify, write_pid_file
from skep.paths import Paths

_PR_SET_NAME = 15
_LOCK_POLL_S = 0.02


@contextmanager
def detached(paths: Paths, name: str, *, lock_wait_s: float = 0.0) -> Iterator[None]:
    """Be *the* process called ``name`` of this node while the context is open.

    Args:
        lock_wait_s: how long a predecessor that is on its way out is waited for.

    Raises:
        FailedPrecondition: another process holds the lock.
    """
    set_title(f"skep-{name}")
    with held_lock(paths.lock_file(name), wait_s=lock_wait_s):
        this = identify(os.getpid(), __version__)
        assert this is not None, "this process is alive"
        write_pid_file(paths.pid_file(name), this)
        try:
            yield
        finally:
            paths.pid_file(name).unlink(missing_ok=True)


@contextmanager
def held_lock(path: Path, *, wait_s: float = 0.0) -> Iterator[None]:
    """Hold ``path`` exclusively; the kernel frees it however this process ends.  Blocks for up to ``wait_s``.

    Raises: FailedPrecondition: somebody else holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    clock = SystemClock()
    deadline = clock.monotonic() + wait_s
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if clock.monotonic() >= deadline:
                    raise FailedPrecondition(f"{path} is held by another process") from error
                time.sleep(_LOCK_POLL_S)  # flock has no deadline of its own
        yield


def set_title(title: str) -> None:
    """What ``ps`` and ``top`` show as this process's name (15 bytes of it)."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, title.encode()[:15], 0, 0, 0)
