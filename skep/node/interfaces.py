"""The network interfaces of this machine, as ``docker swarm init`` chooses its address among them.

Read by netlink: the JSON of ``ip -details`` is invalid on Ubuntu 24.04 once there is a VXLAN device.
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
_KINDS_OF_OURS = frozenset({"bridge", "vxlan", "ifb", "dummy"})
"""Kinds of link that carry containers; a machine's own address may lie on a veth (it is a container itself)."""


class Link(msgspec.Struct, frozen=True):
    """A link as the kernel has it.  ``flags``: if_link.h's ``IFF_``; ``kind``: empty of a real device."""

    index: int
    name: str
    flags: int = 0
    kind: str = ""


async def read_interfaces() -> Interfaces:
    """Every interface with its addresses, by name.  Raises: Unavailable: the kernel does not respond."""
    try:
        async with asyncio.timeout(_TIMEOUT_S), AsyncIPRoute() as route:
            links = [
                Link(one["index"], one.get("ifname"), one["flags"], one.get(("linkinfo", "kind")) or "")
                async for one in await route.link("dump")
            ]
            addresses = [
                # The far end of a point-to-point link is ``address``, the own one ``local``.
                (one["index"], one.get("local") or one.get("address"))
                async for one in await route.addr("dump", family=socket.AF_UNSPEC)
            ]
    except (OSError, NetlinkError, TimeoutError) as error:
        raise Unavailable(f"the addresses of this machine cannot be read: {error}") from error
    return interfaces_of(links, addresses)


def interfaces_of(links: Iterable[Link], addresses: Iterable[tuple[int, str]]) -> Interfaces:
    """Links with their addresses, which come with the index of their link.

    Where a real device has an address, bridges and the like are left out of the choice, as the engine does.
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
