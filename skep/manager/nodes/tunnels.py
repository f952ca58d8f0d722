"""Tunnels from this manager to containers on any node.

A node connects to its manager, but the manager may be unable to connect to the node.  Therefore the node opens the
tunnel.  The manager sends an order on the node's stream of orders, and the node responds with a call that names the
order.  If another manager has the node's session, the tunnel leads through that manager.  Only managers have such
streams, so no worker can reach a container of another node.
"""

import asyncio
import secrets
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress

import msgspec
import structlog

from skep.aio.groups import first_alone
from skep.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    SkepError,
    Unavailable,
    Unimplemented,
)
from skep.manager.nodes.node_session import NodeSession, StreamWaker
from skep.manager.nodes.node_streams import NodeStream, NodeStreams, run_stream, session_named
from skep.model.networks.data_planes import is_docker_node
from skep.model.node import Node, NodeState
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId
from skep.rpc.errors import LOST_PEER
from skep.store.interface import Store, View
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.access import Caller
from skep.wire.client import ManagerChannel
from skep.wire.service import Handler, duplex
from skep.wire.tunnel import Tunnel, copy, over_requests

log = structlog.get_logger(__name__)

RELAY_S = 2.0
"""Further seconds for the response of the manager that has the node's session, which says why there is no tunnel."""
PER_NODE_MAX = 64
"""Largest number of simultaneous tunnels of one node.  It is smaller than the number of streams that one connection
allows.
"""
TUNNELS_MAX = 512
"""Largest number of simultaneous tunnels of all nodes connected to this manager."""
PIECES_WAITING = 4
"""Largest number of pieces that are read from a node before its client takes them."""


class TunnelLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Times of tunnels, in seconds."""

    open_s: float = 10.0
    """A node has this time to open a tunnel after the order, and then to send the first message."""
    lost_s: float = 60.0
    """The tunnels of a node end when it has been down for this time.  If its process hangs, its connections stay."""


LIMITS = TunnelLimits()


def container_of(task: Task, node: Node | None) -> str:
    """Return the id of the container of ``task`` for a tunnel.

    Raises:
        FailedPrecondition: The task is not running.
        NotFound: The task's node was removed.
        Unavailable: The task's node is not ready.
        Unimplemented: No tunnel can lead to the task.
    """
    if task.status.state is not TaskState.RUNNING:
        raise FailedPrecondition(f"task {task.id} is not running: it is {task.status.state.value}")
    if node is None:
        raise NotFound(f"task {task.id} runs on node {task.node_id}, which is no longer part of this swarm")
    name = node.shown_name
    if is_docker_node(node):
        raise Unimplemented(
            f"task {task.id} runs on node {name}, which is a Docker Engine: managers cannot reach its "
            "containers; use docker on that node"
        )
    if node.status.state is not NodeState.READY:
        raise Unavailable(f"task {task.id} runs on node {name}, which is {node.status.state.value}")
    if task.status.container_status is None or not task.status.container_status.container_id:
        raise Unimplemented(f"task {task.id} has no container: node {name} runs it as a process")
    return task.status.container_status.container_id


class NodeTunnels:
    """Tunnels to nodes connected to this manager, and through other managers to their nodes."""

    def __init__(
        self,
        store: Store,
        own: NodeId,
        session: Callable[[NodeId, str], NodeSession],
        channel: Callable[[NodeId], ManagerChannel],
        limits: TunnelLimits = LIMITS,
    ) -> None:
        """
        Args:
            session: Returns a node's session here by its id, or raises SkepError.
            channel: Returns the link's connection to another manager, or raises Unavailable.
        """
        self._store = store
        self._own = own
        self._session = session
        self._channel = channel
        self._limits = limits
        self.streams: NodeStreams[_Orders] = NodeStreams("tunnel orders")
        self.expected: dict[str, _Expected] = {}
        self.open_count: Counter[NodeId] = Counter()

    def services(self) -> Sequence[Handler]:
        """Return the handlers for ``wire.server.serve``."""
        return (
            duplex(methods.TUNNEL_ORDERS, self._orders),
            duplex(methods.TUNNEL, self._tunnel),
            duplex(methods.RELAY_TUNNEL, self._relay),
        )

    @asynccontextmanager
    async def open(
        self, task: Task, *, head: bytes = b"", port: int = 0, is_admin: bool = False
    ) -> AsyncIterator[Tunnel]:
        """Open a tunnel to the container of ``task`` for the block.

        It is an HTTP exchange that starts with ``head``, or a connection to ``port``.

        Args:
            is_admin: Whether the client is an administrator.  The node needs this, because it checks the request again.

        Raises:
            SkepError: No tunnel can be opened, with the reason.
        """
        node = self._store.view().lookup(Node, task.node_id)
        container_id = container_of(task, node)
        assert node is not None, "a task without a node has no container"
        async with self._open_to(
            node,
            skep.TunnelRequest(
                node_id=node.id,
                task_id=task.id,
                container_id=container_id,
                head=head,
                port=port,
                admin=is_admin,
            ),
        ) as tunnel:
            yield tunnel

    @asynccontextmanager
    async def open_node(self, node: Node, head: bytes) -> AsyncIterator[Tunnel]:
        """Open a tunnel to ``node`` for the block: an HTTP exchange about no task that starts with ``head``.

        Raises:
            SkepError: No tunnel can be opened, with the reason.
        """
        async with self._open_to(node, skep.TunnelRequest(node_id=node.id, head=head)) as tunnel:
            yield tunnel

    @asynccontextmanager
    async def _open_to(self, node: Node, request: skep.TunnelRequest) -> AsyncIterator[Tunnel]:
        manager = node.session.manager_id if node.session is not None else NodeId("")
        if node.id in self.streams or manager in ("", self._own):
            async with self._open_here(request) as tunnel:
                yield tunnel
        else:
            async with self._open_through(manager, request) as tunnel:
                yield tunnel

    # -- through another manager ----------------------------------------------------------------------------------

    @asynccontextmanager
    async def _open_through(self, manager: NodeId, request: skep.TunnelRequest) -> AsyncIterator[Tunnel]:
        name, limit_s = _name(self._store.view(), manager), self._limits.open_s + RELAY_S
        async with self._channel(manager).stream(methods.RELAY_TUNNEL) as call:
            try:
                async with asyncio.timeout(limit_s):
                    await call.send(skep.TunnelPiece(request=request))
                    if await call.receive() is None:
                        raise Unavailable(f"manager {name} closed the tunnel")
            except Unimplemented as error:
                raise Unimplemented(
                    f"manager {name}, which has the node's session, runs a version of Skep without tunnels: upgrade it"
                ) from error
            except TimeoutError as error:
                node = _name(self._store.view(), NodeId(request.node_id))
                raise Unavailable(
                    f"manager {name}, which has the session of node {node}, has not responded in {limit_s:g} s"
                ) from error
            yield Tunnel(call.receive, call.send)

    async def _relay(
        self,
        pieces: AsyncIterator[skep.TunnelPiece],
        send: Callable[[skep.TunnelPiece], Awaitable[None]],
        _caller: Caller,
    ) -> None:
        """Open a tunnel for another manager."""
        first = await _first(pieces)
        async with self._open_here(first.request) as tunnel:
            await send(skep.TunnelPiece())
            remote = over_requests(pieces, send)
            with first_alone(SkepError):
                async with asyncio.TaskGroup() as group:
                    group.create_task(copy(remote, tunnel), name="to the node")
                    # The other manager decides when this direction ends, by ending the call.
                    group.create_task(copy(tunnel, remote), name="from the node")

    # -- nodes of this manager ------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _open_here(self, request: skep.TunnelRequest) -> AsyncIterator[Tunnel]:
        node_id = NodeId(request.node_id)
        stream = self.streams.get(node_id)
        if stream is None:
            raise self._why_unreachable(node_id)
        if self.open_count[node_id] >= PER_NODE_MAX or self.open_count.total() >= TUNNELS_MAX:
            raise ResourceExhausted(
                f"too many connections to containers of node {_name(self._store.view(), node_id)} or of this manager "
                "are open: close some"
            )
        expected, id = _Expected(node_id), secrets.token_hex(16)
        self.expected[id] = expected
        self.open_count[node_id] += 1
        try:
            stream.order(skep.TunnelOrder(id=id, request=request))
            try:
                async with asyncio.timeout(self._limits.open_s):
                    tunnel = await expected.opened
            except TimeoutError as error:
                name = _name(self._store.view(), node_id)
                raise Unavailable(
                    f"node {name} has not opened a connection in {self._limits.open_s:g} s"
                ) from error
            yield tunnel
            expected.is_complete = True
        finally:
            del self.expected[id]
            self.open_count[node_id] -= 1
            if not self.open_count[node_id]:
                del self.open_count[node_id]
            expected.done.set()

    def _why_unreachable(self, node_id: NodeId) -> SkepError:
        node = self._store.view().lookup(Node, node_id)
        if node is None or node.session is None or node.session.manager_id != self._own:
            return Unavailable(f"node {_name(self._store.view(), node_id)} has no session with a manager now")
        version = node.description.engine.engine_version if node.description.engine is not None else ""
        return Unavailable(
            f"node {_name(self._store.view(), node_id)} cannot be reached through the managers: its Skep {version} "
            "has no tunnels, or its connection has just been made; upgrade it, or use docker on that node"
        )

    async def _orders(
        self,
        messages: AsyncIterator[skep.TunnelUpdate],
        send: Callable[[skep.TunnelOrder], Awaitable[None]],
        caller: Caller,
    ) -> None:
        session = self._session(caller.node_id, await session_named(messages))
        with (
            session.signal() as signal,
            self.streams.open(_Orders(caller.node_id, session, signal)) as stream,
        ):
            await run_stream(
                stream, messages, lambda one: self._refused(caller.node_id, one), stream.send_orders(send)
            )

    def _refused(self, node_id: NodeId, message: skep.TunnelUpdate) -> None:
        expected = self.expected.get(message.id)
        if expected is not None and expected.node_id == node_id and not expected.opened.done():
            expected.opened.set_exception(Unavailable(message.error or "the node has refused the connection"))

    async def _tunnel(
        self,
        pieces: AsyncIterator[skep.TunnelPiece],
        send: Callable[[skep.TunnelPiece], Awaitable[None]],
        caller: Caller,
    ) -> None:
        """Serve a tunnel that a node opens by order."""
        first = await _first(pieces)
        expected = self.expected.get(first.id)
        if expected is None or expected.node_id != caller.node_id or expected.opened.done():
            raise NotFound("no such order")
        waiting = _Pieces()
        expected.opened.set_result(Tunnel(waiting.take, send))
        # This task reads instead of the client's task, because only the task that reads a generator can close it.
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(_read_pieces(pieces, waiting), name="read from a node")
            await self._used_or_lost(expected)
            reading.cancel()
        if not expected.is_complete:
            is_lost = not expected.done.is_set()
            raise Unavailable("the node is down" if is_lost else "the client has disconnected")

    async def _used_or_lost(self, expected: "_Expected") -> None:
        """Return when the tunnel's user has finished with it, or its node has been down for a while."""
        look_s, down_s = self._limits.lost_s / 12, 0.0
        while not expected.done.is_set() and down_s < self._limits.lost_s:
            with suppress(TimeoutError):
                async with asyncio.timeout(look_s):
                    await expected.done.wait()
            node = self._store.view().lookup(Node, expected.node_id)
            is_down = node is not None and node.status.state is NodeState.DOWN
            down_s = down_s + look_s if is_down else 0.0


