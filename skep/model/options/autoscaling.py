"""Autoscaling of a service: the settings in its labels, and the leader's last action.

``skep.autoscale=2..10`` enables it.  The other labels set the measures and the delay.  With ``0..10``, the last task
stops after an idle time, and the next request at the front door starts a task.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Final

import msgspec
from msgspec.structs import replace

from skep.errors import InvalidArgument
from skep.model.door.routes import HTTP, has_routes, routes_of
from skep.model.door.settings import AUTOSCALE_REQUESTS, AUTOSCALE_RPS, DOOR_MEASURES
from skep.model.measures.queries import (
    AUTOSCALE_PROMETHEUS,
    AUTOSCALE_QUERY,
    AUTOSCALE_QUEUE,
    AUTOSCALE_QUEUE_EXEC,
    AUTOSCALE_QUEUE_EXEC_IN,
    AUTOSCALE_QUEUE_FIELD,
    COMMAND_LABELS,
    MetricQuery,
    checked_expression,
    checked_field,
    checked_url,
    command_in,
)
from skep.model.options.labels import is_stopped
from skep.model.options.schedules import CRON, CRON_TIME_ZONE, Schedule, check_times, parsed_schedule
from skep.model.service import REPLICAS_MAX, ReplicatedService, ServiceMode, ServiceSpec
from skep.model.values.times import SECOND_NS, duration_ns

AUTOSCALE: Final = "skep.autoscale"
"""Label of replicated services with the smallest and largest number of tasks, such as ``2..10``."""
AUTOSCALE_CPU: Final = "skep.autoscale.cpu"
"""Label with the CPU target in percent of a task's limit.  Without a limit, of its reservation, and without both, of
one processor.
"""
AUTOSCALE_MEMORY: Final = "skep.autoscale.memory"
"""Label with the memory target in percent of a task's limit."""
AUTOSCALE_DOWN_AFTER: Final = "skep.autoscale.down-after"
"""Label with the time for which fewer tasks must suffice before autoscaling removes tasks."""
AUTOSCALE_IDLE_AFTER: Final = "skep.autoscale.idle-after"
"""Label with the time without a request after which autoscaling removes the last task, if the range starts at 0."""
AUTOSCALE_QUERY_TARGET: Final = "skep.autoscale.query-target"
"""Label with the part of that value for one task."""
AUTOSCALE_QUEUE_TARGET: Final = "skep.autoscale.queue-target"
"""Label with the length of the queue for one task."""
AUTOSCALE_SCHEDULE: Final = "skep.autoscale.schedule"
"""Label with cron expressions that are followed by a range, such as ``0 8 * * 1-5 4..10; 0 20 * * * 2..4``."""
AUTOSCALE_TIME_ZONE: Final = "skep.autoscale.time-zone"
"""Label with the time zone of that schedule."""
AUTOSCALE_LABELS: Final = (
    *(AUTOSCALE, AUTOSCALE_CPU, AUTOSCALE_MEMORY, AUTOSCALE_DOWN_AFTER, AUTOSCALE_IDLE_AFTER, *DOOR_MEASURES),
    *(AUTOSCALE_PROMETHEUS, AUTOSCALE_QUERY, AUTOSCALE_QUERY_TARGET),
    *(AUTOSCALE_QUEUE, AUTOSCALE_QUEUE_FIELD, AUTOSCALE_QUEUE_TARGET, *COMMAND_LABELS),
    *(AUTOSCALE_SCHEDULE, AUTOSCALE_TIME_ZONE),
)
_TOGETHER: Final = {
    AUTOSCALE_PROMETHEUS: (AUTOSCALE_QUERY, "sum(my_jobs_waiting)"),
    AUTOSCALE_QUERY: (AUTOSCALE_PROMETHEUS, "http://prometheus.example.org:9090"),
    AUTOSCALE_QUERY_TARGET: (AUTOSCALE_QUERY, "sum(my_jobs_waiting)"),
    AUTOSCALE_QUEUE: (AUTOSCALE_QUEUE_TARGET, "20"),
    AUTOSCALE_QUEUE_FIELD: (AUTOSCALE_QUEUE, "http://queue.example.org/length"),
    AUTOSCALE_QUEUE_EXEC: (AUTOSCALE_QUEUE_TARGET, "20"),
    AUTOSCALE_QUEUE_EXEC_IN: (AUTOSCALE_QUEUE_EXEC, "'redis-cli llen jobs'"),
    AUTOSCALE_TIME_ZONE: (AUTOSCALE_SCHEDULE, "0 8 * * 1-5 4..10"),
}
"""Labels that need another label, with an example of it."""

