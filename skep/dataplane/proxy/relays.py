"""Published ports that are served in user space, with their backends.  Pure.

The kernel cannot forward ``[::1]`` to a container, nor IPv6 to tasks that have IPv4 addresses only, nor begin a
connection with a PROXY header.  The net process serves these (``relay.py``) from a file that the node process writes,
so that they go on without the node process.
"""

from collections.abc import Callable
from ipaddress import ip_address

import msgspec

from skep.dataplane.plan.ingress import STICKY_SLOTS, MeshPort, Plan, sticky_slots, version_of


class RelayPort(msgspec.Struct, frozen=True, kw_only=True):
    """One port on one address.

    ``backends``: address and port; with ``is_sticky`` one per slot, and a client's address always has the same slot.
    ``proxy_protocol``: version of the header that each connection begins with, or 0.
    """

    protocol: str
    address: str
    port: int
    backends: tuple[tuple[str, int], ...]
    proxy_protocol: int = 0
    is_sticky: bool = False


def relay_ports(plan: Plan) -> tuple[RelayPort, ...]:
    """The relays of ``plan``: of ports that the node holds, and that the kernel does not forward."""
    return tuple(
        _relay(port, key[2] or "0.0.0.0")
        for port, key in plan.in_force(4, 6)
        if port.protocol != "sctp" and (port.options.proxy_protocol or version_of(key) == 6)
    )


def _relay(port: MeshPort, address: str) -> RelayPort:
    serving = port.ipv4 or port.ipv6
    chosen = sticky_slots(serving) if port.options.is_sticky else serving
    return RelayPort(
        protocol=port.protocol,
        address=address,
        port=port.published,
        backends=tuple((backend.address, backend.port) for backend in chosen),
        proxy_protocol=port.options.proxy_protocol,
        is_sticky=port.options.is_sticky,
    )


def sticky_slot(client: str) -> int:
    """The slot of a client's address; the same on all nodes."""
    packed = ip_address(client).packed
    number = 2166136261
    for byte in packed:  # FNV-1a
        number = (number ^ byte) * 16777619 & 0xFFFFFFFF
    return number % STICKY_SLOTS


def backend_order(port: RelayPort, client: str, rng: Callable[[], float]) -> tuple[tuple[str, int], ...]:
    """All serving tasks, each once: first the client's, then the others, which are tried if it cannot be reached.

    ``rng``: numbers from 0 to 1, less than 1.
    """
    if not port.backends:
        return ()
    first = sticky_slot(client) if port.is_sticky else int(rng() * len(port.backends))
    return tuple(dict.fromkeys((*port.backends[first:], *port.backends[:first])))
