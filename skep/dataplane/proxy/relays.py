"""Published ports that are served in user space, with their backends.  Pure.

The kernel cannot forward ``[::1]`` to a container or IPv6 to tasks with only IPv4 addresses, and cannot start a
connection with a PROXY header.  The net process serves these ports (``relay.py``) from a file that the node process
writes, so that they continue without the node process.
"""

from collections.abc import Callable
from ipaddress import ip_address

import msgspec

from skep.dataplane.plan.ingress import STICKY_SLOTS, IngressPlan, MeshPort, divided, sticky_slots, version_of
from skep.model.staging.shares import ALL_PERCENT


class RelayPort(msgspec.Struct, frozen=True, kw_only=True):
    """One port on one address.

    Args:
        backends: Address and port of each backend.  With ``is_sticky``, of the backend of each slot.  A client's
            address determines its slot.
        new: Backends that get ``percent`` of the connections, during a staged update.
        proxy_protocol: Version of the header that each connection starts with, or 0 for none.
    """

    protocol: str
    address: str
    port: int
    backends: tuple[tuple[str, int], ...]
    proxy_protocol: int = 0
    is_sticky: bool = False
    new: tuple[tuple[str, int], ...] = ()
    percent: int = 0


def relay_ports(plan: IngressPlan) -> tuple[RelayPort, ...]:
    """Return the relays of ``plan``: ports that the node holds and that the kernel does not forward."""
    return tuple(
        _relay(port, key[2] or "0.0.0.0")
        for port, key in plan.in_force(4, 6)
        if port.protocol != "sctp" and (port.options.proxy_protocol or version_of(key) == 6)
    )


def _relay(port: MeshPort, address: str) -> RelayPort:
    serving = port.ipv4 or port.ipv6
    even, new = divided(serving)
    is_split = bool(even and new) and not port.options.is_sticky
    chosen = sticky_slots(serving, port.percent) if port.options.is_sticky else even if is_split else serving
    return RelayPort(
        protocol=port.protocol,
        address=address,
        port=port.published,
        backends=tuple((backend.address, backend.port) for backend in chosen),
        proxy_protocol=port.options.proxy_protocol,
        is_sticky=port.options.is_sticky,
        new=tuple((backend.address, backend.port) for backend in new) if is_split else (),
        percent=port.percent if is_split else 0,
    )


def sticky_slot(client: str) -> int:
    """Return the slot of a client's address, which is the same on all nodes."""
    packed = ip_address(client).packed
    number = 2166136261
    for byte in packed:  # FNV-1a
        number = (number ^ byte) * 16777619 & 0xFFFFFFFF
    return number % STICKY_SLOTS


def backend_order(port: RelayPort, client: str, rng: Callable[[], float]) -> tuple[tuple[str, int], ...]:
    """Return all backends in the order to try: first the client's backend, then the others in case it cannot be
    reached.

    ``rng`` returns numbers from 0 to 1, excluding 1.
    """
    if not port.backends:
        return ()
    chosen, others = port.backends, port.new
    if port.new and rng() * ALL_PERCENT < port.percent:
        chosen, others = others, chosen
    first = sticky_slot(client) if port.is_sticky else int(rng() * len(chosen))
    return tuple(dict.fromkeys((*chosen[first:], *chosen[:first], *others)))
