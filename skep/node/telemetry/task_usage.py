"""Measures the resource use of those tasks of this node that a manager asks about for autoscaling.

It runs independently of heartbeats, which must not wait for the files of a thousand containers.  Processor time is
averaged over ``WINDOW_S``: a shorter window is noisy, a longer one shows a step of the load late.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
import structlog

from skep.aio.clock import Clock
from skep.engine.confinement.cgroups import Cgroups
from skep.engine.containers.container import Container
from skep.engine.metrics.stats import cpu_and_memory
from skep.model.options.autoscaling import TaskUsage
from skep.model.options.labels import LABEL_TASK_ID
from skep.model.values.ids import ContainerId, TaskId

log = structlog.get_logger()

SAMPLE_S = 5.0
"""Seconds between two readings."""
WINDOW_S = 10.0
"""Seconds over which usage is averaged."""
VALID_S = 3 * SAMPLE_S
"""Seconds after which a reading is too old to be reported."""
TASKS_MAX = 1000
"""Limit for the number of tasks.  A manager asks about no more, because the report must fit into one heartbeat."""
_AT_ONCE = 25
"""Number of containers that are read in a row before other work of the event loop."""
_PAUSE_S = 0.01
"""Seconds to pause after each such series, so that the node serves requests in between."""


class UsageReading(msgspec.Struct, frozen=True, kw_only=True):
    """Counters of one container.  ``at`` is in monotonic seconds."""

    container: ContainerId
    at: float
    cpu_ns: int
    memory_bytes: int


def kept(readings: Sequence[UsageReading], new: UsageReading) -> tuple[UsageReading, ...]:
    """Return ``readings`` and ``new``, the oldest first, without readings that the average does not need.

    If the container has changed or a counter has decreased, only ``new`` is kept.
    """
    if readings and (readings[-1].container != new.container or readings[-1].cpu_ns > new.cpu_ns):
        return (new,)
    found = (*readings, new)
    while len(found) > 2 and new.at - found[1].at >= WINDOW_S:
        found = found[1:]
    return found


def usage_of(readings: Sequence[UsageReading], now: float) -> TaskUsage | None:
    """Return a task's use from its readings, or None if there are fewer than two, or they are too old."""
    if len(readings) < 2 or now - readings[-1].at > VALID_S:
        return None
    first, last = readings[0], readings[-1]
    elapsed_s = last.at - first.at
    if elapsed_s <= 0:
        return None
    used = TaskUsage(
        nano_cpus=round((last.cpu_ns - first.cpu_ns) / elapsed_s),  # nanoseconds per second
        memory_bytes=last.memory_bytes,
    )
    return used if used.is_plausible else None


class TaskUsageMeter:
    """Reads the counters of tasks' containers while a manager asks about any."""

    def __init__(self, containers: Callable[[], Sequence[Container]], cgroups: Cgroups, clock: Clock) -> None:
        self._containers = containers
        self._cgroups = cgroups
        self._clock = clock
        self._wanted: frozenset[TaskId] = frozenset()
        self._is_wanted = asyncio.Event()
        self._readings: dict[TaskId, tuple[UsageReading, ...]] = {}

    def measure(self, task_ids: Sequence[TaskId]) -> None:
        """Measure these tasks from now on, and no others."""
        self._wanted = frozenset(task_ids[:TASKS_MAX])
        if self._wanted:
            self._is_wanted.set()
        else:
            self._is_wanted.clear()

    def present(self) -> Mapping[TaskId, TaskUsage]:
        """Return the latest known use of each measured task."""
        now = self._clock.monotonic()
        found = ((id, usage_of(readings, now)) for id, readings in self._readings.items())
        return {id: usage for id, usage in found if usage is not None and id in self._wanted}

    async def run(self) -> None:
        """Measure until cancelled."""
        while True:
            await self._is_wanted.wait()
            await self._round()
            await self._clock.sleep(SAMPLE_S)

    async def _round(self) -> None:
        wanted = [
            (TaskId(id), one)
            for one in self._containers()
            if one.is_running and (id := one.labels.get(LABEL_TASK_ID, "")) in self._wanted
        ]
        found: dict[TaskId, tuple[UsageReading, ...]] = {}
        for start in range(0, len(wanted), _AT_ONCE):
            for id, reading in await asyncio.to_thread(self._read, wanted[start : start + _AT_ONCE]):
                found[id] = kept(self._readings.get(id, ()), reading)
            await self._clock.sleep(_PAUSE_S)
        self._readings = found

    def _read(self, containers: Iterable[tuple[TaskId, Container]]) -> list[tuple[TaskId, UsageReading]]:
        found = []
        for id, container in containers:
            try:
                counters = cpu_and_memory(container, self._cgroups)
            except (OSError, ValueError) as error:  # the task then counts as not measured
                log.debug("usage of a task not read", container=container.name, reason=str(error))
                continue
            if counters is not None:
                reading = UsageReading(
                    container=container.id,
                    at=self._clock.monotonic(),
                    cpu_ns=counters[0],
                    memory_bytes=counters[1],
                )
                found.append((id, reading))
        return found
