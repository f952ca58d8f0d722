"""Removes the cluster's objects from this node: tasks, plain containers' network attachments, overlay networks."""

import asyncio

import structlog

from skep.agent.executor.attaching import is_attachment
from skep.agent.executor.interface import Executor
from skep.agent.session.probe_stream import ProbeSource
from skep.agent.session.session_state import SessionState
from skep.agent.tasks.worker import Worker
from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.dataplane.tables.network_tables import NetworkTables
from skep.errors import SkepError
from skep.model.node_reports.conditions import ConditionName
from skep.node.host.conditions import Conditions

log = structlog.get_logger()

_REMOVAL_TIMEOUT_S = 60.0
"""Time limit in seconds for removing the tasks of a node that leaves its cluster."""
_RELEASE_TIMEOUT_S = 5.0
"""Time limit in seconds for releasing the endpoints of plain containers.

It may be short, because a manager also notices that a container is gone.
"""


class NodeWork:
    """The cluster's work on this node.

    Args:
        session: The node's session with its managers.
        probes: Probes other nodes, or None.
    """

    def __init__(
        self,
        worker: Worker,
        executor: Executor,
        tables: NetworkTables,
        clock: Clock,
        conditions: Conditions,
        *,
        session: SessionState,
        probes: ProbeSource | None,
    ) -> None:
        self._worker = worker
        self._executor = executor
        self._tables = tables
        self._clock = clock
        self._conditions = conditions
        self._session = session
        self._probes = probes

    async def release_attachments(self) -> None:
        """Detach plain containers from cluster networks.

        After 5 s, the remaining endpoints are left to the removal of the node.
        """
        try:
            async with asyncio.timeout(_RELEASE_TIMEOUT_S):
                for task in filter(is_attachment, tuple(self._worker.tasks().values())):
                    await self._executor.controller(task).shutdown()
        except (TimeoutError, SkepError) as error:
            log.warning("network attachments not released", reason=str(error))

    async def remove_all(self) -> None:
        """Kill and remove every task, as Docker does.  After a minute, the remaining tasks are logged."""
        self._session.leave()
        self._conditions.clear(ConditionName.MANAGER_UNREACHABLE)
        self._conditions.forget_ended()
        await self._worker.clear()
        backoff = Backoff(0.02, 0.5)
        try:
            async with asyncio.timeout(_REMOVAL_TIMEOUT_S):
                while await self._executor.leftovers():
                    await backoff.sleep(self._clock)
                await self._tables.clear()
                if self._probes is not None:
                    self._probes.set_targets(None)
        except TimeoutError:
            log.error("tasks left behind", tasks=await self._executor.leftovers())
