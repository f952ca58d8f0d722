"""Finds, signals and awaits processes that are not our children, without races and even after a restart.

A pid may belong to another process by now.  So a process is identified by pid, start time and boot id, and is handled
through a pidfd, which always refers to the process for which it was opened.
"""

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from skep.engine.containers.container import ProcessName
from skep.linux.descriptors import set_aside_descriptor
from skep.linux.processes import Stat, boot_id, parsed_stat, start_ticks_of, stat_of


def find(pid: int) -> ProcessName | None:
    """Return the process that has ``pid`` now, or None."""
    stat = stat_of(pid)
    return None if stat is None else _name(stat)


def named(stat: bytes) -> ProcessName:
    """Return the process whose /proc/PID/stat contains ``stat``."""
    return _name(parsed_stat(stat))


def open_pidfd(process: ProcessName) -> int | None:
    """Return a descriptor of exactly this process, or None if it has ended."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return None
    if find(process.pid) == process:
        return set_aside_descriptor(descriptor)
    os.close(descriptor)
    return None


def is_alive(process: ProcessName) -> bool:
    """Return whether the process still runs.  A zombie does not."""
    descriptor = open_pidfd(process)
    if descriptor is None:
        return False
    try:
        signal.pidfd_send_signal(descriptor, 0)
        return start_ticks_of(process.pid) is not None
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)


def send_signal(process: ProcessName, number: int) -> bool:
    """Send a signal to exactly this process.  Return False if it has ended."""
    descriptor = open_pidfd(process)
    if descriptor is None:
        return False
    try:
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)
    return True


def kill_descendants(process: ProcessName) -> None:
    """Kill all descendants of ``process``.

    ``process`` must be stopped, and adopts the children of descendants that end.  A killed process starts no others, so
    all are killed once no new one is found.  A frozen process ends only when it is thawed.
    """
    killed: set[ProcessName] = set()
    while found := [one for one in _descendants(process.pid) if one not in killed]:
        for one in found:
            send_signal(one, signal.SIGKILL)
        killed.update(found)


def _descendants(pid: int) -> Iterator[ProcessName]:
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # it has ended
            for child in map(int, children.read_bytes().split()):
                if (found := find(child)) is not None:
                    yield found
                yield from _descendants(child)


async def wait_gone(process: ProcessName) -> None:
    """Wait until the process has ended."""
    descriptor = open_pidfd(process)
    if descriptor is None:
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    try:
        loop.add_reader(descriptor, ended.set)  # a pidfd becomes readable when its process ends
        try:
            await ended.wait()
        finally:
            loop.remove_reader(descriptor)
    finally:
        os.close(descriptor)


def is_of_earlier_boot(process: ProcessName | None) -> bool:
    """Return whether the machine has rebooted since ``process`` began."""
    return process is not None and process.boot_id != _this_boot()


def _name(stat: Stat) -> ProcessName:
    return ProcessName(stat.pid, stat.start_ticks, _this_boot())


_this_boot = cache(boot_id)
