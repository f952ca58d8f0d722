"""Which process a pid means: pids are reused, a pid with its start time is not."""

from pathlib import Path

import msgspec

from skep.linux import processes
from skep.linux.files import replace_file


class ProcessIdentity(msgspec.Struct, frozen=True):
    """A process, and the version of skep it runs."""

    pid: int
    start_time: int
    """Clock ticks from boot to its start (field 22 of ``/proc/<pid>/stat``)."""
    version: str = ""


def identify(pid: int, version: str = "") -> ProcessIdentity | None:
    """The process that has ``pid`` now; None: there is none, or it has ended and waits to be reaped."""
    started = processes.start_ticks_of(pid)
    return None if started is None else ProcessIdentity(pid, started, version)


def is_alive(process: ProcessIdentity) -> bool:
    found = identify(process.pid)
    return found is not None and found.start_time == process.start_time


def open_pidfd(process: ProcessIdentity) -> int | None:
    """A descriptor that becomes readable when ``process`` ends; None: it has ended.  The caller closes it."""
    return processes.open_pidfd(process.pid, process.start_time)


def write_pid_file(path: Path, process: ProcessIdentity) -> None:
    """Replace ``path``; its writer holds the lock of that name."""
    replace_file(path, msgspec.json.encode(process), is_durable=False)


def read_pid_file(path: Path) -> ProcessIdentity | None:
    """The process named in ``path``, if it still lives.

    Raises: OSError: that cannot be found out now (no descriptor is free, say).
    """
    try:
        process = msgspec.json.decode(path.read_bytes(), type=ProcessIdentity)
    except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    return process if is_alive(process) else None
