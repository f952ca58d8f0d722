"""Which process a pid means: pids are reused, a pid with its start time is not."""

import os
from pathlib import Path

import msgspec


class ProcessIdentity(msgspec.Struct, frozen=True):
    """A process, and the version of skep it runs."""

    pid: int
    start_time: int
    """Clock ticks from boot to its start (field 22 of ``/proc/<pid>/stat``)."""
    version: str = ""


def identify(pid: int, version: str = "") -> ProcessIdentity | None:
    """The process that has ``pid`` now; None: there is none, or it has ended and waits to be reaped."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()  # the name before it may hold blanks and parentheses
    return None if fields[0] in (b"Z", b"X") else ProcessIdentity(pid, int(fields[19]), version)


def is_alive(process: ProcessIdentity) -> bool:
    found = identify(process.pid)
    return found is not None and found.start_time == process.start_time


def open_pidfd(process: ProcessIdentity) -> int | None:
    """A descriptor that becomes readable when ``process`` ends; None: it has ended.  The caller closes it."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return None
    if is_alive(process):  # looked at after the descriptor is held: it means this process and no later one
        return descriptor
    os.close(descriptor)
    return None


def write_pid_file(path: Path, process: ProcessIdentity) -> None:
    """Replace ``path``; a reader sees the old or the new content."""
    beside = path.with_name(f"{path.name}.{process.pid}")
    beside.write_bytes(msgspec.json.encode(process))
    beside.rename(path)


def read_pid_file(path: Path) -> ProcessIdentity | None:
    """The process named in ``path``, if it still lives."""
    try:
        process = msgspec.json.decode(path.read_bytes(), type=ProcessIdentity)
    except (OSError, msgspec.DecodeError):
        return None
    return process if is_alive(process) else None
