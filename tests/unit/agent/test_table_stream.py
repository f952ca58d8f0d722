"""Network tables in a session: when they are acknowledged."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from skep.agent.session.table_stream import TableStream
from skep.model.networks.tables import TableSet
from skep.model.node_reports.revisions import Revision
from skep.model.values.ids import NetworkId
from skep.wire import skep_pb2 as skep

NET = NetworkId("net")


class Manager:
    """A channel and its one call: sends ``messages``, and keeps what it gets."""

    address = "manager"

    def __init__(self, *messages: skep.NetworkTables) -> None:
        self._messages = messages
        self.received: list[skep.AppliedTables] = []
        self.has_received = asyncio.Event()

    @asynccontextmanager
    async def stream(self, _method: object) -> AsyncIterator[Any]:
        yield self

    async def send(self, message: skep.AppliedTables) -> None:
        self.received.append(message)
        if message.revisions:
            self.has_received.set()

    async def __aiter__(self) -> AsyncIterator[skep.NetworkTables]:
        for message in self._messages:
            await asyncio.sleep(0)  # as with a connection, other tasks run between two messages
            yield message
        await self.has_received.wait()


class Tables:
    """Applied what an earlier manager has sent; the present one sends the same."""

    def __init__(self) -> None:
        self.applied: Mapping[NetworkId, Revision] = {NET: Revision(7, 3)}
        self.updates: list[TableSet] = []

    def update(self, received: TableSet, incarnation: int) -> None:
        self.updates.append(received)

    async def wait_applied(self, known: Mapping[NetworkId, Revision]) -> Mapping[NetworkId, Revision]:
        if self.applied == known:
            await asyncio.Event().wait()
        return self.applied


async def test_tables_that_are_applied_already_are_acknowledged_after_a_set_of_several_messages():
    parts = [
        skep.NetworkTables(incarnation=7, revision=3, complete=True, more=one) for one in (True, True, False)
    ]
    manager, tables = Manager(*parts), Tables()
    async with asyncio.TaskGroup() as group:
        running = group.create_task(TableStream(manager, tables).run("session"))  # type: ignore[arg-type]
        async with asyncio.timeout(5):
            await manager.has_received.wait()
        running.cancel()
    assert len(tables.updates) == 1
    assert [dict(one.revisions) for one in manager.received] == [{}, {"net": 3}]