CPU_DEFAULT: Final = 70
"""Default target in percent.  The rest absorbs the load that grows until a new task runs."""
CPU_MAX: Final = 1000
"""Largest CPU target in percent.  It exceeds 100 because a task without a limit can use more than it reserves, or more
than one processor.
"""
DOWN_AFTER_DEFAULT_S: Final = 300.0
"""Seconds of low load before a service shrinks.  Source: Kubernetes' default for its autoscaler."""
DOWN_AFTER_S_MIN, DOWN_AFTER_S_MAX = 15.0, 24 * 3600.0
"""Smallest and largest value of that label.  Usage is averaged over 10 s, so a shorter time would depend on a single
average.
"""
ENTRIES_MAX: Final = 20
"""Most entries of a schedule.  A week with two changes a day has fourteen."""
_LOOKED_BACK_S: Final = 9 * 366 * 24 * 3600
"""Seconds in which the last due time is searched.  February 29 may be absent for eight years."""
_MINUTE_S: Final = 60
"""Due times are whole minutes."""
IDLE_AFTER_DEFAULT_S: Final = 300.0
"""Seconds without a request before the last task stops.  As long as the default window for fewer tasks."""
IDLE_AFTER_S_MIN, IDLE_AFTER_S_MAX = 15.0, 24 * 3600.0
"""Smallest and largest value of that label.  Nodes report idle times up to ten seconds late, so a shorter time would
often stop a task that has just had a request.
"""
_ONE_CPU: Final = 1_000_000_000
"""A processor in Docker's unit.  Percentages of a task without limit and reservation refer to it."""
_NANO_CPUS_MAX: Final = 4096 * _ONE_CPU
"""No machine has more processors, so a report of more is ignored."""
_MEMORY_BYTES_MAX: Final = 1 << 50
"""No machine has more memory, so a report of more is ignored."""
_RANGE: Final = re.compile(r"([0-9]{1,6})\.\.([0-9]{1,6})")
_PERCENT: Final = re.compile(r"([0-9]{1,4})%?")
_TARGET: Final = re.compile(r"[0-9]{1,12}(?:\.[0-9]{1,6})?", re.ASCII)


class RangeEntry(msgspec.Struct, frozen=True):
    """The least and the most tasks from each due time on."""

    schedule: Schedule
    least: int
    most: int


def entry_at(entries: tuple[RangeEntry, ...], now_s: int) -> RangeEntry | None:
    """Return the entry that was due last at ``now_s``, in seconds since the epoch.  Of two, the later one counts."""
    return _entry_at(entries, now_s - now_s % _MINUTE_S) if entries else None


@lru_cache(maxsize=1024)
def _entry_at(entries: tuple[RangeEntry, ...], minute_s: int) -> RangeEntry | None:
    found, last_s = None, minute_s - _LOOKED_BACK_S
    for one in entries:
        at_s = one.schedule.last_until(last_s - 1, minute_s)
        if at_s is not None:
            found, last_s = one, at_s
    return found


class QueryTarget(msgspec.Struct, frozen=True):
    """A query, and the part of its figure for one task."""

    query: MetricQuery
    target: float


