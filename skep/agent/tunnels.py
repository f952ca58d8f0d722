"""Tunnels from managers to the containers of this node's tasks.

A manager sends orders on a stream of the session.  For each order, this node makes a call to that manager on a separate
connection, so that copied files never delay heartbeats.  The connection is kept for a while.  A tunnel does not end
with the session, which may move to another manager.
"""

import asyncio
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial
from typing import Protocol

import structlog

from skep.aio.failures import describe_error, log_error
from skep.api.http.connection import Connection
from skep.api.http.tunnelling import join_container
from skep.errors import ResourceExhausted, SkepError, Unavailable
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.client import ManagerChannel, StreamCall
from skep.wire.shared import ConnectToManager, SharedConnections
from skep.wire.tunnel import Tunnel

log = structlog.get_logger(__name__)

TUNNELS_MAX = 96
"""Limit for simultaneous tunnels.

Lower than the stream limit of a connection.  Higher than the number of tunnels that a manager orders, because a tunnel
ends here slightly later than at the manager.
"""
CONNECT_S = 5.0
"""Seconds to open the connection for tunnels."""


class ContainerAccess(Protocol):
    """The containers of this node's tasks (``node.container_access``)."""

    def serving(self) -> AbstractAsyncContextManager[None]:
        """Return a context that must be open while there are connections."""

    async def connect(self, request: skep.TunnelRequest) -> Connection:
        """Connect to the target of ``request``.

        Raises:
            SkepError: The target does not belong to a task of this node, or cannot be reached.
        """


class TunnelHost:
    """The tunnels of this node.  ``run`` is active while the node is in a cluster."""

    def __init__(self, access: ContainerAccess, connect: ConnectToManager) -> None:
        self._access = access
        self._connect = connect
        self._group: asyncio.TaskGroup | None = None
        self._connections: SharedConnections | None = None
        self._count = 0

    async def run(self) -> None:
        """Execute orders until cancelled."""
        async with self._access.serving(), asyncio.TaskGroup() as group:
            self._group = group
            self._connections = SharedConnections(
                partial(self._connect, timeout_s=CONNECT_S), group, streams_max=TUNNELS_MAX
            )
            try:
                await asyncio.Event().wait()
            finally:
                self._group = None

    async def receive_orders(self, channel: ManagerChannel, session_id: str) -> None:
        """Receive orders of the session's manager until its stream ends.  Raises: SkepError: the reason."""
        async with channel.stream(methods.TUNNEL_ORDERS) as call:
            await call.send(skep.TunnelUpdate(session_id=session_id))
            async for order in call:
                try:
                    self._carry_out(order, channel.address, call)
                except SkepError as error:
                    await call.send(skep.TunnelUpdate(id=order.id, error=str(error)))
        raise Unavailable(f"{channel.address} ended the tunnel orders")

    def _carry_out(
        self, order: skep.TunnelOrder, address: str, orders: StreamCall[skep.TunnelUpdate, skep.TunnelOrder]
    ) -> None:
        """Start to open a tunnel.

        Raises:
            ResourceExhausted: There are too many tunnels.
            Unavailable: This node is about to leave the cluster.
        """
        if self._group is None:
            raise Unavailable("the node cannot open connections now")
        if self._count >= TUNNELS_MAX:
            raise ResourceExhausted(f"the node already has {TUNNELS_MAX} connections to its containers")
        self._count += 1
        self._group.create_task(self._open(order, address, orders), name=f"tunnel {order.id}")

    async def _open(
        self, order: skep.TunnelOrder, address: str, orders: StreamCall[skep.TunnelUpdate, skep.TunnelOrder]
    ) -> None:
        assert self._connections is not None, "run creates the connections"
        try:
            container = await self._access.connect(order.request)
            try:
                async with (
                    self._connections.channel(address) as channel,
                    channel.stream(methods.TUNNEL) as call,
                ):
                    await call.send(skep.TunnelPiece(id=order.id))
                    await join_container(container, Tunnel(call.receive, call.send))
            finally:
                container.abort()
        except (SkepError, OSError) as error:
            log.info("tunnel ended early", task=order.request.task_id, reason=describe_error(error))
            await _refuse(orders, order, describe_error(error))
        except Exception as error:  # an error of this tunnel only
            log_error(error, "tunnel failed", task=order.request.task_id)
            await _refuse(orders, order, "the node failed to open the connection: its log has the details")
        finally:
            self._count -= 1


async def _refuse(
    orders: StreamCall[skep.TunnelUpdate, skep.TunnelOrder], order: skep.TunnelOrder, reason: str
) -> None:
    """Report to the manager that a tunnel could not be opened.  An open tunnel reports its own end."""
    with suppress(SkepError):
        await orders.send(skep.TunnelUpdate(id=order.id, error=reason))
