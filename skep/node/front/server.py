"""Listens on the API hosts and passes each request to the process that answers it."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Protocol

import msgspec
import structlog
from aiohttp import web

from skep.aio.connections.admission import Admission, Newcomers, peer_source
from skep.aio.connections.handshakes import ACCEPT_RETRY_S, HANDSHAKES_MAX, Handshakes
from skep.api.access.identity import identify
from skep.api.errors import status_of
from skep.api.http.connection import Connection, Gone
from skep.api.http.framing import (
    Malformed,
    is_for_manager,
    is_readable,
    parse_request,
    path_of,
    plain_ping,
    read_head,
    with_target,
)
from skep.configuration.configuration import Host, TcpHost, UnixHost
from skep.errors import FailedPrecondition, NotFound, PermissionDenied, SkepError, Unavailable
from skep.linux.unix_sockets import let_group_in, private_socket
from skep.model.permissions.access import Identity
from skep.node.front.application import Application
from skep.node.front.handover import Handover, Passed, Returned
from skep.node.front.routing import Destination, OwnObjects, is_build, route
from skep.node.front.splice import relay, splice
from skep.node.front.task_requests import as_task_request
from skep.node.front.users import KnownUsers, bearer

log = structlog.get_logger()

_BACKLOG = 1024
"""Connections that the kernel queues.  A busy event loop accepts late, and a full queue would refuse clients."""
_CONNECTIONS_MAX = 4096
"""Limit for connections on Unix sockets.  Further ones are closed.

