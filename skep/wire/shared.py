"""Connections that streams share.  Each carries a limited number of streams, and is kept for a while after the last
one.

A peer allows 100 streams on a connection, and many streams delay the heartbeats and pings on it.  These connections are
therefore separate from the connections of sessions and links.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Protocol

from skep.errors import SkepError
from skep.wire.client import ManagerChannel

KEPT_S = 60.0
"""Seconds for which a connection without streams is kept."""


class ConnectToManager(Protocol):
    """Connects with this node's certificate."""

    def __call__(self, address: str, *, timeout_s: float) -> AbstractAsyncContextManager[ManagerChannel]:
        """Connect to the manager at ``address``.  Raises Unavailable if it is not reachable or not trusted."""


class SharedConnections:
    """Shared connections.  Each address has as many as its streams need."""

    def __init__(
        self,
        connect: Callable[[str], AbstractAsyncContextManager[ManagerChannel]],
        group: asyncio.TaskGroup,
        *,
        streams_max: int,
    ) -> None:
        """Keep the connections in ``group``, each with at most ``streams_max`` streams."""
        self._connect = connect
        self._group = group
        self._streams_max = streams_max
        self._open: dict[str, list[_Shared]] = {}

    @asynccontextmanager
    async def channel(self, address: str) -> AsyncIterator[ManagerChannel]:
        """Return a connection for one more stream.  Raises Unavailable if not reachable or not trusted."""
        open = self._open.setdefault(address, [])
        shared = next((one for one in open if one.users < self._streams_max and not one.is_lost), None)
        if shared is None:
            shared = _Shared()
            open.append(shared)
            self._group.create_task(self._keep(address, shared), name=f"shared connection to {address}")
        shared.use()
        try:
            yield await asyncio.shield(shared.channel)
        finally:
            shared.leave()

    def drop(self, address: str) -> None:
        """End the connections to ``address`` and their streams."""
        for shared in self._open.get(address, ()):
            shared.drop()

    async def _keep(self, address: str, shared: "_Shared") -> None:
        """Hold one connection until it has had no stream for ``KEPT_S``."""
        try:
            # This runs in its own task, because a broken connection cancels the task that opened it.
            async with self._connect(address) as channel:
                shared.channel.set_result(channel)
                await shared.wait_over()
        except SkepError as error:
            if not shared.channel.done():
                shared.channel.set_exception(error)
        finally:
            shared.drop()
            if not shared.channel.done():
                shared.channel.cancel()
            open = self._open[address]
            open.remove(shared)
            if not open:
                del self._open[address]


class _Shared:
    """A connection with the number of its streams."""

    def __init__(self) -> None:
        self.channel: asyncio.Future[ManagerChannel] = asyncio.get_running_loop().create_future()
        self.users = 0
        self._is_over = False
        self._changed = asyncio.Event()

    @property
    def is_lost(self) -> bool:
        """Whether it cannot carry another stream because it is lost."""
        channel = self.channel
        return self._is_over or (
            channel.done()
            and (channel.cancelled() or channel.exception() is not None or channel.result().is_lost)
        )

    def use(self) -> None:
        self.users += 1
        self._changed.set()

    def leave(self) -> None:
        self.users -= 1
        self._changed.set()

    def drop(self) -> None:
        self._is_over = True
        self._changed.set()

    async def wait_over(self) -> None:
        """Wait until it was dropped, or has had no user for ``KEPT_S``."""
        while not self._is_over:
            self._changed.clear()
            if self.users:
                await self._changed.wait()
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(KEPT_S):
                    await self._changed.wait()
                    continue
            self._is_over = not self.users
