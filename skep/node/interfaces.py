"""Reads the machine's network interfaces, among which ``docker swarm init`` chooses the node's address.

It uses netlink, because the JSON of ``ip -details`` is invalid on Ubuntu 24.04 once a VXLAN device exists.
"""

import asyncio
import socket
from collections.abc import Iterable, Mapping
from ipaddress import ip_address

import msgspec
from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.rtnl.ifinfmsg import IFF_LOOPBACK, IFF_UP

from skep.api.swarm_requests import Interface, Interfaces
from skep.errors import Unavailable

_TIMEOUT_S = 5.0
"""Seconds for a listing of the machine's addresses."""
_KINDS_OF_OURS = frozenset({"bridge", "vxlan", "ifb", "dummy"})
"""Kinds of links that carry containers.  A veth is not included: a machine that is a container has its own address on
one."""


class Link(msgspec.Struct, frozen=True):
    """A link as the kernel reports it.  ``flags`` are if_link.h's ``IFF_``.  ``kind`` is empty for a real device."""

    index: int
    name: str
    flags: int = 0
    kind: str = ""


async def read_interfaces() -> Interfaces:
    """Return every interface with its addresses, by name.  Raises: Unavailable: the kernel does not respond."""
    try:
        async with asyncio.timeout(_TIMEOUT_S), AsyncIPRoute() as route:
            links = [
                Link(one["index"], one.get("ifname"), one["flags"], one.get(("linkinfo", "kind")) or "")
                async for one in await route.link("dump")
            ]
            addresses = [
                # The far end of a point-to-point link is ``address``, the own end is ``local``.
                (one["index"], one.get("local") or one.get("address"))
                async for one in await route.addr("dump", family=socket.AF_UNSPEC)
            ]
    except (OSError, NetlinkError, TimeoutError) as error:
        raise Unavailable(f"the addresses of this machine cannot be read: {error}") from error
    return interfaces_of(links, addresses)


def interfaces_of(links: Iterable[Link], addresses: Iterable[tuple[int, str]]) -> Interfaces:
    """Return the links with their addresses.  Each address comes with the index of its link.

    If a real device has an address, bridges and similar devices are not eligible, as in Docker Engine.
    """
    of_links: dict[int, list[str]] = {}
    for index, address in addresses:
        of_links.setdefault(index, []).append(address)
    return {link.name: _interface(link, of_links) for link in links}


def _interface(link: Link, addresses: Mapping[int, Iterable[str]]) -> Interface:
    return Interface(
        addresses=tuple(map(ip_address, addresses.get(link.index, ()))),
        is_up=bool(link.flags & IFF_UP),
        is_loopback=bool(link.flags & IFF_LOOPBACK),
        is_ours=link.kind in _KINDS_OF_OURS,
    )
