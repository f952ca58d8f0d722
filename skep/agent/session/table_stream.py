"""Network table stream of a session: receives tables and acknowledges applied ones."""

import asyncio
from collections.abc import Mapping
from typing import Protocol

from skep.errors import InvalidArgument, Unavailable
from skep.model.networks.tables import TableSet
from skep.model.node_reports.revisions import Revision
from skep.model.values.ids import NetworkId
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.client import ManagerChannel, StreamCall
from skep.wire.convert.tables import table_set_from_pb

SET_BYTES_MAX = 256 * 1024 * 1024
"""Limit in bytes for all messages of one set of tables.  A larger set is an error of the manager."""


class TableSink(Protocol):
    """The tables of this node (``dataplane.tables.network_tables``)."""

    @property
    def applied(self) -> Mapping[NetworkId, Revision]:
        """The revision of each network's table that is applied."""

    def update(self, received: TableSet, incarnation: int) -> None:
        """Apply received tables.

        Raises:
            FailedPrecondition: They are older than the tables received before.
            InvalidArgument: They change a table that this node does not have.
        """

    async def wait_applied(self, known: Mapping[NetworkId, Revision]) -> Mapping[NetworkId, Revision]:
        """Wait until the applied revisions differ from ``known``, and return them."""


class TableStream:
    """Network table stream of one session.  Runs once."""

    def __init__(self, channel: ManagerChannel, sink: TableSink) -> None:
        self._channel = channel
        self._sink = sink
        self._incarnation = 0
        """Cluster incarnation of the received tables.  Only revisions of this incarnation are acknowledged."""

    async def run(self, session_id: str) -> None:
        """Receive and acknowledge until the stream ends.

        Raises:
            SkepError: The reason why the stream ended.
            Unimplemented: The manager has no network tables.
        """
        async with self._channel.stream(methods.NETWORKS) as call, asyncio.TaskGroup() as group:
            await call.send(skep.AppliedTables(session_id=session_id))
            acknowledging: asyncio.Task[None] | None = None
            messages: list[skep.NetworkTables] = []
            size = 0
            async for message in call:
                messages.append(message)
                size += message.ByteSize()
                if size > SET_BYTES_MAX:
                    raise InvalidArgument(f"tables of more than {SET_BYTES_MAX} bytes")
                if message.more:
                    continue
                self._incarnation = message.incarnation
                self._sink.update(table_set_from_pb(messages), message.incarnation)
                messages, size = [], 0
                if acknowledging is None:
                    # Start only now, because tables that were applied earlier are acknowledged once, and only if their
                    # incarnation is known.
                    acknowledging = group.create_task(self._acknowledge(call), name="acknowledge tables")
            raise Unavailable(f"{self._channel.address} ended the network table stream")

    async def _acknowledge(self, call: StreamCall[skep.AppliedTables, skep.NetworkTables]) -> None:
        known: Mapping[NetworkId, Revision] = {}
        while True:
            before, known = known, await self._sink.wait_applied(known)
            revisions: dict[str, int] = {
                id: revision.number
                for id, revision in known.items()
                if revision != before.get(id) and revision.incarnation == self._incarnation
            }
            if revisions:
                await call.send(skep.AppliedTables(revisions=revisions))
