"""Tasks of nodes that no longer respond, and the commands that end the connections to them (decision 220).

A node that dies sends no packet that ends its connections, so requests to its tasks would wait for minutes.
``state_of`` takes these tasks out at once.  A request whose connection still opens is then sent to another task, when
``CONNECT_S`` has passed.  Only after that may commands end the connections, because HAProxy does not repeat a request
whose connection was ended while it opened.
"""

import asyncio
from collections.abc import Collection
from typing import Final

from skep.aio.clock import Clock
from skep.dataplane.door.configuration import CONNECT_S, DoorState
from skep.model.networks.tables import NetworkTable
from skep.model.values.ids import TaskId

_MARGIN_S: Final = 0.5
"""Seconds that a proxy on a busy node may need to send these requests to another task."""


def lost_tasks(before: NetworkTable, after: NetworkTable) -> frozenset[TaskId]:
    """Return the tasks of ``before`` whose node no longer responds, so that their connections stay silent.

    A node that is down leaves the table at once, with tasks that still served.  A node whose last task was stopped
    leaves it after that task has stopped serving, and a task that ends on another node has closed its connections.
    """
    silent = {
        one.node_id
        for id, one in before.endpoints.items()
        if one.is_serving
        and one.node_id in before.nodes
        and one.node_id not in after.nodes
        and id not in after.endpoints
    }
    lost = {id for id, one in before.endpoints.items() if one.node_id in silent}
    left_out = {id for id, one in after.endpoints.items() if one.is_left_out}
    return frozenset(
        lost | {id for id in left_out & before.endpoints.keys() if not before.endpoints[id].is_left_out}
    )


def endings(state: DoorState, lost: Collection[str]) -> list[str]:
    """Return the commands that end the connections to lost tasks.  HAProxy sends repeatable requests again."""
    return [
        f"shutdown sessions server {name}/s{number}"
        for name, one in sorted(state.backends.items())
        for number, server in enumerate(one.servers, start=1)
        if server.task in lost and not server.is_ready
    ]


class LostTasks:
    """Lost tasks whose connections are still to be ended.  They keep their server lines until then."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._table: NetworkTable | None = None
        self._due: dict[TaskId, float] = {}
        self._ending: dict[TaskId, float] = {}
        """When the tasks of the last ``due`` were due."""
        self._more = asyncio.Event()

    def follow(self, after: NetworkTable | None) -> None:
        """Add the tasks that were lost since the last table.  Forget tasks that serve again.

        Nothing is lost after None, with which this node has no proxy.
        """
        before, self._table = self._table, after
        if before is None or after is None:
            return
        self._due = {
            id: due
            for id, due in self._due.items()
            if id not in after.endpoints or after.endpoints[id].is_left_out
        }
        due = self._clock.monotonic() + CONNECT_S + _MARGIN_S
        for id in lost_tasks(before, after):
            self._due.setdefault(id, due)
        if self._due:
            self._more.set()

    def present(self) -> Collection[TaskId]:
        """Return the tasks."""
        return self._due.keys()

    async def due(self) -> Collection[TaskId]:
        """Return tasks the connections to which may be ended now, once there are some."""
        while True:
            while not self._due:
                self._more.clear()
                await self._more.wait()
            now = self._clock.monotonic()
            if found := {id: due for id, due in self._due.items() if due <= now}:
                self._ending = found
                return list(found)
            await self._clock.sleep(min(self._due.values()) - now)

    def forget(self, ended: Collection[TaskId]) -> None:
        """Remove tasks the connections to which have ended.  Other tasks may have their server lines now.

        A task that served and was lost again meanwhile stays.
        """
        for id in ended:
            if self._due.get(id) == self._ending.get(id):
                self._due.pop(id, None)
