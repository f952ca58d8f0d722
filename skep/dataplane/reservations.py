"""The host ports that this process holds: bound sockets by protocol and port.

What is held is written down, so that the net process that follows a crash opens it again.
"""

import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from skep.dataplane.ports import bind
from skep.dataplane.protocol import Reservation
from skep.errors import SkepError
from skep.linux.files import is_no_file, replace_file

PROTOCOL_NUMBERS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP, "sctp": socket.IPPROTO_SCTP}

Held = dict[Reservation, socket.socket]


class Reservations:
    """``state``: the file they are written down in."""

    def __init__(self, state: Path, held: Held) -> None:
        self._state = state
        self._held = held

    def list(self) -> Sequence[Reservation]:
        return tuple(self._held)

    def sockets(self) -> Sequence[socket.socket]:
        return tuple(self._held.values())

    def reserve(self, protocol: str, port: int, token: str, address: str = "") -> int:
        """Hold ``port`` (0: any free one); the same answer again for the same ``token``.

        Raises: AlreadyExists: another program has it; InvalidArgument, AddressNotHere, Unavailable: it cannot be had at
        all.
        """
        for held in self._held:
            if held.token == token:
                return held.port
        opened = bind(protocol, port, address)
        reservation = Reservation(protocol, opened.getsockname()[1], token, address)
        self._held[reservation] = opened
        self.write_down()
        return reservation.port

    def release(self, protocol: str, port: int, address: str = "") -> None:
        """Let ``port`` go; harmless when it is not held."""
        wanted = (protocol, port, address)
        for held in [one for one in self._held if (one.protocol, one.port, one.address) == wanted]:
            self._held.pop(held).close()
        self.write_down()

    def write_down(self) -> None:
        replace_file(self._state, msgspec.json.encode(self.list()), is_durable=False)


def reopened(state: Path) -> Held:
    """What an earlier process wrote down, bound again; what another program took meanwhile is left out.

    Raises: OSError: it cannot be read now.
    """
    try:
        reservations = msgspec.json.decode(state.read_bytes(), type=tuple[Reservation, ...])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and not is_no_file(error):
            raise
        return {}
    held: Held = {}
    for reservation in reservations:
        with suppress(SkepError):
            held[reservation] = bind(reservation.protocol, reservation.port, reservation.address)
    return held
