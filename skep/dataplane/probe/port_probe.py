"""Probes ports on the underlay (managers' ports, the gossip port of Docker nodes) and the tunnels of encrypted
networks.

Sockets are opened in the node's own namespace, or in the namespace of the tunnels.  Each attempt has a time limit.
"""

import asyncio
import os
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from functools import cache, partial
from ipaddress import ip_address
from pathlib import Path
from typing import Protocol

from skep.aio.clock import Clock
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.plan.probe import host_and_port
from skep.dataplane.probe.findings import port_finding
from skep.dataplane.probe.packets import Outcome
from skep.model.networks.paths import PathCheck, PathFinding, PathPeer, ProbeTargets
from skep.model.networks.reserved_ports import WIREGUARD_OFFSET
from skep.model.values.ids import NodeId

TRIES = 2
"""Attempts for one port, because a single one may fail by chance, such as a ping that is lost."""
TRY_S = 2.0
"""Time limit in seconds for one attempt.  Long enough for a lost SYN to be sent again once."""
_PAUSE_S = 0.2
"""Seconds between attempts."""
# Content types of TLS records, RFC 8446, section 5.1.
_TLS_HANDSHAKE, _TLS_ALERT = 22, 21
_RECORD_BYTES = 5
"""Length of a TLS record header."""
_ICMP_ECHO = struct.Struct(">BBHHH")
# Types of ICMPv6, RFC 4443.
_ECHO_REQUEST, _ECHO_REPLY = 128, 129


class PortProbe:
    """Sends probes from one node.  ``numbers`` returns 64 random bits."""

    def __init__(self, namespaces: Namespaces, clock: Clock, numbers: Callable[[], int]) -> None:
        self._namespaces = namespaces
        self._clock = clock
        self._numbers = numbers

    async def tls_hello(self, address: str, port: int) -> Outcome:
        """Send a TLS client hello over TCP, to which a server responds with its own hello."""
        return await self._retry(partial(self._tls_hello, address, port))

    async def connect(self, address: str, port: int) -> Outcome:
        """Open a TCP connection, and send nothing over it."""
        return await self._retry(partial(self._connect, address, port))

    async def tunnel(self, namespace: Path, address: str) -> Outcome:
        """Send an ICMPv6 echo request to the peer's ``address`` in the tunnels.

        ``namespace`` is the namespace of this node's tunnels.
        """
        return await self._retry(partial(self._echo, namespace, address))

    async def _retry(self, probe: Callable[[], Awaitable[str]]) -> Outcome:
        """Run ``probe`` up to ``TRIES`` times until it succeeds.  It returns its error, or an empty text."""
        error = ""
        for attempt in range(TRIES):
            began = self._clock.monotonic()
            try:
                async with asyncio.timeout(TRY_S):
                    error = await probe()
            except TimeoutError:
                error = "no response"
            except OSError as refused:
                # asyncio replaces the kernel's message.
                error = os.strerror(refused.errno).lower() if refused.errno else str(refused)
            if not error:
                return Outcome(sent=attempt + 1, answered=1, round_trip_s=self._clock.monotonic() - began)
            if attempt < TRIES - 1:
                await self._clock.sleep(_PAUSE_S)
        return Outcome(sent=TRIES, answered=0, error=error)

    async def _connect(self, address: str, port: int) -> str:
        with await self._socket(address, socket.SOCK_STREAM) as connection:
            await asyncio.get_running_loop().sock_connect(connection, (address, port))
        return ""

    async def _tls_hello(self, address: str, port: int) -> str:
        loop = asyncio.get_running_loop()
        with await self._socket(address, socket.SOCK_STREAM) as connection:
            await loop.sock_connect(connection, (address, port))
            await loop.sock_sendall(connection, client_hello())
            record = b""
            while len(record) < _RECORD_BYTES:
                part = await loop.sock_recv(connection, _RECORD_BYTES - len(record))
                if not part:
                    return "the connection is closed without a response"
                record += part
        return "" if record[0] in (_TLS_HANDSHAKE, _TLS_ALERT) else "the response is not TLS"

    async def _echo(self, namespace: Path, address: str) -> str:
        """Send an echo request.  The kernel writes the checksum.  Source: RFC 4443, section 4."""
        loop = asyncio.get_running_loop()
        content = self._numbers().to_bytes(8, "big")
        kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        connection = await self._namespaces.run(
            namespace, socket.socket, socket.AF_INET6, kind, socket.IPPROTO_ICMPV6
        )
        with connection:
            # asyncio would resolve the port as a service name, and raw sockets have no ports.
            connection.connect((address, 0))
            await loop.sock_sendall(connection, _ICMP_ECHO.pack(_ECHO_REQUEST, 0, 0, 0, 0) + content)
            while True:  # skip replies to other requests until the deadline
                reply = await loop.sock_recv(connection, 1 << 11)
                if reply[:1] == bytes((_ECHO_REPLY,)) and reply[_ICMP_ECHO.size :] == content:
                    return ""

    async def _socket(self, address: str, kind: socket.SocketKind) -> socket.socket:
        family = socket.AF_INET6 if ip_address(address).version == 6 else socket.AF_INET
        flags = kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        return await self._namespaces.run(self._namespaces.home, socket.socket, family, flags)


