"""Resource usage of tasks, and requests and idle times at the front door, as nodes report them."""

from collections.abc import Collection, Iterable, Mapping

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


def idle_to_pb(idle: Mapping[ServiceId, float], node_id: str = "") -> list[pb.IdleService]:
    return [
        pb.IdleService(service_id=id, milliseconds=int(1000 * seconds), node_id=node_id)
        for id, seconds in idle.items()
    ]


def idle_from_pb(messages: Iterable[pb.IdleService]) -> dict[NodeId, dict[ServiceId, float]]:
    """Convert idle times, in seconds, by node and service."""
    found: dict[NodeId, dict[ServiceId, float]] = {}
    for message in messages:
        times = found.setdefault(NodeId(message.node_id), {})
        times[ServiceId(message.service_id)] = message.milliseconds / 1000
    return found
