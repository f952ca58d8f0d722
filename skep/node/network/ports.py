"""Ports of the node itself: nobody else may listen where a container is published.

A reserved port is a bound, listening socket that never accepts; the packets go to the container by nftables
before they would reach it.  A daemon that wants the port meets EADDRINUSE, and so do we when somebody has
it.
"""

import errno
import socket
from collections.abc import Iterable
from typing import Protocol

from skep.errors import AlreadyExists, InvalidArgument, Unavailable
from skep.node.network.namespaces import Namespaces


class PortReservations(Protocol):
    """Holds ports; the net process does (so that they outlive the node process), or this process itself."""

    async def reserve(self, protocol: str, port: int) -> int:
        """Hold ``port`` (0: any free one) and give it.  Raises: AlreadyExists: somebody has it."""

    async def release(self, protocol: str, port: int) -> None:
        """Let it go; ignored when it is not held."""

    async def held(self) -> Iterable[tuple[str, int]]:
        """What is held: (protocol, port)."""


class OwnReservations:
    """Reservations of this process in the node's own namespace; they end with it."""

    def __init__(self, namespaces: Namespaces) -> None:
        self._namespaces = namespaces
        self._sockets: dict[tuple[str, int], socket.socket] = {}

    async def reserve(self, protocol: str, port: int) -> int:
        opened = await self._namespaces.run(self._namespaces.home, bind, protocol, port)
        chosen: int = opened.getsockname()[1]
        self._sockets[protocol, chosen] = opened
        return chosen

    async def release(self, protocol: str, port: int) -> None:
        opened = self._sockets.pop((protocol, port), None)
        if opened is not None:
            opened.close()

    async def held(self) -> Iterable[tuple[str, int]]:
        return tuple(self._sockets)

    def close(self) -> None:
        """Let go of everything."""
        for opened in self._sockets.values():
            opened.close()
        self._sockets.clear()


def bind(protocol: str, port: int) -> socket.socket:
    """A socket that holds ``port`` of the present network namespace.

    Raises: AlreadyExists, with Docker's words; InvalidArgument: an unknown protocol.
    """
    kinds = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM, "sctp": socket.SOCK_STREAM}
    if protocol not in kinds:
        raise InvalidArgument(f"unknown protocol {protocol!r}")
    number = socket.IPPROTO_SCTP if protocol == "sctp" else 0
    try:
        opened = socket.socket(socket.AF_INET, kinds[protocol] | socket.SOCK_CLOEXEC, number)
    except OSError as error:
        raise Unavailable(f"this kernel has no {protocol}: {error.strerror}") from error
    try:
        opened.bind(("0.0.0.0", port))
        if protocol != "udp":
            opened.listen(1)
    except OSError as error:
        opened.close()
        if error.errno == errno.EADDRINUSE:
            raise AlreadyExists(f"Bind for 0.0.0.0:{port} failed: port is already allocated") from error
        raise Unavailable(f"cannot reserve port {port}/{protocol}: {error.strerror}") from error
    return opened
