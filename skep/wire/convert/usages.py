"""Resource usage of tasks, and their requests over the front door, as nodes report them."""

from collections.abc import Collection, Iterable, Mapping, Sequence

from skep.model.door.traffic import BUCKETS, REPORTED_MAX, ROUTE_CHARACTERS_MAX, RouteTraffic
from skep.model.options.autoscaling import TaskUsage
from skep.model.staging.updates import TaskRequests
from skep.model.values.ids import ServiceId, TaskId
from skep.wire import skep_pb2 as pb


def usages_to_pb(usages: Mapping[TaskId, TaskUsage]) -> list[pb.TaskUsage]:
    return [
        pb.TaskUsage(task_id=id, nano_cpus=usage.nano_cpus, memory_bytes=usage.memory_bytes)
        for id, usage in usages.items()
    ]


def usages_from_pb(
    messages: Iterable[pb.TaskUsage], about: Collection[str] | None = None
) -> dict[TaskId, TaskUsage]:
    """Convert usages, except implausible ones.  If ``about`` is set, convert the usages of these tasks only."""
    found = {}
    for message in messages:
        usage = TaskUsage(nano_cpus=message.nano_cpus, memory_bytes=message.memory_bytes)
        if usage.is_plausible and (about is None or message.task_id in about):
            found[TaskId(message.task_id)] = usage
    return found


def requests_to_pb(requests: Mapping[TaskId, TaskRequests]) -> list[pb.TaskRequests]:
    return [
        pb.TaskRequests(task_id=id, requests=one.requests, errors=one.errors, milliseconds=one.milliseconds)
        for id, one in requests.items()
    ]


def requests_from_pb(messages: Iterable[pb.TaskRequests]) -> dict[TaskId, TaskRequests]:
    """Convert requests, summed by task."""
    found: dict[TaskId, TaskRequests] = {}
    for message in messages:
        one = TaskRequests(
            requests=message.requests,
            errors=min(message.errors, message.requests),
            milliseconds=message.milliseconds,
        )
        found[TaskId(message.task_id)] = found.get(TaskId(message.task_id), TaskRequests()) + one
    return found


def routes_to_pb(routes: Iterable[RouteTraffic]) -> list[pb.RouteTraffic]:
    return [
        pb.RouteTraffic(
            service_id=one.service_id,
            route=one.route,
            milliseconds=round(1000 * one.seconds),
            requests=one.requests,
            errors=one.errors,
            buckets=one.buckets,
        )
        for one in routes
    ]


def routes_from_pb(messages: Sequence[pb.RouteTraffic]) -> tuple[RouteTraffic, ...]:
    """Convert the routes of a report, except implausible ones."""
    return tuple(
        RouteTraffic(
            service_id=ServiceId(one.service_id),
            route=one.route,
            seconds=one.milliseconds / 1000,
            requests=one.requests,
            errors=min(one.errors, one.requests),
            buckets=tuple(one.buckets),
        )
        for one in messages[:REPORTED_MAX]
        if len(one.buckets) == BUCKETS
        and one.milliseconds > 0
        and one.route.isprintable()
        and len(one.route) <= ROUTE_CHARACTERS_MAX
    )
