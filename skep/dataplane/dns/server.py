"""The name server of one container: two sockets in its namespace, and what arrives there.

What is known is answered in the moment it is read; what has to wait (for rules to be loaded, for another name server)
becomes a task, of which a container has a bounded number.
"""

import asyncio
import errno
import socket
from collections.abc import Awaitable, Callable
from typing import Protocol

import msgspec
import structlog

from skep.dataplane.dns.messages import (
    AAAA,
    NOERROR,
    NXDOMAIN,
    QUERY_BYTES_MAX,
    REFUSED,
    SERVFAIL,
    TCP_BYTES_MAX,
    A,
    Query,
    fitting,
    parse,
    reply,
)
from skep.dataplane.dns.records import TTL_S, Decision, Foreign, Found, Missing
from skep.dataplane.dns.rules import ADDRESS
from skep.dataplane.dns.upstream import Forwarder, NameServer, Open, read_message
from skep.errors import SkepError
from skep.linux.descriptors import set_aside
from skep.model.ids import NetworkId, ServiceId

log = structlog.get_logger()

WAITING_MAX = 256
"""Questions of one container that wait; more are refused.  As many again may wait for what is ours, so that who asks
too much elsewhere still finds services."""
CONNECTIONS_MAX = 64
"""TCP connections of one container; more are closed at once."""
IDLE_S = 10.0
"""A TCP connection without a question is closed after that."""
SINGLE_LABEL_S = 1.0
"""A name of one label, which the public DNS cannot have, is looked for elsewhere for so long."""
_BURST = 32
"""Datagrams of one container that are read before others have their turn."""
_BACKLOG = 128
ACCEPT_PAUSE_S = 0.1
"""After a connection could not be taken for want of descriptors: it still waits, and would be tried without end."""

Waiting = tuple[str, int, bytes]
"""A question that waits: client's address and port, message."""
Virtual = frozenset[tuple[NetworkId, ServiceId]]


class Sockets(msgspec.Struct, frozen=True):
    """Where a container's questions arrive."""

    udp: socket.socket
    tcp: socket.socket

    @property
    def ports(self) -> tuple[int, int]:
        return self.udp.getsockname()[1], self.tcp.getsockname()[1]

    def close(self) -> None:
        self.udp.close()
        self.tcp.close()


class Answers(Protocol):
    """What a container's names stand for."""

    def decide(self, query: Query) -> Decision:
        """What to answer, as of now."""

    def is_loaded(self, virtual: Virtual) -> bool:
        """Whether the container can use these virtual addresses."""

    async def load(self, virtual: Virtual) -> None:
        """Make it so.  Raises: SkepError."""


class Forwarding(msgspec.Struct, frozen=True):
    """What becomes of names that are not ours.

    ``does_single_labels``: False: they are answered with nothing, so that the client goes on with its search
    domains (it was told to, by ``ndots``).
    """

    servers: tuple[NameServer, ...]
    inside: Open
    does_single_labels: bool = True


def open_sockets(udp_port: int, tcp_port: int) -> Sockets:
    """The sockets, in the namespace of the calling thread.  A port that is taken (0: any) becomes another one.

    Raises: OSError.
    """
    udp = _bound(socket.SOCK_DGRAM, udp_port)
    try:
        tcp = _bound(socket.SOCK_STREAM, tcp_port)
        tcp.listen(_BACKLOG)
    except BaseException:
        udp.close()
        raise
    return Sockets(udp, tcp)


