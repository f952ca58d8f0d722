"""One relayed TCP port: connections from clients to serving tasks, with a PROXY header if configured."""

import asyncio
import os
import socket
import struct
from collections.abc import Callable
from contextlib import closing, suppress
from ipaddress import ip_address

import structlog

from skep.dataplane.proxy.relays import RelayPort, backend_order
from skep.linux.descriptors import Listener, set_aside

log = structlog.get_logger()

CONNECTIONS_MAX = 1024
"""Limit for the connections of one port.  Further ones are refused."""
HALF_CLOSED_S = 3600.0
"""Seconds for which the open direction of a half-closed connection may be idle."""
_CONNECT_S = 3.0
"""Time limit in seconds for connecting to a container of this or another machine."""
_ATTEMPTS_MAX = 3
"""Number of backends that are tried for one connection.  With more, the client would stop waiting before."""
_BUFFER_BYTES = 64 * 1024
"""Limit in bytes for the data that waits for the other side, in each direction."""
_BACKLOG = 512
"""Connections of a burst that the kernel queues, because a connection that does not fit fails for its client."""
_KEEPALIVE = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 15, socket.TCP_KEEPCNT: 8}
"""Keepalive settings that detect vanished peers.  The connection of an idle peer stays open."""

_SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
# Source: HAProxy's proxy-protocol.txt, section 2.2.
_VERSION_2_PROXY = 0x21
_TCP_OVER_IPV4, _TCP_OVER_IPV6 = 0x11, 0x21


