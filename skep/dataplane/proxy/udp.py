"""One relayed UDP port: a session for each client, with a socket connected to a task."""

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec

from skep.aio.clock import Clock
from skep.dataplane.proxy.relays import RelayPort, backend_order
from skep.linux.descriptors import set_aside

SESSIONS_MAX = 1024
"""Limit for the sessions of one port.  A further one replaces the session that was idle longest."""
IDLE_S = 90.0
"""Seconds of idle time after which a session may end.

Source: moby, libnetwork/cmd/proxy/udp_proxy_linux.go (UDPConnTrackTimeout).
"""
_DATAGRAM_BYTES_MAX = 65535
"""No datagram is longer."""
_AT_ONCE_MAX = 64
"""Number of datagrams read in a row before other work of the event loop."""
_CONTROL_BYTES = socket.CMSG_SPACE(20)

_Client = tuple[Any, bytes]
"""The client's socket address, and the destination address of its datagrams as reported by the kernel."""


class _Session(msgspec.Struct):
    socket: socket.socket
    backend: tuple[str, int]
    last_s: float


class UdpRelay:
    """Serves one port through ``listener``, which is bound.

    The routing mesh uses it for IPv6 only, because the kernel forwards IPv4.  An IPv4 listener must be bound to a
    specific address, which becomes the source of responses.
    """

    def __init__(
        self,
        port: RelayPort,
        listener: socket.socket,
        clock: Clock,
        rng: Callable[[], float],
        in_namespace: Callable[[Callable[[], socket.socket]], socket.socket],
    ) -> None:
        self._port = port
        self._listener = listener
        self._clock = clock
        self._rng = rng
        self._in_namespace = in_namespace
        self._sessions: dict[_Client, _Session] = {}
        self._next_check_s = 0.0
        if listener.family == socket.AF_INET6:
            # A response must have the request's destination as its source.
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        asyncio.get_running_loop().add_reader(listener, self._read_clients)

    def update(self, port: RelayPort) -> None:
        """End the sessions with removed backends.  The client's next datagram is sent to another backend."""
        self._port = port
        for client, session in tuple(self._sessions.items()):
            if session.backend not in (*port.backends, *port.new):
                self._end(client)

    def close(self, *, ends_connections: bool = False) -> None:
        """Close the port and all sessions."""
        for client in tuple(self._sessions):
            self._end(client)
        asyncio.get_running_loop().remove_reader(self._listener)
        self._listener.close()

    def _read_clients(self) -> None:
        """Relay datagrams from clients."""
        for _ in range(_AT_ONCE_MAX):
            try:
                data, control, _, peer = self._listener.recvmsg(_DATAGRAM_BYTES_MAX, _CONTROL_BYTES)
            except OSError:  # nothing more to read, or an ICMP error
                return
            destination = next(
                (
                    value
                    for level, kind, value in control
                    if (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO)
                ),
                b"",
            )
            session = self._session((peer, destination))
            if session is not None:
                session.last_s = self._clock.monotonic()
                with suppress(OSError):  # UDP may lose datagrams
                    session.socket.send(data)

    def _session(self, client: _Client) -> _Session | None:
        self._end_idle()
        session = self._sessions.get(client)
        if session is None:
            backends = backend_order(self._port, client[0][0], self._rng)
            if not backends:
                return None
            if len(self._sessions) >= SESSIONS_MAX:
                self._end(min(self._sessions, key=lambda one: self._sessions[one].last_s))
            family = socket.AF_INET6 if ":" in backends[0][0] else socket.AF_INET
            kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
            try:
                backend = set_aside(self._in_namespace(lambda: socket.socket(family, kind)))
            except OSError:  # no free descriptor
                return None
            try:
                backend.connect(backends[0])
            except OSError:
                backend.close()
                return None
            session = self._sessions[client] = _Session(backend, backends[0], self._clock.monotonic())
            asyncio.get_running_loop().add_reader(backend, self._read_backend, client, session)
        return session

    def _read_backend(self, client: _Client, session: _Session) -> None:
        """Relay datagrams from a task."""
        peer, destination = client
        control = [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, destination)] if destination else []
        for _ in range(_AT_ONCE_MAX):
            try:
                data = session.socket.recv(_DATAGRAM_BYTES_MAX)
            except OSError:  # nothing more to read, or the port is closed
                return
            session.last_s = self._clock.monotonic()
            with suppress(OSError):
                self._listener.sendmsg([data], control, 0, peer)

    def _end_idle(self) -> None:
        now_s = self._clock.monotonic()
        if now_s < self._next_check_s:
            return
        self._next_check_s = now_s + IDLE_S / 10
        for client, session in tuple(self._sessions.items()):
            if now_s - session.last_s > IDLE_S:
                self._end(client)

    def _end(self, client: _Client) -> None:
        session = self._sessions.pop(client)
        asyncio.get_running_loop().remove_reader(session.socket)
        session.socket.close()