class ContainerServer:
    """Answers one container from ``start`` to ``stop``.

    ``start_task``: gives a task a parent.
    """

    def __init__(
        self,
        container: str,
        sockets: Sockets,
        answers: Answers,
        forwarder: Forwarder,
        forwarding: Forwarding,
        start_task: Callable[[Awaitable[None]], asyncio.Task[None]],
    ) -> None:
        self.sockets = sockets
        self._container = container
        self._answers = answers
        self._forwarder = forwarder
        self._forwarding = forwarding
        self._start_task = start_task
        self._waiting: dict[asyncio.Task[None], Waiting] = {}
        self._connections: set[asyncio.Task[None]] = set()
        self._is_running = False
        self._resuming: asyncio.TimerHandle | None = None

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        for one in (self.sockets.udp, self.sockets.tcp):
            one.setblocking(False)
        self._is_running = True
        loop.add_reader(self.sockets.udp, self._read)
        loop.add_reader(self.sockets.tcp, self._accept)

    def stop(self) -> tuple[Waiting, ...]:
        """Read nothing more; what waits is given back, for another server to answer.  The sockets stay open."""
        if not self._is_running:
            return ()
        self._is_running = False
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.sockets.udp)
        loop.remove_reader(self.sockets.tcp)
        if self._resuming is not None:
            self._resuming.cancel()
            self._resuming = None
        waiting = tuple(one for task, one in self._waiting.items() if not task.done())
        for task in (*self._waiting, *self._connections):
            task.cancel()
        return waiting

    def received(self, data: bytes, client: tuple[str, int]) -> None:
        """Answer the datagram ``data``, now or later."""
        query = parse(data)
        if query is None:
            return
        if isinstance(query, bytes):
            self._send(query, client)
            return
        decision = self._answers.decide(query)
        answer = self._at_once(query, decision, query.udp_bytes_max)
        most = WAITING_MAX if isinstance(decision, Foreign) else 2 * WAITING_MAX
        if answer is None and len(self._waiting) >= most:
            answer = reply(query, REFUSED, bytes_max=query.udp_bytes_max)
        if answer is not None:
            self._send(answer, client)
            return
        task = self._start_task(self._answer_later(query, data, decision, client))
        self._waiting[task] = (*client, data)
        task.add_done_callback(lambda done: self._waiting.pop(done, None))

    def _read(self) -> None:
        for _ in range(_BURST):
            try:
                data, client = self.sockets.udp.recvfrom(QUERY_BYTES_MAX + 1)
            except OSError:
                return  # nothing more, or nothing that could be repaired
            self.received(data, client)

    def _send(self, answer: bytes, client: tuple[str, int]) -> None:
        try:
            self.sockets.udp.sendto(answer, client)
        except OSError:
            return  # a full buffer, or a made-up address; the asker asks again

    async def _answer_later(
        self, query: Query, data: bytes, decision: Decision, client: tuple[str, int]
    ) -> None:
        self._send(await self._later(query, data, decision, query.udp_bytes_max, is_tcp=False), client)

    def _at_once(self, query: Query, decision: Decision, bytes_max: int) -> bytes | None:
        """The answer to ``query`` if nothing has to be waited for."""
        match decision:
            case Found(answers, extra, virtual):
                if not self._answers.is_loaded(virtual):
                    return None
                return reply(query, NOERROR, answers, extra, ttl_s=TTL_S, bytes_max=bytes_max)
            case Missing():
                return reply(query, NXDOMAIN, bytes_max=bytes_max)
            case Foreign(is_single_label):
                if is_single_label:
                    if not self._forwarding.does_single_labels and query.type in (A, AAAA):
                        return reply(query, NOERROR, bytes_max=bytes_max)
                    if self._forwarder.are_silent(self._forwarding.servers, self._container):
                        return reply(query, NXDOMAIN, bytes_max=bytes_max)
                return None if self._forwarding.servers else reply(query, SERVFAIL, bytes_max=bytes_max)

    async def _later(
        self, query: Query, data: bytes, decision: Decision, bytes_max: int, *, is_tcp: bool
    ) -> bytes:
        """The answer to ``query`` once all that it needs is there."""
        failure = reply(query, SERVFAIL, bytes_max=bytes_max)
        match decision:
            case Found(answers, extra, virtual):
                try:
                    await self._answers.load(virtual)
                except (SkepError, OSError) as error:
                    log.warning(
                        "a virtual address is not answered", container=self._container, reason=str(error)
                    )
                    return failure
                return reply(query, NOERROR, answers, extra, ttl_s=TTL_S, bytes_max=bytes_max)
            case Foreign(is_single_label):
                found = await self._forwarder.ask(
                    self._container,
                    query,
                    data,
                    self._forwarding.servers,
                    inside=self._forwarding.inside,
                    is_tcp=is_tcp,
                    **({"deadline_s": SINGLE_LABEL_S} if is_single_label else {}),
                )
                if found is not None:
                    return fitting(found, query, bytes_max)
                return reply(query, NXDOMAIN, bytes_max=bytes_max) if is_single_label else failure
            case Missing():
                return failure

    def _accept(self) -> None:
        try:
            connection, _ = self.sockets.tcp.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                loop = asyncio.get_running_loop()
                loop.remove_reader(self.sockets.tcp)
                self._resuming = loop.call_later(ACCEPT_PAUSE_S, self._accept_again)
            return  # else it has gone again
        if len(self._connections) >= CONNECTIONS_MAX:
            connection.close()
            return
        connection = set_aside(connection)
        connection.setblocking(False)
        task = self._start_task(self._converse(connection))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    def _accept_again(self) -> None:
        self._resuming = None
        asyncio.get_running_loop().add_reader(self.sockets.tcp, self._accept)

    async def _converse(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                async with asyncio.timeout(IDLE_S):
                    data = await read_message(connection)
                query = parse(data)
                if query is None:
                    return
                answer = query if isinstance(query, bytes) else await self._answer(query, data)
                async with asyncio.timeout(IDLE_S):
                    await loop.sock_sendall(connection, len(answer).to_bytes(2, "big") + answer)
        except (OSError, TimeoutError):
            return
        finally:
            connection.close()

    async def _answer(self, query: Query, data: bytes) -> bytes:
        decision = self._answers.decide(query)
        answer = self._at_once(query, decision, TCP_BYTES_MAX)
        return answer or await self._later(query, data, decision, TCP_BYTES_MAX, is_tcp=True)


def _bound(kind: socket.SocketKind, port: int) -> socket.socket:
    opened = socket.socket(socket.AF_INET, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, kind == socket.SOCK_STREAM)
        try:
            opened.bind((ADDRESS, port))
        except OSError:
            opened.bind((ADDRESS, 0))
    except BaseException:
        opened.close()
        raise
    return set_aside(opened)
