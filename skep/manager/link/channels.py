"""Keeps open connections to the other managers, and separate connections for readers of relayed logs."""

import asyncio
from collections.abc import AsyncIterator, Callable, Set
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Protocol

import structlog

from skep.errors import Unavailable
from skep.model.values.ids import NodeId
from skep.rpc.client import Bounds
from skep.wire.client import BOUNDS, ManagerChannel
from skep.wire.shared import SharedConnections

log = structlog.get_logger(__name__)

RELAYS_MAX = 80
"""Relayed logs on one connection."""
RELAY_BOUNDS = Bounds(stream_window=256 * 1024, connection_window=24 * 1024 * 1024, message=BOUNDS.message)
"""Limits of connections for relayed logs.

All streams' windows together are smaller than the connection's, so readers that do not read block no others.
"""


class Connect(Protocol):
    """Connects to another manager with this manager's certificate."""

    def __call__(self, addr: str, *, bounds: Bounds = BOUNDS) -> AbstractAsyncContextManager[ManagerChannel]:
        """Connect to the manager at ``addr``, as a manager.  Raises: Unavailable."""


class LinkChannels:
    """The connection to each manager that answers pings."""

    def __init__(self, connect: Connect, name_of: Callable[[NodeId], str]) -> None:
        """``name_of`` returns a manager's name for people."""
        self._connect = connect
        self._name_of = name_of
        self._channels: dict[NodeId, ManagerChannel] = {}
        self._beside: SharedConnections | None = None

    def share_in(self, group: asyncio.TaskGroup) -> None:
        """Keep the separate connections in ``group``, with which they end."""
        connect = partial(self._connect, bounds=RELAY_BOUNDS)
        self._beside = SharedConnections(connect, group, streams_max=RELAYS_MAX)

    def connect(self, addr: str) -> AbstractAsyncContextManager[ManagerChannel]:
        """Connect to the manager at ``addr``.  Raises: Unavailable."""
        return self._connect(addr)

    def add(self, manager: NodeId, channel: ManagerChannel) -> None:
        """Use ``channel`` for calls to ``manager`` from now on."""
        if self._channels.get(manager) is not channel:
            self._channels[manager] = channel
            log.info("link established", manager=manager, address=channel.address)

    def remove(self, manager: NodeId, addr: str) -> bool:
        """Forget the connections to ``manager``.  Returns whether it had an open one."""
        if self._channels.pop(manager, None) is None:
            return False
        log.info("link lost", manager=manager)
        if self._beside is not None:
            self._beside.drop(addr)
        return True

    def linked(self) -> Set[NodeId]:
        """Return the managers with an open connection.  The set follows later changes."""
        return self._channels.keys()

    def channel(self, manager: NodeId) -> ManagerChannel:
        """Return the open connection to a manager.  Raises: Unavailable."""
        channel = self._channels.get(manager)
        if channel is None:
            raise Unavailable(f"manager {self._name_of(manager)} cannot be reached now: try again")
        return channel

    @asynccontextmanager
    async def channel_beside(self, manager: NodeId) -> AsyncIterator[ManagerChannel]:
        """Open a separate connection for one more reader.  It ends with the link.  Raises: Unavailable."""
        address = self.channel(manager).address
        assert self._beside is not None, "channel raises without a link"
        async with self._beside.channel(address) as channel:
            yield channel
