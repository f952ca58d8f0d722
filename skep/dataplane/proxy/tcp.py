"""One relayed TCP port: connections from clients to serving tasks, with a PROXY header if configured."""

import asyncio
import socket
import struct
from collections.abc import Callable

import structlog

from skep.dataplane.proxy.proxy_header import proxy_header
from skep.dataplane.proxy.relays import RelayPort, backend_order
from skep.linux.descriptors import Listener, set_aside

log = structlog.get_logger()

CONNECTIONS_MAX = 1024
"""Of one port; later ones are refused."""
HALF_CLOSED_S = 3600.0
"""How long the open direction of a connection may be silent when the other one has ended."""
_CONNECT_S = 3.0
_ATTEMPTS_MAX = 3
_BUFFER_BYTES = 64 * 1024
_BACKLOG = 512
_KEEPALIVE = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 15, socket.TCP_KEEPCNT: 8}
"""A peer that vanished is found out; one that is silent is left alone."""


class TcpRelay:
    """Serves one port.  ``in_namespace``: where connections to tasks are opened."""

    def __init__(
        self,
        port: RelayPort,
        rng: Callable[[], float],
        in_namespace: Callable[[Callable[[], socket.socket]], socket.socket],
    ) -> None:
        self._port = port
        self._rng = rng
        self._in_namespace = in_namespace
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    async def open(self, listener: socket.socket) -> None:
        """Take connections from ``listener``, which is bound."""
        self._server = await asyncio.start_server(
            self._relay, sock=Listener.of(listener), limit=_BUFFER_BYTES, backlog=_BACKLOG
        )

    def update(self, port: RelayPort) -> None:
        """New connections are served by this from now on."""
        self._port = port

    def close(self, *, ends_connections: bool = False) -> None:
        """Take no more connections; open ones go on unless they are to end."""
        if self._server is not None:
            self._server.close()
        if ends_connections:
            for writer in tuple(self._open):
                writer.transport.abort()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= CONNECTIONS_MAX:
            _reset(writer)
            return
        self._open.add(writer)
        _watch_over(writer)
        try:
            task = await self._connected(writer)
            if task is None:
                _reset(writer)
                return
            self._open.add(task[1])
            try:
                await _both_ways((reader, writer), task)
            finally:
                self._open.discard(task[1])
                task[1].close()
        finally:
            self._open.discard(writer)
            writer.close()

    async def _connected(
        self, client: asyncio.StreamWriter
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        """A connection to a serving task, its header sent; None: no backend can be reached."""
        peer, own = client.get_extra_info("peername"), client.get_extra_info("sockname")
        if peer is None:
            return None  # it is gone already
        for backend in backend_order(self._port, peer[0], self._rng)[:_ATTEMPTS_MAX]:
            try:
                async with asyncio.timeout(_CONNECT_S):
                    reader, writer = await self._connect(backend)
            except OSError as error:
                log.debug("task not reached", address=backend, reason=str(error))
                continue
            _watch_over(writer)
            writer.write(proxy_header(self._port.proxy_protocol, peer[:2], own[:2]))
            return reader, writer
        return None

    async def _connect(self, backend: tuple[str, int]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        family = socket.AF_INET6 if ":" in backend[0] else socket.AF_INET
        kind = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        opened = set_aside(self._in_namespace(lambda: socket.socket(family, kind)))
        try:
            await asyncio.get_running_loop().sock_connect(opened, backend)
            return await asyncio.open_connection(sock=opened, limit=_BUFFER_BYTES)
        except BaseException:
            opened.close()
            raise


async def _both_ways(
    client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    task: tuple[asyncio.StreamReader, asyncio.StreamWriter],
) -> None:
    """Until both directions have ended.  The end of one is passed on, a break of one breaks both."""
    silence = _Silence()
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(_one_way(client[0], task[1], silence), name="relay-to-task")
            group.create_task(_one_way(task[0], client[1], silence), name="relay-to-client")
    except* OSError:  # a time-out is one
        for _, writer in (client, task):
            _reset(writer)


class _Silence:
    """The deadline of the direction that is still open when the other one has ended."""

    def __init__(self) -> None:
        self._is_half_closed = False
        self._limits: set[asyncio.Timeout] = set()

    def end_one(self) -> None:
        """One direction has ended."""
        self._is_half_closed = True
        for limit in self._limits:
            limit.reschedule(asyncio.get_running_loop().time() + HALF_CLOSED_S)

    async def read(self, reader: asyncio.StreamReader) -> bytes:
        """What comes next.  Raises: TimeoutError: nothing, for too long."""
        async with asyncio.timeout(HALF_CLOSED_S if self._is_half_closed else None) as limit:
            self._limits.add(limit)
            try:
                return await reader.read(_BUFFER_BYTES)
            finally:
                self._limits.discard(limit)


async def _one_way(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, silence: _Silence) -> None:
    while data := await silence.read(reader):
        writer.write(data)
        await writer.drain()
    silence.end_one()
    writer.write_eof()


def _watch_over(writer: asyncio.StreamWriter) -> None:
    opened = writer.get_extra_info("socket")
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
        opened.setsockopt(socket.IPPROTO_TCP, option, value)


def _reset(writer: asyncio.StreamWriter) -> None:
    """End it with a reset, so that the client knows at once."""
    opened = writer.get_extra_info("socket")
    if opened.fileno() >= 0:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
