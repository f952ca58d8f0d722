"""Serves the Engine API to containers, on their own sockets, and on the node's socket if a container connects to it."""

import asyncio
import socket
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import Enum
from typing import NamedTuple

import msgspec
import structlog

from skep.aio.clock import Clock
from skep.aio.connections.handshakes import ACCEPT_RETRY_S
from skep.aio.failures import isolate
from skep.aio.token_bucket import TokenBucket
from skep.engine.confinement.cgroups import mount_namespace
from skep.engine.containers.container import Container
from skep.engine.engine import Engine
from skep.model.permissions.rights import ApiAccess
from skep.model.values.ids import ContainerId
from skep.node.container_apis.exchange import Dispatch, Exchanges
from skep.node.container_apis.peers import ConnectionPeer, peer_of

log = structlog.get_logger()

_BURST, _PER_S = 100.0, 50.0
"""Limit for the rate of one container's connections: a burst of so many, then so many each second.

With limited access, each connection carries one request.
"""
_RATE_PAUSE_S = 0.02
"""Seconds between checks whether the next request is allowed."""


class _Listener(NamedTuple):
    access: ApiAccess
    socket: socket.socket


class ContainerApis:
    """The API sockets of this node's containers (``engine.api_sockets.ApiServer``).

    ``engine`` returns the containers' engine.  A function, because the engine is created later.
    """

    def __init__(self, clock: Clock, engine: Callable[[], Engine | None]) -> None:
        self._clock = clock
        self._engine = engine
        self._lock = threading.Lock()
        self._wanted: dict[ContainerId, _Listener] = {}
        self._wake: Callable[[], None] | None = None
        """Makes ``run`` check ``_wanted``.  None while ``run`` is not active."""
        self._serving: dict[ContainerId, tuple[_Listener, asyncio.Task[None]]] = {}
        self._connections: dict[asyncio.Task[None], ContainerId] = {}
        """Container of each connection, in the order in which the connections were made."""
        self._start: Callable[[socket.socket, ContainerId, ApiAccess], None] | None = None
        self._has_room = asyncio.Event()

    # --- called by the engine, in any thread --------------------------------------------------------------------

    def serve(self, container: Container, listener: socket.socket) -> None:
        """Serve a container's socket (see ``ApiServer``)."""
        listener.setblocking(False)
        self._want(container.id, _Listener(container.config.api, listener))

    def forget(self, id: ContainerId) -> None:
        """Stop serving a container's socket (see ``ApiServer``)."""
        self._want(id, None)

    def _want(self, id: ContainerId, listener: _Listener | None) -> None:
        with self._lock:
            before = self._wanted.pop(id, None)
            if listener is not None:
                self._wanted[id] = listener
            if before is not None and self._wake is None:
                before.socket.close()  # no thread serves it yet
            if self._wake is not None and (before is not None or listener is not None):
                self._wake()

    # --- in the event loop ----------------------------------------------------------------------------------------

    async def run(self, dispatch: Dispatch) -> None:
        """Serve until cancelled.  ``dispatch`` serves connections as the node's front does."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()
        changed.set()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(changed.set)

        exchanges = Exchanges(dispatch, self._clock)
        with self._lock:
            self._wake = wake
        try:
            async with asyncio.TaskGroup() as group:
                self._start = lambda *what: self._begin(group, exchanges, *what)
                while True:
                    await changed.wait()
                    changed.clear()
                    self._reconcile(group)
        finally:
            self._start = None
            self._serving.clear()  # the sockets stay open for the next run
            with self._lock:
                self._wake = None

    def divert(self, connected: socket.socket, own: ContainerId | None = None) -> bool:
        """Take over a new connection, unless a process of the machine made it.  Return whether it was taken over.

        ``own`` is the container that the connected socket belongs to, or None for the node's socket.  Connections from
        ``own`` itself are left to the caller.
        """
        match peer_of(connected, self.may_be_ours, self._finder_by_mounts()):
            case ConnectionPeer.MACHINE:
                return False
            case id if id == own:
                return False
            case ConnectionPeer.GONE:
                connected.close()
            case id:
                if self._start is None or decide(id, self._counts()) is AdmissionDecision.WAIT:
                    connected.close()
                else:
                    self._make_room(id)
                    self._start(connected, id, self._access(id))
        return True

    def may_be_ours(self, id: ContainerId) -> bool:
        """Return whether a container may belong to this node.

        True for all, until the containers are found after a restart.
        """
        engine = self._engine()
        return engine is not None and engine.may_have(id)

    def _finder_by_mounts(self) -> Callable[[str], ContainerId | None] | None:
        """Return a function that finds a container by its mount namespace, on a node without control groups."""
        engine = self._engine()
        if engine is None or engine.cgroups.is_usable:
            return None
        return lambda mounts: next(
            (one.id for one in engine.list() if one.pid and mount_namespace(one.pid) == mounts), None
        )

    def _access(self, id: ContainerId) -> ApiAccess:
        engine = self._engine()
        return engine.get(id).config.api if engine is not None and engine.has(id) else ApiAccess.READ

    def _reconcile(self, group: asyncio.TaskGroup) -> None:
        with self._lock:
            wanted = dict(self._wanted)
        for id, (listener, task) in tuple(self._serving.items()):
            if wanted.get(id) is not listener:
                del self._serving[id]
                task.cancel()
                listener.socket.close()
                for connection in [one for one, of in self._connections.items() if of == id]:
                    connection.cancel()
        for id, listener in wanted.items():
            if id not in self._serving:
                accepting = isolate(self._accept(id, listener), "container's API not served", container=id)
                task = group.create_task(accepting, name=f"container-api-{id[:12]}")
                self._serving[id] = (listener, task)

    async def _accept(self, id: ContainerId, listener: _Listener) -> None:
        loop = asyncio.get_running_loop()
        rate = TokenBucket(_BURST, _PER_S, self._clock.monotonic())
        while True:
            try:
                connected, _ = await loop.sock_accept(listener.socket)
            except OSError as error:  # no free descriptor, or the client has disconnected
                log.warning("connection of a container not accepted", container=id, error=str(error))
                await self._clock.sleep(ACCEPT_RETRY_S)
                continue
            # A container that reaches another's socket (through /proc, or a directory mount) gets only its own rights.
            if self.divert(connected, id):
                await asyncio.sleep(0)  # let other work run during a flood of connections
                continue
            try:
                while not rate.take(self._clock.monotonic()):
                    await self._clock.sleep(_RATE_PAUSE_S)
                while decide(id, self._counts()) is AdmissionDecision.WAIT:
                    self._has_room.clear()
                    await self._has_room.wait()
            except BaseException:
                connected.close()
                raise
            self._make_room(id)
            assert self._start is not None, "run runs this"
            self._start(connected, id, listener.access)

    def _counts(self) -> Counter[ContainerId]:
        return Counter(self._connections.values())

    def _make_room(self, id: ContainerId) -> None:
        """Make room for a connection of ``id``, if needed, by closing the oldest one of the container with most
        connections.
        """
        match decide(id, self._counts()):
            case AdmissionDecision():
                return
            case evict:
                oldest = next(one for one, of in self._connections.items() if of == evict.container)
                log.warning("connection of a container closed: it has too many", container=evict.container)
                self._ended(oldest)
                oldest.cancel()

    def _begin(
        self,
        group: asyncio.TaskGroup,
        exchanges: Exchanges,
        connected: socket.socket,
        id: ContainerId,
        access: ApiAccess,
    ) -> None:
        work = isolate(
            exchanges.carry_out(connected, id, access), "container's API connection failed", container=id
        )
        task = group.create_task(work, name=f"container-api-connection-{id[:12]}")
        self._connections[task] = id
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._connections.pop(task, None)
        self._has_room.set()


EACH_MAX = 32
"""Limit for the connections of one container."""
ALL_MAX = 512
"""Limit for the connections of all containers of this node together."""


class AdmissionDecision(Enum):
    """The decision about a new connection if no other connection is closed for it."""

    SERVE = "serve"
    WAIT = "wait"


class Evict(msgspec.Struct, frozen=True):
    """Serve the new connection, and close one connection of container ``id``, which has most connections."""

    container: ContainerId


def decide(
    id: ContainerId, counts: Mapping[ContainerId, int], each_max: int = EACH_MAX, all_max: int = ALL_MAX
) -> AdmissionDecision | Evict:
    """Decide on a new connection of ``id``.

    At the total limit, the container with most connections loses one, if the new connection's container has at least
    two fewer.  So every container gets an equal share, whatever the others do.

    ``counts`` is the number of connections of each container.
    """
    own = counts.get(id, 0)
    if own >= each_max:
        return AdmissionDecision.WAIT
    if sum(counts.values()) < all_max:
        return AdmissionDecision.SERVE
    most = max(counts, key=lambda one: (counts[one], one))
    return Evict(most) if counts[most] >= own + 2 else AdmissionDecision.WAIT