class _Expected:
    """A tunnel that was ordered."""

    def __init__(self, node_id: NodeId) -> None:
        self.node_id = node_id
        self.opened: asyncio.Future[Tunnel] = asyncio.get_running_loop().create_future()
        self.done = asyncio.Event()
        """Set when its user has finished with the tunnel."""
        self.is_complete = False
        """Whether the tunnel was used to its end."""


class _Pieces:
    """A bounded queue of pieces between the call's handler and the tunnel's user."""

    def __init__(self) -> None:
        self._pieces: deque[skep.TunnelPiece] = deque()
        self._has_ended = False
        self._changed = asyncio.Event()
        self._room = asyncio.Event()

    async def put(self, piece: skep.TunnelPiece) -> None:
        while len(self._pieces) >= PIECES_WAITING:
            self._room.clear()
            await self._room.wait()
        self._pieces.append(piece)
        self._changed.set()

    def end(self) -> None:
        self._has_ended = True
        self._changed.set()

    async def take(self) -> skep.TunnelPiece | None:
        """Return the next piece, or None after the last one."""
        while not self._pieces:
            if self._has_ended:
                return None
            self._changed.clear()
            await self._changed.wait()
        self._room.set()
        return self._pieces.popleft()


async def _read_pieces(pieces: AsyncIterator[skep.TunnelPiece], waiting: _Pieces) -> None:
    try:
        async for piece in pieces:
            await waiting.put(piece)
    except (SkepError, TimeoutError, *LOST_PEER) as error:
        log.info("tunnel to a node was lost", reason=str(error))
    finally:
        waiting.end()


class _Orders(NodeStream):
    """The stream of orders to one node."""

    def __init__(self, node_id: NodeId, session: NodeSession, signal: StreamWaker) -> None:
        super().__init__(node_id, session, signal)
        self._unsent: deque[skep.TunnelOrder] = deque()

    def order(self, order: skep.TunnelOrder) -> None:
        """Queue an order to open a tunnel.  At most ``PER_NODE_MAX`` wait.  Raises: the error that ended the stream."""
        self.require_open()
        self._unsent.append(order)
        self.signal.wake()

    async def send_orders(self, send: Callable[[skep.TunnelOrder], Awaitable[None]]) -> None:
        """Send orders as they are queued.  Raises: the error that ended the stream."""
        while True:
            self.require_open()
            while self._unsent:
                await send(self._unsent.popleft())
            await self.signal.wait()


async def _first(pieces: AsyncIterator[skep.TunnelPiece]) -> skep.TunnelPiece:
    """Return the first piece.  Raises: InvalidArgument: it did not come in time."""
    try:
        async with asyncio.timeout(LIMITS.open_s):
            first = await anext(pieces, None)
    except TimeoutError:
        first = None
    if first is None:
        raise InvalidArgument("the tunnel's first message is missing or late")
    return first


def _name(view: View, node_id: NodeId) -> str:
    node = view.lookup(Node, node_id)
    return (node.description.hostname if node is not None else "") or node_id
