"""Asks at ports of the underlay, a manager's and a docker node's gossip, and through tunnels of encrypted networks.

Sockets are made in the node's own namespace, or in that of the tunnels; each try has a deadline.
"""

import asyncio
import os
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable, Sequence
from functools import cache, partial
from ipaddress import ip_address
from pathlib import Path
from typing import Protocol

from skep.aio.clock import Clock
from skep.dataplane.netns.namespaces import Namespaces
from skep.dataplane.plan.probe import host_and_port
from skep.dataplane.plan.wireguard import PORT_OFFSET
from skep.dataplane.probe.findings import port_finding
from skep.dataplane.probe.packets import Outcome
from skep.model.ids import NodeId
from skep.model.paths import PathCheck, PathFinding, PathPeer, ProbeTargets

TRIES = 2
TRY_S = 2.0
_PAUSE_S = 0.2
_TLS_HANDSHAKE, _TLS_ALERT = 22, 21
_RECORD_BYTES = 5
_ECHO = struct.Struct(">BBHHH")
_ECHO_REQUEST, _ECHO_REPLY = 128, 129


class PortProbe:
    """From one node's ``home`` namespace.  ``numbers``: random, of 64 bits."""

    def __init__(self, namespaces: Namespaces, clock: Clock, numbers: Callable[[], int]) -> None:
        self._namespaces = namespaces
        self._clock = clock
        self._numbers = numbers

    async def hello(self, address: str, port: int) -> Outcome:
        """A TLS hello over TCP, which a server answers with its own."""
        return await self._tried(partial(self._say_hello, address, port))

    async def connect(self, address: str, port: int) -> Outcome:
        """A TCP connection, and nothing more."""
        return await self._tried(partial(self._connect, address, port))

    async def tunnel(self, namespace: Path, address: str) -> Outcome:
        """An ICMPv6 echo of the peer's address in the tunnels, whose namespace this is; its kernel answers."""
        return await self._tried(partial(self._echo, namespace, address))

    async def _tried(self, probe: Callable[[], Awaitable[str]]) -> Outcome:
        """Up to ``TRIES`` times until it succeeds; ``probe`` gives what is wrong, empty: nothing."""
        error = ""
        for attempt in range(TRIES):
            began = self._clock.monotonic()
            try:
                async with asyncio.timeout(TRY_S):
                    error = await probe()
            except TimeoutError:
                error = "no answer"
            except OSError as refused:
                # asyncio writes its own sentence over the kernel's.
                error = os.strerror(refused.errno).lower() if refused.errno else str(refused)
            if not error:
                return Outcome(sent=attempt + 1, answered=1, round_trip_s=self._clock.monotonic() - began)
            if attempt < TRIES - 1:
                await self._clock.sleep(_PAUSE_S)
        return Outcome(sent=TRIES, answered=0, error=error)

    async def _connect(self, address: str, port: int) -> str:
        with await self._opened(address, socket.SOCK_STREAM) as opened:
            await asyncio.get_running_loop().sock_connect(opened, (address, port))
        return ""

    async def _say_hello(self, address: str, port: int) -> str:
        loop = asyncio.get_running_loop()
        with await self._opened(address, socket.SOCK_STREAM) as opened:
            await loop.sock_connect(opened, (address, port))
            await loop.sock_sendall(opened, client_hello())
            record = b""
            while len(record) < _RECORD_BYTES:
                part = await loop.sock_recv(opened, _RECORD_BYTES - len(record))
                if not part:
                    return "the connection is closed without an answer"
                record += part
        return "" if record[0] in (_TLS_HANDSHAKE, _TLS_ALERT) else "it does not speak TLS"

    async def _echo(self, namespace: Path, address: str) -> str:
        """The kernel writes the checksum.  Source: RFC 4443, section 4."""
        loop = asyncio.get_running_loop()
        content = self._numbers().to_bytes(8, "big")
        kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        opened = await self._namespaces.run(
            namespace, socket.socket, socket.AF_INET6, kind, socket.IPPROTO_ICMPV6
        )
        with opened:
            # asyncio would look the port up as a service's, and sockets of this kind have none.
            opened.connect((address, 0))
            await loop.sock_sendall(opened, _ECHO.pack(_ECHO_REQUEST, 0, 0, 0, 0) + content)
            while True:  # another's, or an older one: the deadline ends this
                answer = await loop.sock_recv(opened, 1 << 11)
                if answer[:1] == bytes((_ECHO_REPLY,)) and answer[_ECHO.size :] == content:
                    return ""

    async def _opened(self, address: str, kind: socket.SocketKind) -> socket.socket:
        family = socket.AF_INET6 if ip_address(address).version == 6 else socket.AF_INET
        flags = kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        return await self._namespaces.run(self._namespaces.home, socket.socket, family, flags)


def client_hello() -> bytes:
    """The first bytes of a TLS client that verifies nothing: nothing is sent over the connection."""
    outgoing = ssl.MemoryBIO()
    connection = _context().wrap_bio(ssl.MemoryBIO(), outgoing)
    try:
        connection.do_handshake()
    except ssl.SSLWantReadError:
        return outgoing.read()
    raise AssertionError("a client waits for its server's hello")


@cache
def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


NO_KEY = Outcome(sent=1, answered=0, error="the node publishes no WireGuard key, or this one has none")


class TunnelAddresses(Protocol):
    """The tunnels of encrypted networks (``wireguard.tunnels.Tunnels``)."""

    @property
    def namespace(self) -> Path: ...

    def address_of(self, node: NodeId) -> str: ...

    def port_of(self, node: NodeId) -> int: ...


class PortChecks:
    """A manager's ports, a docker node's gossip, the tunnel of encrypted networks: those that the peer has."""

    def __init__(self, port_probe: PortProbe, tunnels: TunnelAddresses) -> None:
        self._port_probe = port_probe
        self._tunnels = tunnels

    async def findings(self, targets: ProbeTargets | None, peer: PathPeer) -> Sequence[PathFinding]:
        """One after the other: most peers have one at most."""
        found = []
        if peer.control:
            address, port = host_and_port(peer.control)
            outcome = await self._port_probe.hello(address, port)
            found.append(port_finding(PathCheck.CONTROL, peer, address, port, outcome, protocol="tcp"))
        if peer.etcd:
            # No hello: what etcd says of a connection alone is left out of the log (``store.etcd.output``).
            address, port = host_and_port(peer.etcd)
            outcome = await self._port_probe.connect(address, port)
            found.append(port_finding(PathCheck.ETCD, peer, address, port, outcome, protocol="tcp"))
        if peer.gossip:
            address, port = host_and_port(peer.gossip)
            outcome = await self._port_probe.connect(address, port)
            found.append(port_finding(PathCheck.GOSSIP, peer, address, port, outcome, protocol="tcp"))
        if peer.encrypted and peer.data_path and targets is not None and targets.node.data_path:
            address, port = (
                peer.data_path,
                self._tunnels.port_of(peer.node_id) or peer.vxlan_port + PORT_OFFSET,
            )
            inner = self._tunnels.address_of(peer.node_id)
            outcome = await self._port_probe.tunnel(self._tunnels.namespace, inner) if inner else NO_KEY
            found.append(port_finding(PathCheck.ENCRYPTED, peer, address, port, outcome, protocol="udp"))
        return found
