"""The part of a session that hears of networks, and says what is in force of it."""

import asyncio
from collections.abc import Mapping
from typing import Protocol

import structlog

from skep.errors import InvalidArgument, Unavailable, Unimplemented
from skep.model.ids import NetworkId
from skep.model.revisions import Revision
from skep.model.tables import TableSet
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.client import Call, Channel
from skep.wire.convert.tables import table_set_from_pb

log = structlog.get_logger(__name__)

SET_BYTES_MAX = 256 * 1024 * 1024
"""Of all pieces of one set: a node with so much to know of its networks is told something wrong."""


class TableSink(Protocol):
    """Takes tables and says what is in force (``node.tables.keeper``)."""

    @property
    def applied(self) -> Mapping[NetworkId, Revision]: ...

    def take(self, news: TableSet, incarnation: int) -> None:
        """Raises: FailedPrecondition: older than what was seen; InvalidArgument: it does not follow from that."""

    async def wait_applied(self, known: Mapping[NetworkId, Revision]) -> Mapping[NetworkId, Revision]:
        """What is in force, as soon as that is not what is ``known``."""


class TableStream:
    """Runs once, in a session."""

    def __init__(self, channel: Channel, sink: TableSink) -> None:
        self._channel = channel
        self._sink = sink
        self._incarnation = 0
        """Of what this stream said; only of that are acknowledgements understood."""

    async def run(self, session_id: str) -> None:
        """Hear and acknowledge until the stream ends, which it does at once with a manager that knows no tables.

        Raises: SkepError: why it ended.
        """
        async with self._channel.stream(methods.NETWORKS) as call:
            await call.send(skep.AppliedTables(session_id=session_id))
            try:
                first = await call.receive()
            except Unimplemented:
                log.info("no network tables from this manager", manager=self._channel.address)
                return
            async with asyncio.TaskGroup() as group:
                group.create_task(self._hear(call, first), name="hear tables")
                group.create_task(self._acknowledge(call), name="acknowledge tables")

    async def _hear(
        self, call: Call[skep.AppliedTables, skep.NetworkTables], message: skep.NetworkTables | None
    ) -> None:
        pieces: list[skep.NetworkTables] = []
        size = 0
        while message is not None:
            pieces.append(message)
            size += message.ByteSize()
            if size > SET_BYTES_MAX:
                raise InvalidArgument(f"tables of more than {SET_BYTES_MAX} bytes")
            if not message.more:
                self._incarnation = message.incarnation
                self._sink.take(table_set_from_pb(pieces), message.incarnation)
                pieces, size = [], 0
            message = await call.receive()
        raise Unavailable(f"{self._channel.address} ended the tables")

    async def _acknowledge(self, call: Call[skep.AppliedTables, skep.NetworkTables]) -> None:
        known: Mapping[NetworkId, Revision] = {}
        while True:
            before, known = known, await self._sink.wait_applied(known)
            news: dict[str, int] = {
                id: revision.number
                for id, revision in known.items()
                if revision != before.get(id) and revision.incarnation == self._incarnation
            }
            if news:
                await call.send(skep.AppliedTables(revisions=news))
