"""Collects the resource usage of tasks of autoscaled services from all managers.

Each manager has the reports of the nodes with a session there.  Nothing is stored.  The reader collects the usage when
it decides or explains, so a change of leader loses nothing.
"""

import asyncio
from collections.abc import Callable, Mapping

import structlog

from skep.errors import SkepError
from skep.model.node import Node
from skep.model.options.autoscaling import TaskUsage
from skep.model.staging.updates import TaskRequests
from skep.model.values.ids import NodeId, ServiceId, TaskId
from skep.store.interface import Store
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.client import ManagerChannel
from skep.wire.convert.usages import idle_from_pb, requests_from_pb, usages_from_pb

log = structlog.get_logger(__name__)

RESPONSE_S = 2.0
"""Seconds to wait for a manager.  A slower manager is left out, and its nodes' tasks count as not measured."""


class TaskUsages:
    """Reads the usage reports of all managers."""

    def __init__(
        self,
        store: Store,
        own: NodeId,
        reported_here: Callable[[], Mapping[TaskId, TaskUsage]],
        requests_here: Callable[[], Mapping[TaskId, TaskRequests]],
        channel: Callable[[NodeId], ManagerChannel],
        idle_here: Callable[[], Mapping[NodeId, Mapping[ServiceId, float]]] = dict,
    ) -> None:
        """``channel`` returns the link's connection to another manager, or raises Unavailable."""
        self._store = store
        self._own = own
        self._reported_here = reported_here
        self._requests_here = requests_here
        self._channel = channel
        self._idle_here = idle_here

    async def collect(self) -> Mapping[TaskId, TaskUsage]:
        """Return the current usages.  Managers that do not respond, or whose version lacks such reports,
        are left out.
        """
        found = usages_from_pb(one for message in await self._messages() for one in message.usages)
        return {**found, **self._reported_here()}

    async def collect_requests(self) -> Mapping[TaskId, TaskRequests]:
        """Return the recent requests of new tasks over all front doors."""
        found = requests_from_pb(one for message in await self._messages() for one in message.requests)
        for id, one in self._requests_here().items():
            found[id] = found.get(id, TaskRequests()) + one
        return found

    async def collect_idle(self) -> Mapping[NodeId, Mapping[ServiceId, float]]:
        """Return the seconds without a request of services that may be scaled to zero, by node."""
        found = idle_from_pb(one for message in await self._messages() for one in message.idle)
        return {**found, **self._idle_here()}

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


async def no_usages() -> Mapping[TaskId, TaskUsage]:
    """Return no usages, where nothing is measured."""
    return {}


async def no_idle_times() -> Mapping[NodeId, Mapping[ServiceId, float]]:
    """Return no idle times, where no front door is."""
    return {}
