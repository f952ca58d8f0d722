"""Adds failover addresses to the machine's interfaces, for a second at a time, and removes them.

An address is added as a single address (/32, /128) without preference, so it changes no route and is not the source of
the machine's own connections.  Its lifetime marks it as Skep's: an address that stays for longer belongs to others.

Neighbors send to the last holder, also while it does not have the address for a moment.  Such connections are served
once it has the address again, because the flows of their first packets are deleted.
"""

import errno
import fcntl
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from ipaddress import ip_address, ip_interface
from socket import AF_INET, AF_INET6, inet_ntop

import msgspec

from skep.dataplane.netns.kernel.netlink import (
    CREATE,
    DELADDR,
    EXCL,
    GETADDR,
    GETLINK,
    NEWADDR,
    REPLACE,
    attribute,
    attributes,
    dump,
    send_changes,
)
from skep.dataplane.stale_flows import delete_undirected_flows, is_local_address
from skep.errors import FailedPrecondition
from skep.model.networks.failover import KERNEL_S, AddressOrder

_IFINFO = struct.Struct("=BxHiII")
_IFADDR = struct.Struct("=BBBBi")
_CACHE_INFO = struct.Struct("=IIII")
# Source: linux/if_addr.h: IFA_*, IFA_F_*.
_ADDRESS, _LOCAL, _CACHE, _FLAGS = 1, 2, 6, 8
_NO_DAD, _NO_PREFIX_ROUTE = 0x02, 0x200
# Source: linux/if.h and linux/if_link.h.
_UP, _LOOPBACK, _RUNNING = 0x1, 0x8, 0x40
_LINK_ADDRESS, _NAME = 1, 3
_SIOCGIFFLAGS = 0x8913
"""Source: linux/sockios.h."""
_FOREIGN_S = 10
"""Seconds of lifetime from which an address is not Skep's.  Lifetimes of DHCP and routers are minutes at least."""
_ETHERNET_BYTES = 6
_REMOVED = (0, errno.EADDRNOTAVAIL, errno.ENODEV)
"""Answers to a removal after which no interface has the address."""


class AddressInterface(msgspec.Struct, frozen=True):
    """An interface.  ``ethernet``: its hardware address, or empty if it has none of Ethernet's."""

    index: int
    name: str
    flags: int
    ethernet: bytes


class _Present(msgspec.Struct, frozen=True):
    """An address on an interface."""

    index: int
    address: str
    prefix: int
    lifetime_s: int


def hold(
    order: AddressOrder, is_allowed: Callable[[], bool], known: AddressInterface | None = None
) -> AddressInterface | None:
    """Add an address, or extend its lifetime.  Return the interface to which it was added, or None.  Blocks.

    Args:
        known: The interface that had the address before, so that a machine with many interfaces does not list them.

    Raises: FailedPrecondition: this machine cannot hold it, with the reason.
    """
    is_known = known is not None and order.interface in ("", known.name) and _is_up(known)
    interface = known if known is not None and is_known else interface_for(order)
    body = _body(order, interface.index, KERNEL_S)
    is_absent = not is_local_address(order.address)
    if is_absent:
        delete_undirected_flows(order.address)
    if not is_allowed():
        return None
    # The first request fails if the address is there, and then the second one extends its lifetime.
    added, extended = send_changes([(NEWADDR, CREATE | EXCL, body), (NEWADDR, REPLACE, body)])
    if not is_allowed():
        drop(order)  # the requests took long, or this process stood still meanwhile
        return None
    if extended:
        raise FailedPrecondition(
            f"{order.address} cannot be added to {interface.name}: {os.strerror(extended)}"
        )
    if is_absent:  # for connections that began since the first deletion
        delete_undirected_flows(order.address)
    return None if added == errno.EEXIST else interface