class Autoscaling(msgspec.Struct, frozen=True, kw_only=True):
    """The parsed labels of a service.

    Attributes:
        cpu, memory: Targets in percent, or None if not measured.
        requests, rps: Targets of one task for requests in flight and per second over the front door.
        prometheus, queue: Queries with their targets.
        schedule: Ranges that apply from their due times on.
        is_scheduled: Whether ``least`` and ``most`` are a range of the schedule.
    """

    least: int
    most: int
    cpu: int | None = CPU_DEFAULT
    memory: int | None = None
    requests: float | None = None
    rps: float | None = None
    prometheus: QueryTarget | None = None
    queue: QueryTarget | None = None
    schedule: tuple[RangeEntry, ...] = ()
    is_scheduled: bool = False
    down_after_s: float = DOWN_AFTER_DEFAULT_S
    idle_after_s: float = IDLE_AFTER_DEFAULT_S

    def clamped(self, replicas: int) -> int:
        """Return the nearest number within the range."""
        return min(max(replicas, self.least), self.most)

    @property
    def queries(self) -> dict[str, QueryTarget]:
        """Return the queries that the leader asks, by the name of their measure."""
        found = {"query": self.prometheus, "queue": self.queue}
        return {name: one for name, one in found.items() if one is not None}

    @property
    def counts_requests(self) -> bool:
        """Return whether front doors count the requests of the service."""
        return self.requests is not None or self.rps is not None

    def at(self, now_s: int) -> "Autoscaling":
        """Return the settings with the range of the schedule at ``now_s``, in seconds since the epoch."""
        entry = entry_at(self.schedule, now_s)
        return self if entry is None else replace(self, least=entry.least, most=entry.most, is_scheduled=True)


class TaskUsage(msgspec.Struct, frozen=True, kw_only=True):
    """One task's resource use, as measured by its node.

    ``nano_cpus`` is averaged over some seconds.  ``memory_bytes`` excludes caches that the kernel can reclaim at once.
    """

    nano_cpus: int
    memory_bytes: int

    @property
    def is_plausible(self) -> bool:
        """Return whether a machine can use that much.  Nodes are not trusted, and may report any number."""
        return 0 <= self.nano_cpus <= _NANO_CPUS_MAX and 0 <= self.memory_bytes <= _MEMORY_BYTES_MAX


def autoscaling_of(labels: Mapping[str, str]) -> Autoscaling | None:
    """Return the settings in a service's labels, or None if they are missing or invalid."""
    if AUTOSCALE not in labels:
        # Most services have no such label, and every loop over services calls this function.
        return None
    try:
        return parsed_autoscaling(labels)
    except InvalidArgument:
        return None


def wakes_on_request(labels: Mapping[str, str]) -> bool:
    """Return whether a request at the front door starts a task if the service has none."""
    return may_be_at_zero(labels) and not is_stopped(labels)


def may_be_at_zero(labels: Mapping[str, str]) -> bool:
    """Return whether autoscaling may remove the last task of a service that is not stopped."""
    scaling = autoscaling_of(labels)
    return scaling is not None and not scaling.least


def is_at_zero(spec: ServiceSpec) -> bool:
    """Return whether the service has no tasks until the next request."""
    return spec.mode.replicated is not None and not spec.replicas and wakes_on_request(spec.labels)


def check_autoscaling(spec: ServiceSpec) -> None:
    """Check the service's autoscaling labels.  Raises: InvalidArgument: they cannot be applied."""
    given = [name for name in spec.labels if name == AUTOSCALE or name.startswith(f"{AUTOSCALE}.")]
    if not given:
        return
    for name in given:
        if name not in AUTOSCALE_LABELS:
            raise InvalidArgument(f"unknown label {name}: expected one of {', '.join(AUTOSCALE_LABELS)}")
    if AUTOSCALE not in spec.labels:
        raise InvalidArgument(f"the label {given[0]} needs {AUTOSCALE}, such as {AUTOSCALE}=2..10")
    if spec.mode.name != "replicated":
        raise InvalidArgument(
            f"the label {AUTOSCALE} is for replicated services, not for a {spec.mode.name} one"
        )
    scaling = parsed_autoscaling(spec.labels)
    if scaling.memory is not None and not memory_of_a_task(spec):
        raise InvalidArgument(f"the label {AUTOSCALE_MEMORY} is a percentage of the memory limit: set one")
    counted = [name for name in DOOR_MEASURES if name in spec.labels]
    if counted and not has_routes(spec.labels):
        raise InvalidArgument(
            f"the label {counted[0]} counts HTTP requests over the front door, and the service has no route: run "
            f"skep service expose {spec.name} HOST, or remove {counted[0]}"
        )
    if not scaling.least and all(one.options.redirect not in ("", "https") for one in routes_of(spec.labels)):
        raise InvalidArgument(
            f"the label {AUTOSCALE}={spec.labels[AUTOSCALE]} needs a route of the front door, because only its "
            f"requests start a task again: set {HTTP}=HOST, or use {AUTOSCALE}=1..{scaling.most}"
        )