Includes connections that wait for routing, and those served by the manager process or the engine.
"""
_ACCEPTED_AT_ONCE = 64
"""Number of connections accepted in a row before other work of the event loop."""
_FIRST_BYTES = 64 * 1024
"""Limit in bytes for the first read of a connection."""
_KEEPALIVE = {socket.TCP_KEEPIDLE: 15, socket.TCP_KEEPINTVL: 15, socket.TCP_KEEPCNT: 9}
"""Keepalive settings that detect TCP clients that vanish without closing.  Docker uses the same values (Go's defaults).
"""


class ClientLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of TCP clients."""

    connections: int = 2048
    """Limit for TCP connections, whichever process serves them.

    Counted separately from Unix sockets, so that TCP clients cannot lock out root.
    """
    connections_per_source: int = 512
    """Limit for the connections of one source address.  Generous, because many clients may share an address."""
    handshakes: int = HANDSHAKES_MAX
    """Limit for concurrent TLS handshakes."""
    strangers: int = 256
    """Limit for connections whose client has shown neither a certificate nor a token."""
    strangers_per_source: int = 32
    """The same limit for one source address.

    More than a few are open only while several clients behind one address connect at the same moment.
    """
    stranger_s: float = 10.0
    """Seconds for the head with the token to start, and then to arrive.  Clients send it at once."""
    request_s: float = 60.0
    """Seconds for the head of a request to arrive, also of local clients."""
    idle_s: float = 300.0
    """Seconds that a connection may be idle before a request.  Docker waits forever."""


class FrontOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of a front for its connections."""

    divert: Callable[[socket.socket], bool] = lambda _: False
    """Takes over a new connection to a Unix socket if a container made it.  Returns whether it did."""
    limits: ClientLimits = ClientLimits()


OPTIONS = FrontOptions()


class SwarmMembership(Protocol):
    """The part of this node's membership in a swarm that the front needs."""

    def manager_refusal(self) -> str | None:
        """Return Docker's message if this node has no manager, or None if it has one or soon will."""


class _Properties(msgspec.Struct, frozen=True, kw_only=True):
    """Properties of a connection.

    Args:
        is_remote: Whether the client is on another machine.  Idle times of remote clients are limited.
        is_relayed: Whether this process identifies each request and relays the data (TCP hosts), because the connection
            cannot be passed to another process.
        is_stranger: Whether its client has no certificate and has not sent a token yet.
        identity: The client, or None for the permissions of a Unix socket.
    """

    is_remote: bool
    is_relayed: bool = False
    is_stranger: bool = False
    identity: Identity | None = None

    def passed(self, connected: socket.socket) -> Passed:
        """Return ``connected`` as a connection of this client."""
        return Passed(connected, self.is_remote, self.identity)


class DockerSocket(msgspec.Struct, frozen=True):
    """Socket of the machine's Docker Engine.

    Args:
        path: The socket, or None without an engine.
        before_build: Copies the images that a build may use to the engine.
    """

    path: Path | None = None
    before_build: Callable[[], Awaitable[None]] | None = None


class Front:
    """The API sockets of one node.

    Args:
        here: The application with the node's own routes.
        users: Identities of the clients of TCP hosts.
    """

    def __init__(
        self,
        here: Application,
        handover: Handover,
        *,
        ownership: OwnObjects,
        membership: SwarmMembership,
        docker: DockerSocket,
        users: KnownUsers,
        options: FrontOptions = OPTIONS,
    ) -> None:
        self._here = here
        self._handover = handover
        self._ownership = ownership
        self._membership = membership
        self._docker = docker
        self._users = users
        self._divert = options.divert
        self._limits = limits = options.limits
        self._servers: list[asyncio.Server] = []
        self._background: list[asyncio.Task[None]] = []
        self._unread: set[socket.socket] = set()
        """Connections on Unix sockets that have sent nothing but pings so far."""
        self._unix_tasks: set[asyncio.Task[None]] = set()
        """Tasks that serve clients of Unix sockets."""
        self._tcp_tasks: set[asyncio.Task[None]] = set()
        """Tasks that serve clients of TCP hosts."""
        self._remote = Admission("api", limits.connections, limits.connections_per_source)
        """TCP connections of clients with an identity."""
        self._strangers: Newcomers[Connection] = Newcomers(
            "api connections without an identity",
            limits.strangers,
            limits.strangers_per_source,
            Connection.abort,
        )
        self._group: asyncio.TaskGroup | None = None
        """The task group while the front listens."""

    def serve(self, connected: socket.socket, identity: Identity) -> None:
        """Serve one end of a socket pair like the connection of a TCP client with this ``identity``."""
        if self._group is None:
            connected.close()
            return
        passed = Passed(connected, is_remote=True, identity=identity)
        self._start(self._group, self._go_on(Returned(passed)), is_remote=True)

    @asynccontextmanager
    async def listening(self, hosts: Sequence[Host]) -> AsyncIterator[None]:
        """Serve on ``hosts`` during the block.

        Raises: FailedPrecondition: cannot listen on a host.
        """
        with ExitStack() as bound:
            sockets = [(host, bound.enter_context(_listening_socket(host))) for host in hosts]
            async with asyncio.TaskGroup() as group:
                self._group = group
                try:
                    await self._listen(group, sockets)
                    yield
                finally:
                    self._group = None
                    for server in self._servers:
                        server.close()
                    self._close_local(sockets)
                    self._handover.close()
                    for task in (*self._background, *self._unix_tasks, *self._tcp_tasks):
                        task.cancel()

    def _close_local(self, sockets: Sequence[tuple[Host, socket.socket]]) -> None:
        loop = asyncio.get_running_loop()
        for host, listener in sockets:
            if isinstance(host, UnixHost):
                loop.remove_reader(listener)
        for connected in self._unread:
            loop.remove_reader(connected)
            connected.close()
        self._unread.clear()

    async def _listen(
        self,
        group: asyncio.TaskGroup,
        sockets: Sequence[tuple[Host, socket.socket]],
    ) -> None:
        loop = asyncio.get_running_loop()
        tls = self._users.tls
        new_connection = partial(Connection, partial(self._accepted_remote, group))
        for host, sock in sockets:
            if isinstance(host, UnixHost):
                sock.setblocking(False)
                sock.listen(_BACKLOG)
                loop.add_reader(sock, self._accept_local, group, sock)
            elif tls is None:
                server = await loop.create_server(new_connection, sock=sock, backlog=_BACKLOG)
                self._servers.append(server)
            else:
                sock.setblocking(False)
                accepting = Handshakes(new_connection, tls.front, self._limits.handshakes).accept(sock, group)
                self._background.append(group.create_task(accepting, name=f"accept connections on {host}"))
            log.info("api served", host=str(host))
        returned = group.create_task(self._take_back(group), name="connections passed back")
        self._background.append(returned)

    def _accepted_remote(self, group: asyncio.TaskGroup, client: Connection) -> None:
        is_stranger = not self._users.has_certificate(client.transport)
        if is_stranger:
            is_admitted = self._strangers.admit(client, peer_source(client.transport))
        else:
            is_admitted = self._remote.admit(client.transport)
        if not is_admitted:
            client.abort()
            return
        _probe_when_idle(client)
        properties = _Properties(is_remote=True, is_relayed=True, is_stranger=is_stranger)
        self._start(group, self._serve(client, properties), is_remote=True)

    def _accept_local(self, group: asyncio.TaskGroup, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                connected, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:  # no free descriptor, or the client has disconnected
                log.warning("api connection not accepted", error=str(error))
                loop.remove_reader(listener)
                loop.call_later(ACCEPT_RETRY_S, self._accept_again, group, listener)
                return
            if len(self._unix_tasks) + len(self._unread) + self._handover.local_count >= _CONNECTIONS_MAX:
                connected.close()
                continue
            connected.setblocking(False)
            if self._divert(connected):
                continue
            self._unread.add(connected)
            loop.add_reader(connected, self._read_first, group, connected)

    def _accept_again(self, group: asyncio.TaskGroup, listener: socket.socket) -> None:
        if listener.fileno() >= 0:
            asyncio.get_running_loop().add_reader(listener, self._accept_local, group, listener)

    def _read_first(self, group: asyncio.TaskGroup, connected: socket.socket) -> None:
        """Handle the first bytes of a local client without a task or a transport, if possible.

        Most clients, including each docker command, start with a ping.  After the ping, this handles the next request.
        """
        try:
            data = connected.recv(_FIRST_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if (response := self._ping(data)) is not None:
            # Otherwise the connection is closed below: the client has disconnected, or has sent many pings without
            # reading.
            with suppress(OSError):
                if connected.send(response) == len(response):
                    return
            data = b""
        asyncio.get_running_loop().remove_reader(connected)
        self._unread.remove(connected)
        local = Passed(connected, is_remote=False)
        if not data:
            connected.close()
        elif self._is_for_manager(data) and self._handover.is_ready:
            try:
                self._handover.pass_on(local, data)
            except Unavailable as error:
                log.warning("api connection not passed", error=str(error))
        else:
            self._start(group, self._go_on(Returned(local, data)), is_remote=False)

    def _ping(self, data: bytes) -> bytes | None:
        """Return the response to ``data`` if that is a usual ping, or None."""
        ping = plain_ping(data)
        return self._here.ping(*ping) if ping is not None else None

    def _is_for_manager(self, data: bytes) -> bool:
        """Return whether ``data`` starts with the complete head of a request to the manager."""
        end = data.find(b"\r\n\r\n") + 4
        if end < 4:
            return False
        try:
            target = read_head(data[:end]).target
        except Malformed:
            return False
        return is_for_manager(path_of(target)) and self._membership.manager_refusal() is None

    async def _take_back(self, group: asyncio.TaskGroup) -> None:
        """Serve connections that the manager process passes back or has left behind."""
        while True:
            returned = await self._handover.returned.get()
            self._start(group, self._go_on(returned), is_remote=returned.connection.is_remote)

    def _start(
        self, group: asyncio.TaskGroup, serving: Coroutine[None, None, None], *, is_remote: bool
    ) -> None:
        tasks = self._tcp_tasks if is_remote else self._unix_tasks
        task = group.create_task(serving, name="api connection")
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def _go_on(self, returned: Returned) -> None:
        try:
            client = await Connection.over(returned.connection.socket, returned.data)
        except OSError as error:
            log.warning("connection passed back is not served", error=str(error))
            returned.connection.socket.close()
            return
        if returned.refusal:
            await client.refuse(refusal(Unavailable(returned.refusal)))
        else:
            passed = returned.connection
            await self._serve(client, _Properties(is_remote=passed.is_remote, identity=passed.identity))

    async def _serve(self, client: Connection, properties: "_Properties") -> None:
        """Read the next request of ``client`` and pass it to the process that answers it.

        After that, the connection belongs to another process or is closed.
        """
        try:
            raw = client.head() or await _head(client, properties, self._limits)
            if raw:
                if properties.is_relayed:
                    properties, raw = self._identify(client, properties, raw)
                if properties.identity is not None:
                    identify(client.transport, properties.identity)
                await self._answer(client, raw, properties)
            else:
                client.close()
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
            self._strangers.forget(client)

    def _identify(
        self, client: Connection, properties: "_Properties", raw: bytes
    ) -> "tuple[_Properties, bytes]":
        """Return the properties with the client's identity, and the request's head in the form to pass on.

        Raises: Unauthenticated, Unavailable, Malformed.
        """
        credential = self._users.proved_by(client.transport)
        if credential is None:
            request = parse_request(raw)
            given = request.head.all(b"authorization")
            credential = bearer(given[0] if len(given) == 1 else b"")
            # The next request may come from another user, because a proxy may use one connection for all.
            close = () if request.upgrades else ((b"Connection", b"close"),)
            raw = request.head.with_headers(*close, without=(b"authorization", b"keep-alive"))
        identity = self._users.identify(credential)
        if properties.is_stranger:
            self._strangers.forget(client)
            if not self._remote.admit(client.transport):
                raise Unavailable(
                    "too many connections are open, from this address or in total: try again later"
                )
        self._users.remember(client.transport, credential, identity)
        return msgspec.structs.replace(properties, identity=identity, is_stranger=False), raw

    async def _answer(self, client: Connection, raw: bytes, properties: "_Properties") -> None:
        """Pass a request to its destination.  Raises: SkepError."""
        request = read_head(raw)
        identity = properties.identity
        if identity is not None:
            try:
                target = as_task_request(identity, request.method, request.target, self._ownership)
            except NotFound as error:
                raise await self._here.add_place(error, request.target, identity) from error
            if target:
                raw = with_target(raw, target)
                request = read_head(raw)
        match route(request.method, request.target, self._ownership, identity):
            case Destination.MANAGER:
                if (reason := self._membership.manager_refusal()) is not None:
                    if is_readable(request.method, path_of(request.target)):
                        self._hand_to_application(client, raw)
                        return
                    raise Unavailable(reason)
                await self._handover.wait_manager()
                if properties.is_relayed:
                    await self._relay(client, raw, properties)
                elif not client.is_lost:
                    self._handover.pass_on(properties.passed(client.duplicate()), raw + client.take())
                    client.abort()  # closes only one of this process's two descriptors
            case Destination.ENGINE if self._docker.path is not None:
                if identity is not None and not identity.is_admin:
                    raise PermissionDenied(
                        f"{identity.name} may not {request.method} {path_of(request.target)}: "
                        "the Docker Engine of this machine is for administrators only"
                    )
                if self._docker.before_build is not None and is_build(path_of(request.target)):
                    await self._docker.before_build()
                await splice(client, parse_request(raw), self._docker.path)
            case _:
                self._hand_to_application(client, raw)

    async def _relay(self, client: Connection, raw: bytes, properties: "_Properties") -> None:
        """Pass one end of a socket pair to the manager process, and relay between ``client`` and the other end."""
        ours, theirs = socket.socketpair()
        try:
            self._handover.pass_on(properties.passed(theirs), raw + client.take())
            manager = await Connection.over(ours)
        except BaseException:
            ours.close()
            raise
        await relay(client, manager, b"", is_one_exchange=False)

    def _hand_to_application(self, client: Connection, raw: bytes) -> None:
        """Pass the connection to the application, with the bytes that were read from it."""
        client.give_back(raw)
        client.give_to(self._here.server())


def _probe_when_idle(client: Connection) -> None:
    """Turn on keepalive, so that the kernel closes the connection of a client that no longer responds."""
    connected: socket.socket = client.transport.get_extra_info("socket")
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE.items():
        connected.setsockopt(socket.IPPROTO_TCP, option, value)


async def _head(client: Connection, properties: _Properties, limits: ClientLimits) -> bytes:
    """Return the head of the next request, or nothing if it takes too long or the client has closed.

    Raises: Malformed, Gone.
    """
    idle_s, request_s = limits.idle_s if properties.is_remote else None, limits.request_s
    if properties.is_stranger:
        idle_s = request_s = limits.stranger_s
    try:
        async with asyncio.timeout(idle_s):
            await client.wait_begun()
        async with asyncio.timeout(request_s):
            return await client.read_head()
    except TimeoutError:
        return b""


def refusal(error: SkepError) -> bytes:
    """Return a complete HTTP response for ``error``, which announces that the connection is closed."""
    status = 431 if isinstance(error, Malformed) and "too large" in str(error) else status_of(error)
    body = msgspec.json.encode({"message": str(error)}) + b"\n"
    reason = web.Response(status=status).reason
    return (
        f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    ).encode() + body


@contextmanager
def _listening_socket(host: Host) -> Iterator[socket.socket]:
    """Yield a bound socket.  A Unix socket is unlinked afterwards.  Raises: FailedPrecondition."""
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
    """Open a socket for root, and for the group ``docker`` if it exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if _is_served(path):
        raise FailedPrecondition(
            f"another process serves the API on unix://{path}: stop it, or choose another --host"
        )
    sock = private_socket(path)  # no other user may connect before the group is set
    try:
        let_group_in(path)
    except BaseException:
        sock.close()
        raise
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
