"""Measurements: resource usage of tasks, requests over front doors, and answers to queries."""

from collections.abc import Collection, Iterable, Mapping, Sequence

from skep.model.door.traffic import COUNT_MAX, REPORTED_MAX, RouteTraffic
from skep.model.measures.readings import QueryAnswer, ServiceRequests
from skep.model.options.autoscaling import TaskUsage
from skep.model.staging.updates import TaskRequests
from skep.model.values.ids import NodeId, ServiceId, TaskId
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
    """Convert requests, except implausible ones, summed by task."""
    found: dict[TaskId, TaskRequests] = {}
    for message in messages:
        one = TaskRequests(
            requests=message.requests,
            errors=min(message.errors, message.requests),
            milliseconds=message.milliseconds,
        )
        if one.is_plausible:
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
    found = (
        RouteTraffic(
            service_id=ServiceId(one.service_id),
            route=one.route,
            seconds=one.milliseconds / 1000,
            requests=one.requests,
            errors=min(one.errors, one.requests),
            buckets=tuple(one.buckets),
        )
        for one in messages[:REPORTED_MAX]
    )
    return tuple(one for one in found if one.is_plausible)


def service_requests_to_pb(
    requests: Mapping[ServiceId, ServiceRequests], node: NodeId | None = None
) -> list[pb.ServiceRequests]:
    return [
        pb.ServiceRequests(
            service_id=id,
            in_flight_thousandths=round(1000 * one.in_flight),
            per_thousand_seconds=round(1000 * one.per_second),
            node_id=node or "",
        )
        for id, one in requests.items()
    ]


def service_requests_from_pb(message: pb.ServiceRequests) -> ServiceRequests:
    return ServiceRequests(
        in_flight=message.in_flight_thousandths / 1000, per_second=message.per_thousand_seconds / 1000
    )


def reported_requests_from_pb(messages: Iterable[pb.ServiceRequests]) -> dict[ServiceId, ServiceRequests]:
    """Convert the report of one node, except implausible numbers."""
    found = {ServiceId(one.service_id): service_requests_from_pb(one) for one in messages}
    return {id: one for id, one in found.items() if one.is_plausible}


def answers_to_pb(answers: Mapping[ServiceId, Mapping[str, QueryAnswer]]) -> list[pb.QueryAnswer]:
    return [
        pb.QueryAnswer(
            service_id=id,
            measure=measure,
            figure=one.figure,
            age_milliseconds=round(1000 * one.age_s),
            problem=one.problem,
        )
        for id, found in answers.items()
        for measure, one in found.items()
    ]


def answer_from_pb(message: pb.QueryAnswer) -> QueryAnswer:
    return QueryAnswer(
        figure=message.figure if message.HasField("figure") else None,
        age_s=message.age_milliseconds / 1000,
        problem=message.problem,
    )


def idle_to_pb(idle: Mapping[ServiceId, float], node_id: str = "") -> list[pb.IdleService]:
    return [
        pb.IdleService(service_id=id, milliseconds=int(1000 * seconds), node_id=node_id)
        for id, seconds in idle.items()
    ]


def idle_from_pb(messages: Iterable[pb.IdleService]) -> dict[NodeId, dict[ServiceId, float]]:
    """Convert idle times, in seconds, by node and service.  A longer one than nodes can have counts as the longest."""
    found: dict[NodeId, dict[ServiceId, float]] = {}
    for message in messages:
        times = found.setdefault(NodeId(message.node_id), {})
        times[ServiceId(message.service_id)] = min(message.milliseconds, COUNT_MAX) / 1000
    return found
