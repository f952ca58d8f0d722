"""One etcd per directory: our own lock, and the process that an earlier manager may have left behind.

A second etcd on the same directory would wait for etcd's file lock without a word, so ours is taken first.
"""

import fcntl
import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog

from skep.aio.clock import Clock
from skep.errors import FailedPrecondition

log = structlog.get_logger()

END_S = 5.0
POLL_S = 0.02


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold this directory.  Raises: FailedPrecondition: another manager does."""
    handle = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FailedPrecondition(f"another manager runs on {directory}") from error
        yield
    finally:
        os.close(handle)


async def end_orphan(directory: Path, clock: Clock) -> None:
    """End the etcd that an earlier manager started here, if it still runs."""
    pid = _recorded(directory)
    if pid is None:
        return
    with suppress(ProcessLookupError):
        handle = os.pidfd_open(pid)
        try:
            # Asked after the descriptor is open: the number cannot have gone to another process since.
            if _recorded(directory) != pid:
                return
            log.warning("ending an etcd left behind", pid=pid)
            for ask in (signal.SIGTERM, signal.SIGKILL):
                signal.pidfd_send_signal(handle, ask)
                if await _has_ended(handle, clock):
                    break
        finally:
            os.close(handle)
    remove_pid(directory)


def write_pid(directory: Path, pid: int) -> None:
    """Record the process with the time it started, so that a reused number is recognized."""
    beside = directory / "pid.new"
    beside.write_text(f"{pid} {started_at(pid)}\n")
    beside.rename(directory / "pid")


def remove_pid(directory: Path) -> None:
    """No process of ours runs here any more."""
    (directory / "pid").unlink(missing_ok=True)


def started_at(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(stat.rpartition(")")[2].split()[19])


def _recorded(directory: Path) -> int | None:
    """The recorded process, if it is still that one."""
    try:
        pid, started = map(int, (directory / "pid").read_text().split())
    except (FileNotFoundError, ValueError):
        return None
    return pid if started and started_at(pid) == started else None


async def _has_ended(handle: int, clock: Clock) -> bool:
    """A descriptor of a process becomes readable when it ends, whether or not anybody has reaped it."""
    until = clock.monotonic() + END_S
    while not select.select([handle], [], [], 0)[0]:
        if clock.monotonic() > until:
            return False
        await clock.sleep(POLL_S)
    return True