def nano_cpus_of_a_task(spec: ServiceSpec) -> int:
    """Return the CPU that counts as 100 %: the limit, else the reservation, else one processor."""
    resources = spec.task_template.resources
    if resources is None:
        return _ONE_CPU
    given = [one.nano_cpus for one in (resources.limits, resources.reservations) if one is not None]
    return next(filter(None, given), _ONE_CPU)


def memory_of_a_task(spec: ServiceSpec) -> int:
    """Return the memory that counts as 100 %: the limit, or 0 without a limit."""
    resources = spec.task_template.resources
    return resources.limits.memory_bytes if resources is not None and resources.limits is not None else 0


def with_replicas(spec: ServiceSpec, replicas: int) -> ServiceSpec:
    """Return the spec of a replicated service with another number of tasks."""
    return replace(spec, mode=ServiceMode(replicated=ReplicatedService(replicas=replicas)))


def with_number_kept(spec: ServiceSpec, present: ServiceSpec | None) -> ServiceSpec:
    """Return the autoscaled spec with a number of tasks.  If it has none, it gets the present number, or the smallest
    for a new service.
    """
    scaling = autoscaling_of(spec.labels)
    replicated = spec.mode.replicated
    if present is not None and _leaves_zero(spec, present):
        return with_replicas(spec, scaling.least if scaling is not None else 1)
    if scaling is None or replicated is None or replicated.replicas is not None:
        return spec
    if present is None or present.mode.replicated is None:
        # One task at least, so that a deploy shows whether the service runs.
        return with_replicas(spec, max(scaling.least, 1))
    return with_replicas(spec, scaling.clamped(present.given_replicas) if present.given_replicas else 0)


def _leaves_zero(spec: ServiceSpec, present: ServiceSpec) -> bool:
    """Return whether a service without tasks could be scaled to zero, and with ``spec`` no longer can be.

    Clients send the number that they see, so no request would ever start a task.  A stopped service counts, because
    it keeps its number until it starts.
    """
    replicated = spec.mode.replicated
    return (
        replicated is not None
        and not replicated.replicas
        and not present.given_replicas
        and may_be_at_zero(present.labels)
        and not may_be_at_zero(spec.labels)
    )


def with_number_within_range(spec: ServiceSpec, replicas: int) -> ServiceSpec:
    """Return the spec of another version of a service with its number of tasks, within that version's own range."""
    scaling = autoscaling_of(spec.labels)
    return with_replicas(spec, scaling.clamped(replicas)) if scaling is not None else spec


def with_present_number(spec: ServiceSpec, present: ServiceSpec) -> ServiceSpec:
    """Return the new spec of a deploy.  If the service was and stays autoscaled, it keeps the number of tasks that
    autoscaling chose.
    """
    if autoscaling_of(spec.labels) is not None and autoscaling_of(present.labels) is not None:
        return with_replicas(spec, present.given_replicas) if spec.mode.name == present.mode.name else spec
    return with_number_kept(spec, present)


def parsed_autoscaling(labels: Mapping[str, str]) -> Autoscaling:
    """Parse the labels.  Raises: InvalidArgument: one of them is invalid."""
    return _parsed(tuple((name, labels[name]) for name in AUTOSCALE_LABELS if name in labels))


