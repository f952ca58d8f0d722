"""Reads the machine's network interfaces, from which ``docker swarm init`` chooses the node's address.

It uses netlink and not the ``ip`` command: on Ubuntu 24.04 the JSON of ``ip -details`` is invalid once a VXLAN device
exists.
"""

import asyncio
import socket
from collections.abc import Iterable, Mapping
from ipaddress import ip_address

import msgspec
from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.rtnl.ifinfmsg import IFF_LOOPBACK, IFF_UP

from skep.api.formats.swarm_requests import Interface, Interfaces
from skep.errors import Unavailable

_TIMEOUT_S = 5.0
"""Time limit in seconds for listing the machine's addresses."""
_OUR_KINDS = frozenset({"bridge", "vxlan", "ifb", "dummy"})
"""Kinds of links that carry containers' networks.

``veth`` is not included, because a machine that is itself a container has its address on a veth.
"""


class KernelLink(msgspec.Struct, frozen=True):
    """A link as the kernel reports it.

    ``flags`` has the ``IFF_`` bits of if.h.  ``kind`` is empty for a physical device.
    """

    index: int
    name: str
    flags: int = 0
    kind: str = ""


async def read_interfaces() -> Interfaces:
    """Return every interface with its addresses, by name.  Raises: Unavailable: the kernel does not respond."""
    try:
        async with asyncio.timeout(_TIMEOUT_S), AsyncIPRoute() as route:
            links = [
                KernelLink(one["index"], one.get("ifname"), one["flags"], one.get(("linkinfo", "kind")) or "")
                async for one in await route.link("dump")
            ]
            addresses = [
                # On a point-to-point link, ``address`` is the far end and ``local`` is this machine's end.
                (one["index"], one.get("local") or one.get("address"))
                async for one in await route.addr("dump", family=socket.AF_UNSPEC)
            ]
    except (OSError, NetlinkError, TimeoutError) as error:
        raise Unavailable(f"the addresses of this machine cannot be read: {error}") from error
    return interfaces_of(links, addresses)


def interfaces_of(links: Iterable[KernelLink], addresses: Iterable[tuple[int, str]]) -> Interfaces:
    """Return the links with their addresses, by name.  Each address is given with the index of its link.

    If a physical device has an address, bridges and similar devices are left out, as in Docker Engine.
    """
    of_links: dict[int, list[str]] = {}
    for index, address in addresses:
        of_links.setdefault(index, []).append(address)
    return {link.name: _interface(link, of_links) for link in links}


def _interface(link: KernelLink, addresses: Mapping[int, Iterable[str]]) -> Interface:
    return Interface(
        addresses=tuple(map(ip_address, addresses.get(link.index, ()))),
        is_up=bool(link.flags & IFF_UP),
        is_loopback=bool(link.flags & IFF_LOOPBACK),
        is_ours=link.kind in _OUR_KINDS,
    )
