"""Ports of the node itself: no other program may listen where a container is published.

A reserved port is a bound socket; the packets go to the container by nftables before they would reach it.  A daemon
that binds the port gets EADDRINUSE, and so does Skep when another program has it.  The socket does not listen: a
client that connects before the rules are there is refused, and not accepted by a socket that never answers.

The net process holds the sockets (``Reservations``) and records them in a file, from which the net process that follows
a crash opens them again.
"""

import errno
import socket
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import msgspec

from skep.aio.failures import log_error
from skep.aio.trees import discard_tree_now
from skep.dataplane.protocol import Reservation
from skep.errors import AlreadyExists, FailedPrecondition, InvalidArgument, SkepError, Unavailable
from skep.linux.descriptors import set_aside
from skep.linux.files import is_no_file, replace_file
from skep.model.addresses import joined
from skep.model.reserved_ports import ReservedPorts


class PortReservations(Protocol):
    """Holds ports; the net process does, so that they outlive the node process."""

    async def reserve(
        self, protocol: str, port: int, address: str = "", target: tuple[str, int] | None = None
    ) -> int:
        """Hold ``port`` (0: any free one) of ``address`` (empty: of all IPv4 addresses) and give it.

        ``target``: the address and port to which what comes there is relayed.
        Raises: AlreadyExists: another program has it; AddressNotHere.
        """

    async def release(self, protocol: str, port: int, address: str = "") -> None:
        """Let it go; ignored when it is not held."""

    async def held(self) -> Iterable[tuple[str, int, str]]:
        """What is held: (protocol, port, address)."""


class AddressNotHere(FailedPrecondition):
    """The node has no such address."""


class UnreservedPorts:
    """Ports of this machine without those that its own daemon uses: no container gets one, whoever asks.

    The daemon's sockets would hold most of them, but not before they are opened: the data path's with the first overlay
    network, a manager's while its process is started again.
    """

    def __init__(self, ports: PortReservations, reserved: Callable[[], ReservedPorts]) -> None:
        self._ports = ports
        self._reserved = reserved

    async def reserve(
        self, protocol: str, port: int, address: str = "", target: tuple[str, int] | None = None
    ) -> int:
        """As ``PortReservations`` says.  Raises: AlreadyExists: also if the daemon uses the port."""
        if use := self._reserved().get((protocol, port)):
            raise AlreadyExists(
                f"Bind for {joined(address or '0.0.0.0', port)} failed: port is reserved for {use}"
            )
        number = await self._ports.reserve(protocol, port, address, target)
        if (protocol, number) not in self._reserved():
            return number
        try:  # any free port was asked for, and that one is not: held meanwhile, or it would be given again
            return await self.reserve(protocol, port, address, target)
        finally:
            await self._ports.release(protocol, number, address)

    async def release(self, protocol: str, port: int, address: str = "") -> None:
        """As ``PortReservations`` says."""
        await self._ports.release(protocol, port, address)

    async def held(self) -> Iterable[tuple[str, int, str]]:
        """As ``PortReservations`` says; what the daemon has come to use is let go first."""
        held, reserved = [], self._reserved()
        for key in await self._ports.held():
            if key[:2] in reserved:
                await self._ports.release(*key)
            else:
                held.append(key)
        return held


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
        if error.errno == errno.EAFNOSUPPORT:  # the kernel runs with ipv6.disable=1
            raise AddressNotHere(f"listen {protocol} [{address}]:{port}: {error.strerror}") from error
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
        where = joined(address, port)
        if error.errno == errno.EADDRINUSE:
            raise AlreadyExists(f"Bind for {where} failed: port is already allocated") from error
        if error.errno == errno.EADDRNOTAVAIL:
            raise AddressNotHere(
                f"listen {protocol} {where}: bind: cannot assign requested address"
            ) from error
        raise Unavailable(f"cannot reserve port {port}/{protocol}: {error.strerror}") from error
    return set_aside(opened)


PROTOCOL_NUMBERS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP, "sctp": socket.IPPROTO_SCTP}

Held = dict[Reservation, socket.socket]


class Reservations:
    """The host ports that this process holds.  ``state``: the file in which they are recorded."""

    def __init__(self, state: Path, held: Held) -> None:
        self._state = state
        self._held = held

    def list(self) -> Sequence[Reservation]:
        """All that are held."""
        return tuple(self._held)

    def sockets(self) -> Sequence[socket.socket]:
        """In the order of ``list``."""
        return tuple(self._held.values())

    def held(self) -> Sequence[tuple[Reservation, socket.socket]]:
        """All with their sockets, which stay this object's."""
        return tuple(self._held.items())

    def reserve(
        self,
        protocol: str,
        port: int,
        token: str,
        address: str = "",
        target: tuple[str, int] | None = None,
    ) -> int:
        """Hold ``port`` (0: any free one); the same answer again for the same ``token``.

        Raises: AlreadyExists: another program has it; InvalidArgument, AddressNotHere, Unavailable: it cannot be had at
        all; OSError: it cannot be recorded.
        """
        for held in self._held:
            if held.token == token:
                return held.port
        opened = bind(protocol, port, address)
        reservation = Reservation(protocol, opened.getsockname()[1], token, address, target)
        self._held[reservation] = opened
        try:
            self.record()
        except OSError:  # the next process would not have it
            del self._held[reservation]
            opened.close()
            raise
        return reservation.port

    def release(self, protocol: str, port: int, address: str = "") -> None:
        """Let ``port`` go; harmless when it is not held."""
        wanted = (protocol, port, address)
        for held in [one for one in self._held if (one.protocol, one.port, one.address) == wanted]:
            self._held.pop(held).close()
        self.record()

    def record(self) -> None:
        """Write the file.  Raises: OSError."""
        replace_file(self._state, msgspec.json.encode(self.list()), is_durable=False)


def reopened(state: Path) -> Held:
    """The ports in the file of an earlier process, bound again; those that another program has are left out.

    A damaged file is kept beside it (``.damaged``), and counts as none.  Raises: OSError: it cannot be read now.
    """
    try:
        reservations = msgspec.json.decode(state.read_bytes(), type=tuple[Reservation, ...])
    except OSError as error:
        if not is_no_file(error):
            raise
        return {}
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        aside = state.with_name(state.name + ".damaged")
        log_error(error, "ports are not held any more: their file is damaged", kept_as=str(aside))
        discard_tree_now(aside)
        with suppress(OSError):
            state.rename(aside)
        return {}
    held: Held = {}
    for reservation in reservations:
        with suppress(SkepError):
            held[reservation] = bind(reservation.protocol, reservation.port, reservation.address)
    return held
