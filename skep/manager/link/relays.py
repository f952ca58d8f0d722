"""Streams that another manager relays to this one: logs of the nodes that have their session there."""

from collections.abc import AsyncGenerator, Sequence

from skep.manager.link.loop import ManagerLink
from skep.model.logs import LogQuery
from skep.model.values.ids import NodeId
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.convert.logs import query_to_pb


class LinkRelays:
    """Implements ``logbroker.broker.Relays``."""

    def __init__(self, link: ManagerLink) -> None:
        self._link = link

    async def relay_logs(
        self, manager: NodeId, query: LogQuery, nodes: Sequence[NodeId]
    ) -> AsyncGenerator[skep.RelayedLogs, None]:
        """Yield the logs of ``nodes`` as relayed by ``manager``.  Ends when all of them have ended.

        A manager that falls silent loses the link, which ends this stream.  Raises: Unavailable.
        """
        selector, options = query_to_pb(query)
        async with self._link.channel_beside(manager) as channel, channel.stream(methods.RELAY_LOGS) as call:
            await call.send(skep.LogRelay(selector=selector, options=options, node_ids=nodes), end=True)
            async for message in call:
                yield message
