"""Listens on the API hosts and gives each request to whom it belongs."""

import asyncio
import grp
import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

import msgspec
import structlog
from aiohttp import web

from skep.aio.clock import Clock
from skep.aio.guard import report
from skep.aio.handshakes import Handshakes, source_of
from skep.api.errors import status_of
from skep.configuration.configuration import Host, TcpHost, UnixHost
from skep.errors import FailedPrecondition, SkepError, Unavailable
from skep.node.front.framing import Malformed, Request, parse_request, plain_request
from skep.node.front.quick import QuickRelay
from skep.node.front.relay import Connections, go_on, relay
from skep.node.front.routing import Destination, Knowledge, route
from skep.node.front.side import Gone, Side
from skep.node.front.splice import splice
from skep.node.swarm_info import why_waiting

log = structlog.get_logger()

_BACKLOG = 1024
_CONNECTIONS_MAX = 4096
"""On unix sockets, of those whose requests are relayed or about to be routed; further ones are dropped."""
_TCP_CONNECTIONS_MAX = 2048
"""Of all by TCP, whoever answers them; counted for themselves, so that root's socket is never full of them."""
_TCP_PER_SOURCE_MAX = 512
_REQUEST_TIMEOUT_S = 60.0
"""For a head, or a whole small request, to arrive; and for the next byte of a long body whose length was said."""
_IDLE_S = 300.0
"""Of a connection by TCP between two requests; Docker waits for ever."""
_LOOK_S = 5.0
_GROUP = "docker"


class Membership(Protocol):
    """What the front asks about this node's part in a swarm."""

    def manager_refusal(self) -> str | None:
        """Why no manager of this node answers, in Docker's words; None: one does, or will in a moment."""


