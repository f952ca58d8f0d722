"""Reserves ports of the node, so that no other program listens where a container is published.

A reserved port is a bound socket.  It never receives packets, because nftables sends them to the container.  If a
daemon binds the port, it gets EADDRINUSE, and so does Skep if another program has the port.  The socket does not
listen, so a client that connects before the rules exist is refused, instead of being accepted and never answered.

The net process holds the sockets (``Reservations``) and records them in a file.  After a crash the next net process
binds them again from that file.
"""

import asyncio
import errno
import socket
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import msgspec
import structlog

from skep.aio.clock import Clock
from skep.aio.event import Event
from skep.aio.failures import log_error, retry
from skep.aio.trees import discard_tree_now
from skep.dataplane.net_process.protocol import Reservation
from skep.errors import AlreadyExists, FailedPrecondition, InvalidArgument, SkepError, Unavailable
from skep.linux.descriptors import set_aside
from skep.linux.files import is_no_file, replace_file
from skep.model.networks.addresses import joined
from skep.model.networks.reserved_ports import ReservedPorts


class PortReservations(Protocol):
    """Reserves ports in the net process, so that they outlive the node process."""

    async def reserve(
        self, protocol: str, port: int, address: str = "", target: tuple[str, int] | None = None
    ) -> int:
        """Reserve a port and return its number.

        Args:
            port: The port, or 0 for any free port.
            address: The address to bind, or empty for every IPv4 address.
            target: The address and port to which the net process relays traffic, or None if the kernel forwards it.

        Raises:
            AlreadyExists: Another program has the port.
            AddressNotHere: The node does not have the address.
        """

    async def release(self, protocol: str, port: int, address: str = "") -> None:
        """Release the port.  Does nothing if it is not held."""

    async def list_held(self) -> Iterable[tuple[str, int, str]]:
        """Return the protocol, port and address of each reserved port."""


class AddressNotHere(FailedPrecondition):
    """The node does not have the address."""


class UnreservedPorts:
    """Reserves ports of this machine, except the ports of Skep's own daemon.

    The daemon's own sockets block most of these ports, but only while they are open.  The socket of the data path opens
    with the first overlay network, and a manager's socket is closed while its process restarts.
    """

    def __init__(self, ports: PortReservations, reserved: Callable[[], ReservedPorts]) -> None:
        self._ports = ports
        self._reserved = reserved

    async def reserve(
        self, protocol: str, port: int, address: str = "", target: tuple[str, int] | None = None
    ) -> int:
        """Reserve a port as in ``PortReservations``.

        Raises: AlreadyExists: the daemon uses the port, or another program.
        """
        if use := self._reserved().get((protocol, port)):
            raise AlreadyExists(
                f"Bind for {joined(address or '0.0.0.0', port)} failed: port is reserved for {use}"
            )
        number = await self._ports.reserve(protocol, port, address, target)
        if (protocol, number) not in self._reserved():
            return number
        # The caller wants any free port, but the daemon needs this one.  Hold it until another is found, or it would be
        # chosen again.
        try:
            return await self.reserve(protocol, port, address, target)
        finally:
            await self._ports.release(protocol, number, address)

    async def release(self, protocol: str, port: int, address: str = "") -> None:
        """Release a port as in ``PortReservations``."""
        await self._ports.release(protocol, port, address)

    async def list_held(self) -> Iterable[tuple[str, int, str]]:
        """Return reserved ports as in ``PortReservations``, after releasing ports that the daemon now uses."""
        held, reserved = [], self._reserved()
        for key in await self._ports.list_held():
            if key[:2] in reserved:
                await self._ports.release(*key)
            else:
                held.append(key)
        return held


def bind(protocol: str, port: int, address: str = "") -> socket.socket:
    """Return a socket bound to ``port`` in the present network namespace.

    Raises: AlreadyExists, in Docker's words; AddressNotHere; InvalidArgument: an unknown protocol; Unavailable.
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
        if protocol != "udp":  # allow connections of an ended server to remain, but no listening server
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind((address, port))
        if protocol != "udp":  # from now on, no other socket may share the port, whatever its options
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


log = structlog.get_logger(__name__)

_RETRY_S = 1.0
"""First pause in seconds before failed calls outside are repeated.  A busy machine responds after a few seconds."""
_CHOICES_MAX = 16
"""Limit for the ports that are chosen for a container, one after the other, while other programs have them outside."""
PROTOCOL_NUMBERS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP, "sctp": socket.IPPROTO_SCTP}

Held = dict[Reservation, socket.socket]


class Outside(Protocol):
    """The ports of the machine that lead to this node's ports, if it has a network namespace of its own."""

    def check(self, protocol: str, address: str) -> None:
        """Check the protocol and the address of a port.  Raises: FailedPrecondition: they cannot be opened outside."""

    def open(self, protocol: str, port: int, address: str) -> None:
        """Open the port.  Raises: AlreadyExists: another program has it; SkepError: it cannot be opened."""

    def close(self, protocol: str, port: int, address: str) -> None:
        """Close the port.  Does nothing if it is not open.  Raises: SkepError."""

    def ping(self) -> None:
        """Ask for a response.  Raises: Unavailable."""

    def restore(self, held: Iterable[Reservation]) -> None:
        """Open the ``held`` ports that are not open, and close all others.

        Raises: Unavailable: there is no response; SkepError: a port was not opened or closed, but all others were.
        """