def drop(order: AddressOrder) -> None:
    """Remove an address of Skep's wherever it is.  Blocks.  Raises: OSError: the kernel keeps it."""
    found = [one for one in _addresses() if one.address == order.address and one.lifetime_s < _FOREIGN_S]
    for error in send_changes([(DELADDR, 0, _body(order, one.index, KERNEL_S)) for one in found]):
        if error not in _REMOVED:
            raise OSError(error, os.strerror(error))


def interface_for(order: AddressOrder) -> AddressInterface:
    """Return the interface that gets an address.  Blocks.  Raises: FailedPrecondition."""
    wanted, present, links = ip_address(order.address), list(_addresses()), _links()
    for one in present:
        if one.address == order.address and one.lifetime_s >= _FOREIGN_S:
            name = links[one.index].name if one.index in links else "another interface"
            raise FailedPrecondition(f"{order.address} is an address of the machine itself, on {name}")
    if order.interface:
        found = next((one for one in links.values() if one.name == order.interface), None)
        if found is None:
            raise FailedPrecondition(f"it has no interface {order.interface}")
    else:
        subnets = [
            (one.prefix, -one.index)
            for one in present
            if one.address != order.address
            and one.index in links
            and not links[one.index].flags & _LOOPBACK
            and wanted in ip_interface(f"{one.address}/{one.prefix}").network
        ]
        if not subnets:
            raise FailedPrecondition(f"it has no interface with a subnet of {order.address}")
        found = links[-max(subnets)[1]]
    if not found.flags & _UP or not found.flags & _RUNNING:
        raise FailedPrecondition(f"its interface {found.name} is down")
    return found


def _is_up(interface: AddressInterface) -> bool:
    """Return whether an interface is still there and up, by one call."""
    request = struct.pack("=16sH22x", interface.name.encode(), 0)
    with socket.socket(AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as calls:
        try:
            flags = struct.unpack_from("=16sH", fcntl.ioctl(calls, _SIOCGIFFLAGS, request))[1]
            is_same = socket.if_nametoindex(interface.name) == interface.index
        except OSError:
            return False
    return is_same and bool(flags & _UP) and bool(flags & _RUNNING)


def _body(order: AddressOrder, index: int, lifetime_s: int) -> bytes:
    ip = ip_address(order.address)
    family = AF_INET if ip.version == 4 else AF_INET6
    flags = (_NO_DAD | _NO_PREFIX_ROUTE).to_bytes(4, sys.byteorder)
    return b"".join(
        (
            _IFADDR.pack(family, ip.max_prefixlen, 0, 0, index),
            attribute(_LOCAL, ip.packed),
            attribute(_ADDRESS, ip.packed),
            attribute(_CACHE, _CACHE_INFO.pack(0, lifetime_s, 0, 0)),
            attribute(_FLAGS, flags),
        )
    )


def _addresses() -> Iterator[_Present]:
    for _, body in dump(GETADDR, _IFADDR.pack(0, 0, 0, 0, 0)):
        family, prefix, _, _, index = _IFADDR.unpack_from(body)
        found = dict(attributes(body[_IFADDR.size :]))
        value = found.get(_LOCAL) or found.get(_ADDRESS)
        if value and family in (AF_INET, AF_INET6):
            lifetime_s = _CACHE_INFO.unpack_from(found[_CACHE])[1] if _CACHE in found else sys.maxsize
            yield _Present(index, inet_ntop(family, value), prefix, lifetime_s)


def _links() -> dict[int, AddressInterface]:
    links = {}
    for _, body in dump(GETLINK, _IFINFO.pack(0, 0, 0, 0, 0)):
        _, kind, index, flags, _ = _IFINFO.unpack_from(body)
        found = dict(attributes(body[_IFINFO.size :]))
        address = bytes(found.get(_LINK_ADDRESS, b""))
        is_ethernet = kind == 1 and len(address) == _ETHERNET_BYTES
        name = bytes(found[_NAME]).rstrip(b"\0").decode(errors="replace")
        links[index] = AddressInterface(index, name, flags, address if is_ethernet else b"")
    return links
