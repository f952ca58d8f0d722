"""Identifies processes: a pid is reused, a pid with its start time is unique until the next boot."""

import ctypes
import os
from pathlib import Path

import msgspec

_PIDFD_GETFD = 438
"""System call number of pidfd_getfd(2), the same on every architecture."""
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class Stat(msgspec.Struct, frozen=True):
    """Fields of ``/proc/<pid>/stat``.  ``start_ticks`` counts clock ticks from boot to the start (field 22)."""

    pid: int
    state: str
    start_ticks: int

    @property
    def has_ended(self) -> bool:
        """Whether the process has ended and only waits to be reaped."""
        return self.state in ("Z", "X")


def parsed_stat(stat: bytes) -> Stat:
    """Parse a stat file.  Its second field, the command in parentheses, may itself contain blanks and parentheses."""
    pid, _, _ = stat.partition(b" ")
    fields = stat[stat.rindex(b")") + 2 :].split()
    return Stat(pid=int(pid), state=fields[0].decode(), start_ticks=int(fields[19]))


def stat_of(pid: int) -> Stat | None:
    """Return the process that has ``pid`` now, ended or not, or None.

    Raises: OSError: it cannot be read now (for example without a free descriptor), but the process may exist.
    """
    try:
        return parsed_stat(Path(f"/proc/{pid}/stat").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return None


def start_ticks_of(pid: int) -> int | None:
    """Return the start time of the process with this pid in clock ticks since boot, or None if it does not exist or is
    a zombie.
    """
    stat = stat_of(pid)
    return None if stat is None or stat.has_ended else stat.start_ticks


def boot_id() -> str:
    """Return the kernel's boot id.  Start times are only comparable within one boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def open_pidfd(pid: int, start_ticks: int) -> int | None:
    """Return a descriptor that is readable once this process ends, or None if it has ended.  The caller closes it."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    # Checked with the descriptor open, so that the number cannot have been reused since.
    if start_ticks_of(pid) == start_ticks:
        return descriptor
    os.close(descriptor)
    return None


def borrowed(pidfd: int, descriptor: int) -> int:
    """Duplicate a descriptor of another process with pidfd_getfd(2), Linux 5.6.  The caller closes it.

    Raises: OSError: EBADF: no such descriptor; EPERM: this process may not trace the other; ESRCH: the other process
    has ended; ENOSYS: the kernel is too old.
    """
    duplicate: int = _libc.syscall(_PIDFD_GETFD, pidfd, descriptor, 0)
    if duplicate < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"pidfd_getfd: {os.strerror(number)}")
    return duplicate