class TcpRelay:
    """Serves one port.  ``in_namespace`` opens sockets for connections to tasks."""

    def __init__(
        self,
        port: RelayPort,
        rng: Callable[[], float],
        in_namespace: Callable[[Callable[[], socket.socket]], socket.socket],
        connections_max: int = CONNECTIONS_MAX,
    ) -> None:
        self._port = port
        self._connections_max = connections_max
        self._rng = rng
        self._in_namespace = in_namespace
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.StreamWriter, asyncio.StreamWriter | None] = {}
        """The connection to the task by client, or None while it is being opened."""

    async def open(self, listener: socket.socket) -> None:
        """Accept connections from ``listener``, which is bound.  Another descriptor of the socket may hold the port."""
        # Connections stay in the kernel for a minute after the listener.  With this option, the next server still gets
        # the port at once.  Another socket cannot get the port while this one listens, even with the option.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._server = await asyncio.start_server(
            self._relay, sock=Listener.of(listener), limit=_BUFFER_BYTES, backlog=_BACKLOG
        )

    def update(self, port: RelayPort) -> None:
        """Use ``port`` for new connections from now on."""
        self._port = port

    def close(self, *, ends_connections: bool = False) -> None:
        """Stop accepting connections.

        With ``ends_connections``, because this process ends, open connections end too.  The socket keeps listening,
        because the next process may have it.  Otherwise the socket stops listening and only holds the port.
        """
        if self._server is not None:
            if not ends_connections:
                for listener in self._server.sockets:
                    _stop_listening(listener.fileno())
            self._server.close()
        if ends_connections:
            for pair in tuple(self._open.items()):
                for writer in pair:
                    if writer is not None:
                        writer.transport.abort()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= self._connections_max:
            _reset(writer)
            return
        self._open[writer] = None
        try:
            _set_options(writer)
            task = await self._connect_to_task(writer)
            if task is None:
                _reset(writer)
                return
            self._open[writer] = task[1]
            try:
                await _copy_both_ways((reader, writer), task)
            finally:
                task[1].close()
        finally:
            del self._open[writer]
            writer.close()

    async def _connect_to_task(
        self, client: asyncio.StreamWriter
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        """Connect to a serving task and send the header.  Return None if no backend can be reached."""
        peer, own = client.get_extra_info("peername"), client.get_extra_info("sockname")
        if peer is None:
            return None  # closed already
        for backend in backend_order(self._port, peer[0], self._rng)[:_ATTEMPTS_MAX]:
            try:
                async with asyncio.timeout(_CONNECT_S):
                    reader, writer = await self._connect(backend)
            except OSError as error:
                log.debug("backend not reached", address=backend, reason=str(error))
                continue
            _set_options(writer)
            writer.write(proxy_header(self._port.proxy_protocol, peer[:2], own[:2]))
            return reader, writer
        return None

    async def _connect(self, backend: tuple[str, int]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        family = socket.AF_INET6 if ":" in backend[0] else socket.AF_INET
        kind = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        connection = set_aside(self._in_namespace(lambda: socket.socket(family, kind)))
        try:
            await asyncio.get_running_loop().sock_connect(connection, backend)
            return await asyncio.open_connection(sock=connection, limit=_BUFFER_BYTES)
        except BaseException:
            connection.close()
            raise


def proxy_header(version: int, client: tuple[str, int], own: tuple[str, int]) -> bytes:
    """Return the header of a TCP connection from ``client`` to ``own`` (address and port, of one family).

    ``version`` is 1 or 2, or 0 for no header.  Source: haproxy, doc/proxy-protocol.txt, sections 2.1 and 2.2.
    """
    if version == 0:
        return b""
    source, destination = ip_address(client[0].partition("%")[0]), ip_address(own[0].partition("%")[0])
    is_ipv4 = source.version == 4
    if version == 1:
        family = "TCP4" if is_ipv4 else "TCP6"
        return f"PROXY {family} {source} {destination} {client[1]} {own[1]}\r\n".encode()
    addresses = source.packed + destination.packed + struct.pack("!HH", client[1], own[1])
    family_byte = _TCP_OVER_IPV4 if is_ipv4 else _TCP_OVER_IPV6
    return _SIGNATURE + struct.pack("!BBH", _VERSION_2_PROXY, family_byte, len(addresses)) + addresses


async def _copy_both_ways(
    client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    task: tuple[asyncio.StreamReader, asyncio.StreamWriter],
) -> None:
    """Copy until both directions have ended.  Passes a half-close on.  An error resets both connections."""
    idle_limit = _IdleLimit()
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(_copy(client[0], task[1], idle_limit), name="relay-to-task")
            group.create_task(_copy(task[0], client[1], idle_limit), name="relay-to-client")
    except* OSError:  # includes a timeout
        for _, writer in (client, task):
            _reset(writer)


class _IdleLimit:
    """The idle limit of a half-closed connection."""

    def __init__(self) -> None:
        self._is_half_closed = False
        self._limits: set[asyncio.Timeout] = set()

    def half_close(self) -> None:
        """Start the limit, because one direction has ended."""
        self._is_half_closed = True
        for limit in self._limits:
            limit.reschedule(asyncio.get_running_loop().time() + HALF_CLOSED_S)

    async def read_from(self, reader: asyncio.StreamReader) -> bytes:
        """Read the next data.  Raises: TimeoutError: the connection is half-closed and was idle for too long."""
        async with asyncio.timeout(HALF_CLOSED_S if self._is_half_closed else None) as limit:
            self._limits.add(limit)
            try:
                return await reader.read(_BUFFER_BYTES)
            finally:
                self._limits.discard(limit)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, idle_limit: _IdleLimit) -> None:
    while data := await idle_limit.read_from(reader):
        writer.write(data)
        await writer.drain()
    idle_limit.half_close()
    writer.write_eof()


def _set_options(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _stop_listening(descriptor: int) -> None:
    """Refuse clients from now on, even while another descriptor of the socket holds the port."""
    with closing(socket.socket(fileno=os.dup(descriptor))) as listener, suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        listener.shutdown(socket.SHUT_RD)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close the connection with a reset."""
    connection = writer.get_extra_info("socket")
    if connection.fileno() >= 0:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
