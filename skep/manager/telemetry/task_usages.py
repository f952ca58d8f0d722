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
from skep.model.values.ids import NodeId, TaskId
from skep.store.interface import Store
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.client import ManagerChannel
from skep.wire.convert.usages import usages_from_pb

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
        channel: Callable[[NodeId], ManagerChannel],
    ) -> None:
        """``channel`` returns the link's connection to another manager, or raises Unavailable."""
        self._store = store
        self._own = own
        self._reported_here = reported_here
        self._channel = channel

    async def collect(self) -> Mapping[TaskId, TaskUsage]:
        """Return the current usages.  Managers that do not respond, or whose version lacks such reports,
        are left out.
        """
        managers = [
            node.id
            for node in self._store.view().find(Node)
            if node.manager_status is not None and node.id != self._own
        ]
        async with asyncio.TaskGroup() as group:
            asked = [
                group.create_task(self._of(manager), name=f"usages of {manager}") for manager in managers
            ]
        found: dict[TaskId, TaskUsage] = {}
        for one in asked:
            found |= one.result()
        return {**found, **self._reported_here()}

    async def _of(self, manager: NodeId) -> Mapping[TaskId, TaskUsage]:
        messages: list[skep.TaskUsage] = []
        try:
            async with (
                asyncio.timeout(RESPONSE_S),
                self._channel(manager).stream(methods.COLLECT_USAGES) as call,
            ):
                await call.send(skep.CollectUsagesRequest(), end=True)
                async for message in call:
                    messages += message.usages
        except (SkepError, TimeoutError) as error:
            log.debug("usages not collected", manager=manager, reason=str(error))
        return usages_from_pb(messages)


async def no_usages() -> Mapping[TaskId, TaskUsage]:
    """Return no usages, where nothing is measured."""
    return {}