class Reservations:
    """The host ports that this process holds.  They are recorded in the file ``state``.

    ``outside`` also opens each port on the machine.  None if the node is in the machine's own network namespace.
    """

    def __init__(self, state: Path, held: Held, outside: Outside | None = None) -> None:
        self._state = state
        self._held = held
        self._outside = outside
        self._unsettled = Event()
        """Set while the ports that are open outside may differ from the held ones."""
        if outside is not None:
            self._unsettled.set()

    async def keep_outside(self, clock: Clock, rng: Callable[[], float]) -> None:
        """Repeat calls outside that failed, until cancelled."""
        while True:
            await self._unsettled.wait()
            await retry(
                self._settle_apart,
                "ports outside differ from those that are reserved",
                clock=clock,
                first_s=_RETRY_S,
                rng=rng,
            )

    async def _settle_apart(self) -> None:
        if self._outside is not None:
            await asyncio.to_thread(self._outside.ping)  # the process does nothing else during ``settle``
        self.settle()

    def settle(self) -> None:
        """Let exactly the held ports be open outside.  Raises: SkepError: as ``Outside.restore``."""
        if self._outside is not None:
            self._outside.restore(self.list())
        self._unsettled.clear()

    def list(self) -> Sequence[Reservation]:
        """Return all reservations."""
        return tuple(self._held)

    def has(self, protocol: str, port: int, address: str, owner: str | None) -> bool:
        """Return whether the port is held for ``owner``, or for any owner if None."""
        return any(
            (one.protocol, one.port, one.address) == (protocol, port, address) and owner in (None, one.owner)
            for one in self._held
        )

    def sockets(self) -> Sequence[socket.socket]:
        """Return the sockets in the order of ``list``."""
        return tuple(self._held.values())

    def held(self) -> Sequence[tuple[Reservation, socket.socket]]:
        """Return all reservations with their sockets.  This object keeps owning the sockets."""
        return tuple(self._held.items())

    def reserve(
        self,
        protocol: str,
        port: int,
        token: str,
        address: str = "",
        target: tuple[str, int] | None = None,
    ) -> int:
        """Reserve ``port``, or any free port if 0.  A repeated call with the same ``token`` returns the same port.

        Raises: AlreadyExists: another program has it; InvalidArgument, AddressNotHere, Unavailable: it cannot be bound;
        OSError: it cannot be recorded.
        """
        for held in self._held:
            if held.token == token:
                return held.port
        opened = self._open(protocol, port, address)
        reservation = Reservation(protocol, opened.getsockname()[1], token, address, target)
        self._held[reservation] = opened
        try:
            self.record()
        except OSError:  # without a record the next process would not hold the port
            del self._held[reservation]
            self._close(reservation, opened)
            raise
        return reservation.port

    def _open(self, protocol: str, port: int, address: str) -> socket.socket:
        """Bind a port, and open it outside.  A chosen port that another program has outside is chosen again."""
        if self._outside is not None:
            self._outside.check(protocol, address)
            if self._unsettled.is_set():  # the port may be open because a former container has not let it go
                self._settle_for_another()
        for left in reversed(range(1 if port or self._outside is None else _CHOICES_MAX)):
            opened = bind(protocol, port, address)
            try:
                if self._outside is not None:
                    self._outside.open(protocol, opened.getsockname()[1], address)
            except AlreadyExists:
                opened.close()
                if not left:
                    raise
            except Unavailable:  # it may have been opened all the same
                self._unsettled.set()
                opened.close()
                raise
            except BaseException:
                opened.close()
                raise
            else:
                return opened
        raise AssertionError("the last try returns or raises")

    def _close(self, held: Reservation, opened: socket.socket) -> None:
        opened.close()
        if self._outside is not None:
            try:
                self._outside.close(held.protocol, held.port, held.address)
            except SkepError as error:
                log_error(error, "port not closed outside yet", port=held.port, protocol=held.protocol)
                self._unsettled.set()

    def _settle_for_another(self) -> None:
        """Settle before another port is opened.  Raises: Unavailable."""
        try:
            self.settle()
        except Unavailable:
            raise
        except SkepError as error:  # about a port that is held already, which is tried again later
            log.debug("port not as wanted outside", error=str(error))

    def release(self, protocol: str, port: int, address: str = "") -> None:
        """Release ``port``.  Does nothing if it is not held."""
        wanted = (protocol, port, address)
        for held in [one for one in self._held if (one.protocol, one.port, one.address) == wanted]:
            self._close(held, self._held.pop(held))
        self.record()

    def record(self) -> None:
        """Write the file.  Raises: OSError."""
        replace_file(self._state, msgspec.json.encode(self.list()), is_durable=False)


def reopened(state: Path) -> Held:
    """Bind the ports recorded by an earlier process again.  Ports that another program has taken are left out.

    A damaged file counts as empty and is renamed to ``<name>.damaged``.  Raises: OSError: it cannot be read at present.
    """
    try:
        reservations = msgspec.json.decode(state.read_bytes(), type=tuple[Reservation, ...])
    except OSError as error:
        if not is_no_file(error):
            raise
        return {}
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        aside = state.with_name(state.name + ".damaged")
        log_error(error, "reserved ports lost: their file is damaged", kept_as=str(aside))
        discard_tree_now(aside)
        with suppress(OSError):
            state.rename(aside)
        return {}
    held: Held = {}
    for reservation in reservations:
        with suppress(SkepError):
            held[reservation] = bind(reservation.protocol, reservation.port, reservation.address)
    return held
