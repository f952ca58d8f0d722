"""Ports of the node itself: no other program may listen where a container is published.

A reserved port is a bound socket; the packets go to the container by nftables before they would reach it.  A daemon
that wants the port meets EADDRINUSE, and so does Skep when another program has it.  The socket does not listen: a
client that connects before the rules are there is refused, and not accepted by a socket that never answers.
"""

import errno
import socket
from collections.abc import Iterable
from typing import Protocol

from skep.errors import AlreadyExists, FailedPrecondition, InvalidArgument, Unavailable
from skep.linux.descriptors import set_aside


class PortReservations(Protocol):
    """Holds ports; the net process does, so that they outlive the node process."""

    async def reserve(self, protocol: str, port: int, address: str = "") -> int:
        """Hold ``port`` (0: any free one) of ``address`` (empty: of all IPv4 addresses) and give it.

        Raises: AlreadyExists: another program has it; AddressNotHere.
        """

    async def release(self, protocol: str, port: int, address: str = "") -> None:
        """Let it go; ignored when it is not held."""

    async def held(self) -> Iterable[tuple[str, int, str]]:
        """What is held: (protocol, port, address)."""


class AddressNotHere(FailedPrecondition):
    """The node has no such address."""


def bind(protocol: str, port: int, address: str = "") -> socket.socket:
    """A socket that holds ``port`` of the present network namespace.

    Raises: AlreadyExists, with Docker's words; AddressNotHere; InvalidArgument: an unknown protocol.
    """
    kinds = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM, "sctp": socket.SOCK_STREAM}
    if protocol not in kinds:
        raise InvalidArgument(f"unknown protocol {protocol!r}")
    number = socket.IPPROTO_SCTP if protocol == "sctp" else 0
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        opened = socket.socket(family, kinds[protocol] | socket.SOCK_CLOEXEC, number)
    except OSError as error:
        raise Unavailable(f"this kernel has no {protocol}: {error.strerror}") from error
    address = address or "0.0.0.0"
    try:
        if family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if protocol != "udp":  # connections of a server that has ended do not count, one that listens does
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind((address, port))
        if protocol != "udp":  # from now on no other socket may share it, whatever its options
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    except OSError as error:
        opened.close()
        where = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        if error.errno == errno.EADDRINUSE:
            raise AlreadyExists(f"Bind for {where} failed: port is already allocated") from error
        if error.errno == errno.EADDRNOTAVAIL:
            raise AddressNotHere(
                f"listen {protocol} {where}: bind: cannot assign requested address"
            ) from error
        raise Unavailable(f"cannot reserve port {port}/{protocol}: {error.strerror}") from error
    return set_aside(opened)
