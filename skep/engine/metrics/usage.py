"""The engine's metrics: resource usage of containers, and durations of container actions.

Usage is sampled in threads, and only while metrics are requested regularly.

The metrics are named as in cAdvisor, so that existing dashboards work.  For a thousand containers, reading the kernel's
files takes some hundred milliseconds.  So samples are taken in rounds, and a request gets the text of the last round.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar

from skep.aio.clock import Clock
from skep.api.telemetry.exposition import Histogram, Kind, MetricFamily, Sample, label_text, render
from skep.engine.confinement.cgroups import Cgroups
from skep.engine.containers.container import Container
from skep.engine.metrics.stats import Stats, sample
from skep.model.options.labels import LABEL_SERVICE_NAME
from skep.model.values.stacks import stack_of
from skep.model.values.times import SECOND_NS, unix_ns

ROUND_S = 10.0
"""Seconds between two rounds."""
REQUESTED_S = 60.0
"""Seconds for which rounds continue after a request."""
_FIRST_S = 5.0
"""Seconds for which a request waits for the first round."""
_AT_ONCE = 25
"""Number of containers that are read between two pauses for the event loop."""
_PAUSE_S = 0.01
"""Seconds to pause between batches, for other work of the process."""
_TASK = "com.docker.swarm.task.name"
_LABEL_MAX = 256
"""Number of characters that are kept of a label.

A plain container may have longer labels, and about twenty lines repeat each.
"""

P = ParamSpec("P")
R = TypeVar("R")
ACTIONS = ("changes", "commit", "create", "delete", "start")
_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
"""Upper bounds of the histogram's buckets in seconds: the defaults of Prometheus' Go library, which dockerd uses."""


class Used(NamedTuple):
    """A container and its sample."""

    container: Container
    stats: Stats


class UsagePage:
    """The last round, rendered as text."""

    def __init__(self, containers: Callable[[], Sequence[Container]], cgroups: Cgroups, clock: Clock) -> None:
        self._containers = containers
        self._cgroups = cgroups
        self._clock = clock
        self._requested_at = float("-inf")
        self._requested = asyncio.Event()
        self._first = asyncio.Event()
        self._text = b""

    async def text(self) -> bytes:
        """Return metrics of running containers, at most ``ROUND_S`` old if requested regularly."""
        self._requested_at = self._clock.monotonic()
        self._requested.set()
        try:
            async with asyncio.timeout(_FIRST_S):
                await self._first.wait()
        except TimeoutError:
            return b""  # the first round continues, and the next request gets its text
        return self._text

    async def run(self) -> None:
        """Sample while there are requests, until cancelled."""
        while True:
            await self._requested.wait()
            self._text = await asyncio.to_thread(_page, await self._round())
            self._first.set()
            await self._clock.sleep(ROUND_S)
            if self._clock.monotonic() - self._requested_at > REQUESTED_S:
                self._requested.clear()
                self._first.clear()  # the next request must wait, because the text would be too old
                self._text = b""

    async def _round(self) -> list[Used]:
        running = [one for one in self._containers() if one.is_running]
        found: list[Used] = []
        for start in range(0, len(running), _AT_ONCE):
            found += await asyncio.to_thread(self._read, running[start : start + _AT_ONCE])
            await self._clock.sleep(_PAUSE_S)
        return found

    def _read(self, containers: Iterable[Container]) -> list[Used]:
        return [Used(one, sample(one, self._cgroups, self._clock.now_ns())) for one in containers]


def _working_set(stats: Stats) -> int:
    memory = stats.memory_stats
    inactive = memory.stats.get("inactive_file", memory.stats.get("total_inactive_file", 0))
    return max(memory.usage - inactive, 0)


def _page(used: Sequence[Used]) -> bytes:
    return render(families(used))


class _Name(NamedTuple):
    name: str
    kind: Kind
    help: str
    value: Callable[[Stats], float]


_NAMES = (
    _Name("container_cpu_usage_seconds_total", "counter", "Processor time used.",
          lambda one: one.cpu_stats.cpu_usage.total_usage / 1e9),
    _Name("container_cpu_user_seconds_total", "counter", "Processor time used in user mode.",
          lambda one: one.cpu_stats.cpu_usage.usage_in_usermode / 1e9),
    _Name("container_cpu_system_seconds_total", "counter", "Processor time used in kernel mode.",
          lambda one: one.cpu_stats.cpu_usage.usage_in_kernelmode / 1e9),
    _Name("container_cpu_cfs_throttled_seconds_total", "counter", "Time waited because of the CPU limit.",
          lambda one: one.cpu_stats.throttling_data.throttled_time / 1e9),
    _Name("container_memory_usage_bytes", "gauge", "Memory in use, caches included.",
          lambda one: one.memory_stats.usage),
    _Name("container_memory_working_set_bytes", "gauge", "Memory in use without what can be reclaimed at once.",
          _working_set),
    _Name("container_spec_memory_limit_bytes", "gauge", "The memory limit, or without one the node's memory.",
          lambda one: one.memory_stats.limit),
    _Name("container_memory_limit_hits_total", "counter", "Times that the memory limit was reached.",
          lambda one: one.memory_stats.failcnt),
    _Name("container_threads", "gauge", "Processes and threads.", lambda one: one.pids_stats.current),
    _Name("container_fs_reads_bytes_total", "counter", "Bytes read from block devices.",
          lambda one: _moved(one, "read")),
    _Name("container_fs_writes_bytes_total", "counter", "Bytes written to block devices.",
          lambda one: _moved(one, "write")),
)  # fmt: skip

_INTERFACE_NAMES = (
    ("container_network_receive_bytes_total", "Bytes received.", "rx_bytes"),
    ("container_network_transmit_bytes_total", "Bytes sent.", "tx_bytes"),
    ("container_network_receive_packets_dropped_total", "Received packets that were dropped.", "rx_dropped"),
    (
        "container_network_transmit_packets_dropped_total",
        "Packets to be sent that were dropped.",
        "tx_dropped",
    ),
    ("container_network_receive_errors_total", "Errors while receiving.", "rx_errors"),
    ("container_network_transmit_errors_total", "Errors while sending.", "tx_errors"),
)


def families(used: Sequence[Used]) -> list[MetricFamily]:
    """Return all metric families of these containers."""
    named = [(one, labels_of(one.container)) for one in used]
    texts = [(one.stats, label_text(labels)) for one, labels in named]
    found = [
        MetricFamily(name, kind, help, [Sample(labels, value(stats)) for stats, labels in texts])
        for name, kind, help, value in _NAMES
    ]
    found.append(
        MetricFamily(
            "container_start_time_seconds",
            "gauge",
            "When it was started, in seconds since the epoch.",
            [
                Sample(label_text(labels), unix_ns(one.container.started_at) / SECOND_NS)
                for one, labels in named
            ],
        )
    )
    interfaces = [
        (counters, label_text({**labels, "interface": interface}))
        for one, labels in named
        for interface, counters in one.stats.networks.items()
    ]
    return found + [
        MetricFamily(
            name,
            "counter",
            help,
            [Sample(labels, getattr(counters, field)) for counters, labels in interfaces],
        )
        for name, help, field in _INTERFACE_NAMES
    ]


def labels_of(container: Container) -> Mapping[str, str]:
    """Return the container's name, image, service, task and stack.  The last three are empty for a plain container."""
    labels = container.labels
    return {
        "name": container.name,
        "image": container.image,
        "service": labels.get(LABEL_SERVICE_NAME, "")[:_LABEL_MAX],
        "task": labels.get(_TASK, "")[:_LABEL_MAX],
        "stack": stack_of(labels)[:_LABEL_MAX],
    }


