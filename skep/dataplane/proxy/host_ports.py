"""Relays IPv6 traffic of the node's ports to containers, because most have only IPv4 addresses on the gateway bridge.

As with docker-proxy, the container sees the node's address on the bridge as the address of its client.  The relays use
the sockets that hold the ports (``ports.Reservations``), so that a port is either served or free.
"""

import asyncio
import random
import socket
from collections.abc import Callable, Iterable

import structlog

from skep.aio.clock import Clock
from skep.aio.failures import describe_error
from skep.dataplane.net_process.protocol import Reservation
from skep.dataplane.proxy.relays import RelayPort
from skep.dataplane.proxy.tcp import TcpRelay
from skep.dataplane.proxy.udp import UdpRelay
from skep.linux.descriptors import set_aside

log = structlog.get_logger()

_Key = tuple[str, int, str]


class HostRelays:
    """The relays of one node's reserved ports."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._relays: dict[_Key, TcpRelay | UdpRelay] = {}
        self._changes = asyncio.Lock()
        """Held while a relay is opened.

        If a relay were opened twice, or after its end, its port would never be freed.
        """

    async def serve(self, held: Callable[[], Iterable[tuple[Reservation, socket.socket]]]) -> None:
        """Relay reservations that have a target, unless they are relayed already."""
        async with self._changes:
            for reservation, own in held():
                key = reservation.protocol, reservation.port, reservation.address
                if reservation.target is None or key in self._relays:
                    continue
                try:
                    self._relays[key] = await self._open(
                        reservation, reservation.target, set_aside(own.dup())
                    )
                except Exception as error:  # one port's error does not affect others
                    log.warning("port is not relayed", port=key, reason=describe_error(error))

    async def end(self, protocol: str, port: int, address: str) -> None:
        """Stop accepting at a released port.  Open connections continue until the container ends."""
        async with self._changes:
            relay = self._relays.pop((protocol, port, address), None)
            if relay is not None:
                relay.close()

    def close(self) -> None:
        """End all relays with their connections, because this process ends."""
        for relay in self._relays.values():
            relay.close(ends_connections=True)
        self._relays.clear()

    async def _open(
        self, reservation: Reservation, target: tuple[str, int], listener: socket.socket
    ) -> TcpRelay | UdpRelay:
        listener.setblocking(False)
        port = RelayPort(
            protocol=reservation.protocol,
            address=reservation.address,
            port=reservation.port,
            backends=(target,),
        )
        if port.protocol == "udp":
            return UdpRelay(port, listener, self._clock, random.random, lambda call: call())
        relay = TcpRelay(port, random.random, lambda call: call())
        await relay.open(listener)
        return relay