@lru_cache(maxsize=1024)  # loops ask at every change of a service, and schedules are slow to check
def _parsed(given: tuple[tuple[str, str], ...]) -> Autoscaling:
    labels = dict(given)
    least, most = _range(AUTOSCALE, labels[AUTOSCALE])
    if least and AUTOSCALE_IDLE_AFTER in labels:
        raise InvalidArgument(
            f"the label {AUTOSCALE_IDLE_AFTER} needs a range that starts at 0, such as {AUTOSCALE}=0..{most}"
        )
    for name, (needed, example) in _TOGETHER.items():
        if name in labels and needed not in labels:
            raise InvalidArgument(f"the label {name} needs {needed}, such as {needed}={example}")
    memory = _percent(labels, AUTOSCALE_MEMORY, 100)
    cpu = _percent(labels, AUTOSCALE_CPU, CPU_MAX)
    found = Autoscaling(
        least=least,
        most=most,
        cpu=cpu,
        memory=memory,
        requests=_target(labels, AUTOSCALE_REQUESTS),
        rps=_target(labels, AUTOSCALE_RPS),
        prometheus=_prometheus(labels),
        queue=_queue(labels),
        schedule=_schedule(labels, least, most),
        down_after_s=_duration_s(
            labels, AUTOSCALE_DOWN_AFTER, DOWN_AFTER_DEFAULT_S, (DOWN_AFTER_S_MIN, DOWN_AFTER_S_MAX)
        ),
        idle_after_s=_duration_s(
            labels, AUTOSCALE_IDLE_AFTER, IDLE_AFTER_DEFAULT_S, (IDLE_AFTER_S_MIN, IDLE_AFTER_S_MAX)
        ),
    )
    is_measured = memory is not None or found.counts_requests or found.queries
    return found if is_measured or cpu is not None else replace(found, cpu=CPU_DEFAULT)


def _range(name: str, text: str) -> tuple[int, int]:
    match = _RANGE.fullmatch(text)
    if match is None or not match[0].isascii():
        raise InvalidArgument(
            f"invalid label {name}={text}: expected the fewest and the most tasks, like 2..10"
        )
    least, most = int(match[1]), int(match[2])
    if not most:
        raise InvalidArgument(
            f"invalid label {name}={text}: expected at least 1 as the most tasks. Stop a service with "
            "skep service stop"
        )
    if not least <= most <= REPLICAS_MAX:
        raise InvalidArgument(
            f"invalid label {name}={text}: expected the smaller number first, and at most {REPLICAS_MAX}"
        )
    return least, most


def _prometheus(labels: Mapping[str, str]) -> QueryTarget | None:
    if AUTOSCALE_PROMETHEUS not in labels:
        return None
    query = MetricQuery(
        url=checked_url(AUTOSCALE_PROMETHEUS, labels[AUTOSCALE_PROMETHEUS]),
        expression=checked_expression(AUTOSCALE_QUERY, labels[AUTOSCALE_QUERY]),
    )
    if (target := _target(labels, AUTOSCALE_QUERY_TARGET)) is None:
        raise InvalidArgument(
            f"the label {AUTOSCALE_QUERY} needs {AUTOSCALE_QUERY_TARGET}, such as {AUTOSCALE_QUERY_TARGET}=100"
        )
    return QueryTarget(query, target)


def _queue(labels: Mapping[str, str]) -> QueryTarget | None:
    target = _target(labels, AUTOSCALE_QUEUE_TARGET)
    if target is None:
        return None
    if AUTOSCALE_QUEUE_EXEC in labels:
        return QueryTarget(_command(labels), target)
    if AUTOSCALE_QUEUE not in labels:
        raise InvalidArgument(
            f"the label {AUTOSCALE_QUEUE_TARGET} needs {AUTOSCALE_QUEUE}, such as "
            f"{AUTOSCALE_QUEUE}=http://queue.example.org/length, or {AUTOSCALE_QUEUE_EXEC}"
        )
    field = labels.get(AUTOSCALE_QUEUE_FIELD)
    query = MetricQuery(
        url=checked_url(AUTOSCALE_QUEUE, labels[AUTOSCALE_QUEUE]),
        field=checked_field(AUTOSCALE_QUEUE_FIELD, field) if field is not None else "",
    )
    return QueryTarget(query, target)