def _moved(stats: Stats, operation: str) -> int:
    entries = stats.blkio_stats.io_service_bytes_recursive or ()
    return sum(entry.value for entry in entries if entry.op.lower() == operation)


class ActionTimes:
    """Action durations of one engine since its process began."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._histograms = {action: Histogram(_BOUNDS_S) for action in ACTIONS}

    @contextmanager
    def timed(self, action: str) -> Iterator[None]:
        """Measure the duration of the block as ``action`` (one of ``ACTIONS``), unless the block raises."""
        began = self._clock.monotonic()
        yield
        self._histograms[action].observe(self._clock.monotonic() - began)

    def family(self) -> MetricFamily:
        """Return the metric family, with one histogram per action."""
        samples = [
            sample for action, each in self._histograms.items() for sample in each.samples({"action": action})
        ]
        return MetricFamily(
            "engine_daemon_container_actions_seconds",
            "histogram",
            "Time of actions on containers that succeeded.",
            samples,
        )


class HasActionTimes(Protocol):
    """An engine with ``action_times``."""

    action_times: ActionTimes


S = TypeVar("S", bound=HasActionTimes)


Method = Callable[Concatenate[S, P], Coroutine[Any, Any, R]]


def timed(action: str) -> Callable[[Method[S, P, R]], Method[S, P, R]]:
    """Time each call of a method as ``action``."""

    def decorate(method: Method[S, P, R]) -> Method[S, P, R]:
        @wraps(method)
        async def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
            with self.action_times.timed(action):
                return await method(self, *args, **kwargs)

        return call

    return decorate
