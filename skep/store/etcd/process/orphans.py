"""Ensures that one etcd runs on a directory, by a lock, and by ending a process that an earlier manager has left.

A second etcd on the same directory would block silently on etcd's file lock, so Skep's lock is taken first.
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
from skep.linux.files import replace_file
from skep.linux.processes import boot_id, open_pidfd, start_ticks_of

log = structlog.get_logger()

END_S = 5.0
"""Seconds for an earlier manager's etcd to end."""
POLL_S = 0.02
"""Seconds between checks whether it has ended."""


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock of this directory.  Raises FailedPrecondition if another manager has it."""
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
    """Stop the etcd that an earlier manager has started here, if it still runs."""
    recorded = _recorded(directory)
    handle = open_pidfd(*recorded) if recorded is not None else None
    if recorded is None or handle is None:
        return
    pid, _ = recorded
    with suppress(ProcessLookupError):
        try:
            log.warning("stopping an orphaned etcd", pid=pid)
            for stop in (signal.SIGTERM, signal.SIGKILL):
                signal.pidfd_send_signal(handle, stop)
                if await _has_ended(handle, clock):
                    break
        finally:
            os.close(handle)
    remove_pid(directory)


def write_pid(directory: Path, pid: int) -> None:
    """Record the process with its start time and boot id, so that a reused pid is detected."""
    record = f"{pid} {start_ticks_of(pid) or 0} {boot_id()}\n"
    replace_file(directory / "pid", record.encode(), is_durable=False)


def remove_pid(directory: Path) -> None:
    """Remove the record."""
    (directory / "pid").unlink(missing_ok=True)


def _recorded(directory: Path) -> tuple[int, int] | None:
    """Return pid and start time of the recorded process, which may have ended.  None without a record of this boot."""
    try:
        pid, started, boot = (directory / "pid").read_text().split()
        return (int(pid), int(started)) if boot == boot_id() else None
    except (FileNotFoundError, ValueError):
        return None


async def _has_ended(handle: int, clock: Clock) -> bool:
    """Return whether the process ends in time.  A pidfd becomes readable when it ends, even before it is reaped."""
    until = clock.monotonic() + END_S
    while not select.select([handle], [], [], 0)[0]:
        if clock.monotonic() > until:
            return False
        await clock.sleep(POLL_S)
    return True
