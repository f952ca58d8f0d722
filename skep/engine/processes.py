"""Processes that are not our children: found again after a restart, signalled and waited for without a race.

A pid alone may by now belong to another process, so a process is named by pid, start time and boot, and is
handled through a pidfd, which stays with the process it was opened for.
"""

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from skep.engine.container import ProcessName
from skep.linux.descriptors import set_aside_descriptor
from skep.linux.processes import Stat, boot_id, parsed_stat, start_ticks_of, stat_of


def find(pid: int) -> ProcessName | None:
    """The process that has ``pid`` now, None when there is none."""
    stat = stat_of(pid)
    return None if stat is None else _name(stat)


def named(stat: bytes) -> ProcessName:
    """The process whose /proc/PID/stat reads ``stat``."""
    return _name(parsed_stat(stat))


def open_pidfd(process: ProcessName) -> int | None:
    """A descriptor of exactly this process, None when it is gone."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return None
    if find(process.pid) == process:
        return set_aside_descriptor(descriptor)
    os.close(descriptor)
    return None


def is_alive(process: ProcessName) -> bool:
    """Whether it still runs (a zombie does not)."""
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
    """Send a signal to exactly this process.  False when it is gone."""
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
    """Kill everything that ``process`` has started.  It is stopped, and the parent of those whose own has ended.

    What is killed starts nothing more: when no other is found all are, though a frozen one ends when it thaws only.
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
    """Return when the process has ended."""
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
    """Whether the machine has restarted since ``process`` began."""
    return process is not None and process.boot_id != _this_boot()


def _name(stat: Stat) -> ProcessName:
    return ProcessName(stat.pid, stat.start_ticks, _this_boot())


_this_boot = cache(boot_id)