def client_hello() -> bytes:
    """Return the first message of a TLS client.  Certificates need not be verified, because no data follows."""
    outgoing = ssl.MemoryBIO()
    connection = _context().wrap_bio(ssl.MemoryBIO(), outgoing)
    try:
        connection.do_handshake()
    except ssl.SSLWantReadError:
        return outgoing.read()
    raise AssertionError("a handshake cannot end without the server's hello")


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
    def namespace(self) -> Path:
        """Namespace of the tunnels on this node."""

    def address_of(self, node: NodeId) -> str:
        """Return the address of ``node`` inside the tunnels, or an empty text without a tunnel to it."""

    def port_of(self, node: NodeId) -> int:
        """Return the UDP port of the node's WireGuard device, or 0 if it is unknown."""


class PortChecks:
    """Probes the ports of a peer: a manager's ports, the gossip port of a Docker node, the tunnel of encrypted
    networks.
    """

    def __init__(self, port_probe: PortProbe, tunnels: TunnelAddresses) -> None:
        self._port_probe = port_probe
        self._tunnels = tunnels

    async def findings(self, targets: ProbeTargets | None, peer: PathPeer) -> Sequence[PathFinding]:
        """Probe all ports of the peer at the same time, because a peer that has failed uses up each time limit."""
        async with asyncio.TaskGroup() as group:
            probes = [group.create_task(one) for one in self._probes(targets, peer)]
        return [one.result() for one in probes]

    def _probes(
        self, targets: ProbeTargets | None, peer: PathPeer
    ) -> Iterator[Coroutine[None, None, PathFinding]]:
        probe = self._port_probe
        if peer.control:
            yield _finding_at(PathCheck.CONTROL, peer, peer.control, probe.tls_hello)
        if peer.etcd:
            # No TLS hello, because etcd would log it.  etcd's log line for a mere connection is filtered out
            # (``store.etcd.process.member``).
            yield _finding_at(PathCheck.ETCD, peer, peer.etcd, probe.connect)
        if peer.gossip:
            yield _finding_at(PathCheck.GOSSIP, peer, peer.gossip, probe.connect)
        if peer.encrypted and peer.data_path and targets is not None and targets.node.data_path:
            yield self._tunnel_finding(peer)

    async def _tunnel_finding(self, peer: PathPeer) -> PathFinding:
        port = self._tunnels.port_of(peer.node_id) or peer.vxlan_port + WIREGUARD_OFFSET
        inner = self._tunnels.address_of(peer.node_id)
        outcome = await self._port_probe.tunnel(self._tunnels.namespace, inner) if inner else NO_KEY
        return port_finding(PathCheck.ENCRYPTED, peer, peer.data_path, port, outcome, protocol="udp")


async def _finding_at(
    check: PathCheck, peer: PathPeer, place: str, probe: Callable[[str, int], Awaitable[Outcome]]
) -> PathFinding:
    address, port = host_and_port(place)
    return port_finding(check, peer, address, port, await probe(address, port), protocol="tcp")
