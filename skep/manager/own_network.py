"""Whether this machine's own network changed: a judge whose cable was pulled is no judge of others.

What counts is the interface that carries the manager's address: which one it is, and whether it has a carrier.
Containers' interfaces come and go all the time and do not count.
"""

import fcntl
import socket
import struct

_SIOCGIFFLAGS = 0x8913
_SIOCGIFADDR = 0x8915
_IFF_UP = 0x1
_IFF_RUNNING = 0x40
_REQUEST = struct.Struct("16s240x")


class OwnNetwork:
    """The interface with one address.  ``address``: IPv4; any other is not watched."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._seen = interface_of(address)

    def changed(self) -> bool:
        """Whether it is another one, or in another state, than when this was asked last."""
        before = self._seen
        # Asked twice a second: going through all interfaces would keep the kernel's list of them locked for long.
        if before is None or _state(before[0], self._address) != before:
            self._seen = interface_of(self._address)
        return before != self._seen


def interface_of(address: str) -> tuple[str, bool] | None:
    """The interface that has ``address`` and whether it works; None: none has (behind NAT, say)."""
    states = (_state(name, address) for _, name in socket.if_nameindex())
    return next((state for state in states if state is not None), None)


def _state(name: str, address: str) -> tuple[str, bool] | None:
    """Whether the interface ``name`` works; None: it has not (or no longer) this address."""
    request = _REQUEST.pack(name.encode())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            answer = fcntl.ioctl(asking, _SIOCGIFADDR, request)
            if socket.inet_ntoa(answer[20:24]) != address:
                return None
            (flags,) = struct.unpack_from("H", fcntl.ioctl(asking, _SIOCGIFFLAGS, request), 16)
        except OSError:
            return None
    return name, bool(flags & _IFF_UP and flags & _IFF_RUNNING)