def _command(labels: Mapping[str, str]) -> MetricQuery:
    if AUTOSCALE_QUEUE in labels:
        raise InvalidArgument(
            f"the labels {AUTOSCALE_QUEUE} and {AUTOSCALE_QUEUE_EXEC} are two ways to the length: remove one"
        )
    return command_in(labels)


def _schedule(labels: Mapping[str, str], least: int, most: int) -> tuple[RangeEntry, ...]:
    """Return the ranges of the schedule, each within the range of the service."""
    if AUTOSCALE_SCHEDULE not in labels:
        return ()
    entries = labels[AUTOSCALE_SCHEDULE].split(";")
    if len(entries) > ENTRIES_MAX:
        raise InvalidArgument(
            f"invalid label {AUTOSCALE_SCHEDULE}: it has {len(entries)} entries, {ENTRIES_MAX} are possible"
        )
    found = []
    for entry in entries:
        expression, _, text = entry.strip().rpartition(" ")
        if not expression or ".." not in text:
            raise InvalidArgument(
                f"invalid label {AUTOSCALE_SCHEDULE}={entry.strip()}: expected a cron expression and a range, like "
                "0 8 * * 1-5 4..10"
            )
        fewest, largest = _range(AUTOSCALE_SCHEDULE, text)
        if fewest < least or largest > most:
            raise InvalidArgument(
                f"invalid label {AUTOSCALE_SCHEDULE}={entry.strip()}: {text} is not within "
                f"{AUTOSCALE}={least}..{most}: widen that range"
            )
        names = (AUTOSCALE_SCHEDULE, AUTOSCALE_TIME_ZONE)
        schedule = _schedule_in(expression.strip(), labels.get(AUTOSCALE_TIME_ZONE), names)
        found.append(RangeEntry(schedule, fewest, largest))
    return tuple(found)


def _target(labels: Mapping[str, str], name: str) -> float | None:
    text = labels.get(name)
    if text is None:
        return None
    if _TARGET.fullmatch(text) is None or not float(text):
        raise InvalidArgument(
            f"invalid label {name}={text}: expected a number above 0, which is the part of one task"
        )
    return float(text)


def _percent(labels: Mapping[str, str], name: str, largest: int) -> int | None:
    text = labels.get(name)
    if text is None:
        return None
    match = _PERCENT.fullmatch(text)
    if match is None or not text.isascii() or not 1 <= int(match[1]) <= largest:
        raise InvalidArgument(f"invalid label {name}={text}: expected a percentage from 1 to {largest}")
    return int(match[1])


def _duration_s(
    labels: Mapping[str, str], name: str, default_s: float, bounds_s: tuple[float, float]
) -> float:
    text = labels.get(name)
    if text is None:
        return default_s
    least_s, most_s = bounds_s
    duration = duration_ns(text)
    if duration is None or not least_s * SECOND_NS <= duration <= most_s * SECOND_NS:
        raise InvalidArgument(
            f"invalid label {name}={text}: expected a duration from {least_s:g}s to {most_s / 3600:g}h"
        )
    return duration / SECOND_NS


def _schedule_in(expression: str, zone: str | None, names: tuple[str, str]) -> Schedule:
    """Return the schedule of one cron expression.

    Args:
        names: The labels of the expression and of the time zone, for errors.

    Raises:
        InvalidArgument: The expression or the zone is invalid.
    """
    labels = {CRON: expression} | ({} if zone is None else {CRON_TIME_ZONE: zone})
    try:
        schedule = parsed_schedule(labels)
        check_times(schedule)
    except InvalidArgument as error:
        text = str(error).replace(CRON_TIME_ZONE, names[1])
        raise InvalidArgument(text.replace(CRON, names[0])) from None
    return schedule
