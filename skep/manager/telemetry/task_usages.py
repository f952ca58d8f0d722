"""Collects the resource usage of tasks of autoscaled services from all managers.

Each manager has the reports of the nodes with a session there.  Nothing is stored.  The reader collects the usage when
it decides or explains, so a change of leader loses nothing.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import structlog

from skep.errors import SkepError
from skep.model.door.traffic import RouteTraffic, added
from skep.model.measures.readings import QueryAnswer, ScalingMeasurements, ServiceRequests
from skep.model.node import Node
from skep.model.options.autoscaling import TaskUsage
from skep.model.staging.updates import TaskRequests
from skep.model.values.ids import NodeId, ServiceId, TaskId
from skep.store.interface import Store
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.client import ManagerChannel
from skep.wire.convert.usages import (
    answer_from_pb,
    idle_from_pb,
    requests_from_pb,
    routes_from_pb,
    service_requests_from_pb,
    usages_from_pb,
)

log = structlog.get_logger(__name__)

RESPONSE_S = 2.0
"""Seconds to wait for a manager.  A slower manager is left out, and its nodes' tasks count as not measured."""


class MeasuredHere(Protocol):
    """Reports of nodes with a session at this manager, and the answers that it has as the leader."""

    answers: Mapping[ServiceId, Mapping[str, QueryAnswer]]

    def present(self) -> Mapping[TaskId, TaskUsage]: ...
    def requests(self) -> Mapping[TaskId, TaskRequests]: ...
    def service_requests(self) -> Mapping[ServiceId, Mapping[NodeId, ServiceRequests]]: ...
    def routes(self) -> Sequence[RouteTraffic]: ...
    def idle(self) -> Mapping[NodeId, Mapping[ServiceId, float]]: ...


class TaskUsages:
    """Reads the usage reports of all managers."""

    def __init__(
        self,
        store: Store,
        own: NodeId,
        here: MeasuredHere,
        channel: Callable[[NodeId], ManagerChannel],
    ) -> None:
        """``channel`` returns the link's connection to another manager, or raises Unavailable."""
        self._store = store
        self._own = own
        self._here = here
        self._channel = channel

    async def collect(self) -> ScalingMeasurements:
        """Return the current measurements.  Managers that do not respond, or whose version lacks such reports,
        are left out.
        """
        messages = await self._messages()
        requests: defaultdict[ServiceId, dict[NodeId, ServiceRequests]] = defaultdict(dict)
        answers: defaultdict[ServiceId, dict[str, QueryAnswer]] = defaultdict(dict)
        for message in messages:
            for one in message.service_requests:
                requests[ServiceId(one.service_id)][NodeId(one.node_id)] = service_requests_from_pb(one)
            for each in message.answers:
                answers[ServiceId(each.service_id)][each.measure] = answer_from_pb(each)
        for id, by_node in self._here.service_requests().items():
            requests[id].update(by_node)
        for id, found in self._here.answers.items():
            answers[id].update(found)
        usages = usages_from_pb(one for message in messages for one in message.usages)
        idle = idle_from_pb(one for message in messages for one in message.idle)
        return ScalingMeasurements(
            usages={**usages, **self._here.present()},
            requests=requests,
            answers=answers,
            idle={**idle, **self._here.idle()},
        )

    async def collect_requests(self) -> Mapping[TaskId, TaskRequests]:
        """Return the recent requests of new tasks over all front doors."""
        found = requests_from_pb(one for message in await self._messages() for one in message.requests)
        for id, one in self._here.requests().items():
            found[id] = found.get(id, TaskRequests()) + one
        return found

    async def collect_routes(self) -> Sequence[RouteTraffic]:
        """Return the recent requests by route over all front doors."""
        found = [one for message in await self._messages() for one in routes_from_pb(message.routes)]
        return list(added([*found, *self._here.routes()]))

    async def _messages(self) -> list[skep.TaskUsages]:
        managers = [
            node.id
            for node in self._store.view().find(Node)
            if node.manager_status is not None and node.id != self._own
        ]
        async with asyncio.TaskGroup() as group:
            asked = [
                group.create_task(self._of(manager), name=f"usages of {manager}") for manager in managers
            ]
        return [message for one in asked for message in one.result()]

    async def _of(self, manager: NodeId) -> list[skep.TaskUsages]:
        messages: list[skep.TaskUsages] = []
        try:
            async with (
                asyncio.timeout(RESPONSE_S),
                self._channel(manager).stream(methods.COLLECT_USAGES) as call,
            ):
                await call.send(skep.CollectUsagesRequest(), end=True)
                messages.extend([message async for message in call])
        except (SkepError, TimeoutError) as error:
            log.debug("usages not collected", manager=manager, reason=str(error))
        return messages


async def no_usages() -> ScalingMeasurements:
    """Return nothing, where nothing is measured."""
    return ScalingMeasurements()


async def no_routes() -> Sequence[RouteTraffic]:
    """Return no requests, where no front door is."""
    return ()
