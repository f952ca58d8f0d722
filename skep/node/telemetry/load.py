"""Measures and smooths the load of this node.

It is sent with every heartbeat, and the scheduler uses it to choose among otherwise equal nodes.

The load is the used share of the scarcer of two resources: processors (time that was not idle, including stolen time)
and memory (without caches, which can be reclaimed).  It is an exponentially weighted average (``TIME_CONSTANT_S``), so
that a short burst of work counts little and half a minute of work counts much.  Nothing is reported during the first
time constant, because a node process is busy with its own start.

Normally the whole machine is measured.  If this process runs in the parent cgroup of its containers, the machine is
shared with other nodes (a playground).  Then this cgroup is measured, relative to all processors and the memory that
the node offers.

Source: proc(5), /proc/stat and /proc/meminfo; the kernel's cgroup-v1/cpuacct and cgroup-v2 documents.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import msgspec
import structlog

from skep.aio.clock import Clock
from skep.engine.confinement.cgroups import Cgroups
from skep.engine.metrics.stats import flat_keyed
from skep.model.values.times import SECOND_NS
from skep.node.host.machine import Machine

log = structlog.get_logger()

TIME_CONSTANT_S = 30.0
"""Seconds after which the average has followed 63 % of a lasting change (95 % after three times as long)."""
SAMPLE_S = 5.0
"""Shortest time in seconds between two measurements."""

_IDLE, _IOWAIT, _STEAL = 3, 4, 7
"""Positions of fields in the first line of /proc/stat, after the name.

The fields after ``steal`` are already counted in ``user``.
"""


class LoadReading(msgspec.Struct, frozen=True, kw_only=True):
    """The counters of processors and memory at one moment."""

    busy: float
    """Processor time used since some past moment, in any unit."""
    capacity: float
    """Processor time available since then, in the same unit."""
    memory: float
    """Share of the memory in use now."""


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """The average so far, and the last reading.  Times are monotonic seconds of the caller's clock."""

    reading: LoadReading
    since: float
    at: float
    load: float | None = None
    """The average, 0 to 1.  None after the first reading, because a load needs two."""

    def reported(self, now: float) -> float | None:
        """Return the load to report at ``now``, or None before one time constant has passed."""
        return self.load if now - self.since >= TIME_CONSTANT_S else None


def share(before: LoadReading, now: LoadReading) -> float:
    """Return the used share of the scarcer resource between two readings, 0 to 1."""
    capacity = now.capacity - before.capacity
    processors = (now.busy - before.busy) / capacity if capacity > 0 else 0.0
    return min(max(processors, now.memory, 0.0), 1.0)


def smoothed(average: float, share: float, elapsed_s: float) -> float:
    """Return the new average after ``share`` was in use for ``elapsed_s``.

    Splitting the time into shorter steps does not change the result.
    """
    return average + (share - average) * -math.expm1(-elapsed_s / TIME_CONSTANT_S)


Smoothing: TypeAlias = Callable[[float, float, float], float]


def measured(
    before: Measured | None, reading: LoadReading, now: float, smooth: Smoothing = smoothed
) -> Measured:
    """Return the average with one more reading."""
    if before is None:
        return Measured(reading=reading, since=now, at=now)
    part = share(before.reading, reading)
    load = part if before.load is None else smooth(before.load, part, now - before.at)
    return Measured(reading=reading, since=before.since, at=now, load=load)


def reading_of_machine(stat: str, meminfo: str) -> LoadReading:
    """Parse the texts of /proc/stat and /proc/meminfo.  Raises: ValueError, LookupError: unexpected content."""
    ticks = [int(word) for word in stat.partition("\n")[0].split()[1 : _STEAL + 2]]
    memory = {
        name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in meminfo.splitlines())
    }
    return LoadReading(
        busy=sum(ticks) - ticks[_IDLE] - ticks[_IOWAIT],
        capacity=sum(ticks),
        memory=1 - memory["MemAvailable"] / memory["MemTotal"],
    )


class LoadMeter:
    """Keeps the average load of one node.  Measures only when called, so it costs nothing without a session."""

    def __init__(self, read: Callable[[float], LoadReading], clock: Clock) -> None:
        """``read`` returns the counters at the given time.

        While it raises OSError, ValueError or LookupError, the load is None.
        """
        self._read = read
        self._clock = clock
        self._measured: Measured | None = None
        self._is_readable = True

    def load(self) -> float | None:
        """Return the load to report now, 0 to 1, or None if it is not known yet."""
        now = self._clock.monotonic()
        if self._measured is None or now - self._measured.at >= SAMPLE_S:
            try:
                self._measured = measured(self._measured, self._read(now), now)
            except (OSError, ValueError, LookupError) as error:
                if self._is_readable:
                    log.warning("node load cannot be measured", error=str(error))
                self._is_readable, self._measured = False, None
                return None
            self._is_readable = True
        return self._measured.reported(now)


def reader_of(machine: Machine, cgroups: Cgroups) -> Callable[[float], LoadReading]:
    """Return the function that reads this node's counters, from its cgroup or from the machine (see the module)."""
    if cgroups.hold_this_process():
        return lambda now: _reading_of_group(machine, cgroups, now)
    return lambda _: reading_of_machine(Path("/proc/stat").read_text(), Path("/proc/meminfo").read_text())


def _reading_of_group(machine: Machine, cgroups: Cgroups, now: float) -> LoadReading:
    processors, memory = cgroups.parent_directory("cpuacct"), cgroups.parent_directory("memory")
    if cgroups.is_v2:
        busy = flat_keyed((processors / "cpu.stat").read_text())["usage_usec"] / 1e6
        used, cache = "memory.current", "inactive_file"
    else:
        busy = int((processors / "cpuacct.usage").read_text()) / SECOND_NS
        used, cache = "memory.usage_in_bytes", "total_inactive_file"
    in_use = int((memory / used).read_text()) - flat_keyed((memory / "memory.stat").read_text())[cache]
    return LoadReading(busy=busy, capacity=now * machine.cpus, memory=in_use / machine.memory_bytes)