class Front:
    """The API sockets of one node.

    Args:
        here: the application for what the node answers itself; it closes the connection after each answer, since
            the next request on it may not be its own.
    """

    def __init__(
        self,
        here: web.Server,
        *,
        knowledge: Knowledge,
        membership: Membership,
        manager_socket: Path,
        manager_waiting: Path,
        engine_socket: Path | None,
        clock: Clock,
        chance: Callable[[], float],
    ) -> None:
        self._here = here
        self._knowledge = knowledge
        self._membership = membership
        self._engine_socket = engine_socket
        self._connections = Connections(manager_socket, clock, chance, partial(why_waiting, manager_waiting))
        self._servers: list[asyncio.Server] = []
        self._watching: list[asyncio.Task[None]] = []
        self._open: set[asyncio.Task[None]] = set()
        self._remote = _Remote()
        self._waiting_for: set[QuickRelay] = set()

    @asynccontextmanager
    async def listening(
        self, hosts: Sequence[Host], tls: ssl.SSLContext | None = None
    ) -> AsyncIterator[None]:
        """Serve on ``hosts`` while the context is open.

        Raises: FailedPrecondition: one of them cannot be listened on.
        """
        with ExitStack() as bound:
            sockets = [(host, bound.enter_context(_listening_socket(host))) for host in hosts]
            async with asyncio.TaskGroup() as group:
                try:
                    await self._listen(group, sockets, tls)
                    yield
                finally:
                    for server in self._servers:
                        server.close()
                    for watching in self._watching:
                        watching.cancel()
                    self._connections.close()
                    for task in self._open:
                        task.cancel()

    async def _listen(
        self,
        group: asyncio.TaskGroup,
        sockets: Sequence[tuple[Host, socket.socket]],
        tls: ssl.SSLContext | None,
    ) -> None:
        loop = asyncio.get_running_loop()
        for host, sock in sockets:
            new_side = partial(Side, partial(self._opened, group, isinstance(host, TcpHost)))
            if isinstance(host, UnixHost):
                server = await loop.create_unix_server(new_side, sock=sock, backlog=_BACKLOG)
                self._servers.append(server)
            elif tls is None:
                server = await loop.create_server(new_side, sock=sock, backlog=_BACKLOG)
                self._servers.append(server)
            else:
                sock.setblocking(False)
                accepting = Handshakes(new_side, tls).accept(sock, group)
                self._watching.append(group.create_task(accepting, name=f"accept connections on {host}"))
            log.info("api served", host=str(host))
        self._watching.append(group.create_task(self._end_overdue(), name="overdue api connections"))

    def _opened(self, group: asyncio.TaskGroup, is_tcp: bool, side: Side) -> None:
        if not (self._remote.admit(side.transport) if is_tcp else len(self._open) < _CONNECTIONS_MAX):
            side.abort()
            return
        task = group.create_task(self._serve(side, is_tcp=is_tcp), name="api connection")
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    async def _end_overdue(self) -> None:
        """Until cancelled, end connections by TCP whose clients keep a request, or the next one, to themselves."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_LOOK_S)
            for quick in tuple(self._waiting_for):
                try:
                    quick.end_if_overdue(loop.time(), request_s=_REQUEST_TIMEOUT_S, idle_s=_IDLE_S)
                except Exception as error:  # whatever it is, it is one connection
                    report(error, "api connection not ended")
                    self._waiting_for.discard(quick)

    async def _serve(self, client: Side, *, is_tcp: bool) -> None:
        """Answer the requests of one connection, one after another."""
        quick = QuickRelay(client, self._connections, self._is_for_manager)
        if is_tcp:
            self._waiting_for.add(quick)
        try:
            while True:
                if (under_way := await quick.wait_needed()) is not None:
                    going_on = go_on(
                        client, under_way.request, under_way.sent, under_way.manager, self._connections
                    )
                    if not await self._asked(client, going_on):
                        return
                    continue
                await client.wait_begun()
                if not (raw := client.head() or await _rest_of_head(client)):
                    client.close()
                    return
                if not await self._answer(client, raw):
                    return
        except Gone:
            client.abort()
        except SkepError as error:
            await client.refuse(refusal(error))
        except Exception:
            log.exception("api connection failed")
            client.abort()
        except BaseException:
            client.abort()
            raise
        finally:
            self._waiting_for.discard(quick)

    async def _answer(self, client: Side, raw: bytes) -> bool:
        """Have one request answered; whether this loop reads the next one of this connection.  Raises: SkepError."""
        asked = plain_request(raw) or parse_request(raw)
        match route(asked.method, asked.target, self._knowledge):
            case Destination.MANAGER:
                return await self._ask_manager(client, parse_request(raw))
            case Destination.ENGINE if self._engine_socket is not None:
                await splice(client, parse_request(raw), self._engine_socket)
                return False
            case _:
                self._hand_over(client, raw)
                return False

    async def _ask_manager(self, client: Side, request: Request) -> bool:
        if (reason := self._membership.manager_refusal()) is not None:
            raise Unavailable(reason)
        return await self._asked(client, relay(client, request, self._connections))

    async def _asked(self, client: Side, relaying: Coroutine[None, None, bool]) -> bool:
        if await relaying:
            return True
        await client.linger()  # it may still be sending a body that the manager did not want to read
        return False

    def _is_for_manager(self, method: str, target: str) -> bool:
        """Whether the manager answers ``method`` on ``target``, and there is no word against asking it."""
        return (
            route(method, target, self._knowledge) is Destination.MANAGER
            and self._membership.manager_refusal() is None
        )

    def _hand_over(self, client: Side, raw: bytes) -> None:
        """Give the connection, with what was read of it, to the application."""
        handler = self._here()
        transport, waiting, ended = client.transport, client.take(), client.has_ended
        transport.set_protocol(handler)
        handler.connection_made(transport)
        handler.data_received(raw + waiting)
        if ended:
            handler.eof_received()


class _Remote:
    """The connections by TCP that are open, whoever has them by now."""

    def __init__(self) -> None:
        self._transports: dict[asyncio.Transport, str] = {}

    def admit(self, transport: asyncio.Transport) -> bool:
        """Count a new connection; False: there are too many, of its address or in all."""
        peer = transport.get_extra_info("peername")
        source = source_of(str(peer[0])) if peer else ""
        if not self._has_room(source):
            for known in tuple(self._transports):
                if known.is_closing():
                    del self._transports[known]
        if not self._has_room(source):
            log.warning("api connection refused: too many", source=source, of_source=self._count(source))
            return False
        self._transports[transport] = source
        return True

    def _has_room(self, source: str) -> bool:
        return len(self._transports) < _TCP_CONNECTIONS_MAX and self._count(source) < _TCP_PER_SOURCE_MAX

    def _count(self, source: str) -> int:
        return sum(one == source for one in self._transports.values())


async def _rest_of_head(client: Side) -> bytes:
    """A head whose beginning may have arrived; nothing if the rest takes too long or the client has closed."""
    try:
        async with asyncio.timeout(_REQUEST_TIMEOUT_S):
            return await client.read_head()
    except TimeoutError:
        return b""


def refusal(error: SkepError) -> bytes:
    """A whole answer that says why, after which the connection is closed."""
    status = 431 if isinstance(error, Malformed) and "too large" in str(error) else status_of(error)
    body = msgspec.json.encode({"message": str(error)}) + b"\n"
    reason = web.Response(status=status).reason
    return (
        f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    ).encode() + body


@contextmanager
def _listening_socket(host: Host) -> Iterator[socket.socket]:
    """A bound socket; a unix one is unlinked afterwards.  Raises: FailedPrecondition."""
    try:
        sock = _unix_listener(host.path) if isinstance(host, UnixHost) else _tcp_listener(host)
    except OSError as error:
        raise FailedPrecondition(
            f"the API cannot be served on {host}: {error.strerror or error}; choose another --host"
        ) from error
    with sock:
        try:
            yield sock
        finally:
            if isinstance(host, UnixHost):
                host.path.unlink(missing_ok=True)


def _unix_listener(path: Path) -> socket.socket:
    """A socket that root and the group ``docker``, if there is one, may use."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if _is_served(path):
        raise FailedPrecondition(
            f"another process serves the API on unix://{path}: stop it, or choose another --host"
        )
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)  # nobody else may connect before the group is set
    try:
        sock.bind(str(path))
    except OSError:
        sock.close()
        raise
    finally:
        os.umask(mask)
    try:
        os.chown(path, 0, grp.getgrnam(_GROUP).gr_gid)
        path.chmod(0o660)
    except KeyError:
        pass  # no such group: root only
    return sock


def _is_served(path: Path) -> bool:
    if not path.is_socket():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def _tcp_listener(host: TcpHost) -> socket.socket:
    family = socket.AF_INET6 if ":" in host.address else socket.AF_INET
    return socket.create_server((host.address, host.port), family=family, backlog=_BACKLOG)


def tls_context(certificate: Path, key: Path, authority: Path) -> ssl.SSLContext:
    """TLS for the API: clients prove with a certificate of ``authority`` who they are.

    Raises: FailedPrecondition: a file is not what it should be.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(certificate, key)
        context.load_verify_locations(authority)
    except (OSError, ssl.SSLError) as error:
        raise FailedPrecondition(
            f"TLS cannot be served with {certificate}, {key} and {authority}: {error}; "
            "they must be PEM files, the key that of the certificate"
        ) from error
    return context
