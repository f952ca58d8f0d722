"""Reads a network namespace's state from the kernel.

The result contains only items that Skep can have created: bridges, VXLAN devices, veths and loopback, their addresses,
routes made by programs, policy rules of wanted priorities with their routing tables, and permanent entries.  Items that
the kernel derives (routes of addresses, link-local addresses, rules) are included if they are wanted.  Learned entries
are left out.
"""

import socket
import struct
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from socket import AF_INET, AF_INET6, inet_ntop

import msgspec

from skep.dataplane.netns.kernel.checksums import offloads
from skep.dataplane.netns.kernel.netlink import (
    AF_BRIDGE,
    GETADDR,
    GETLINK,
    GETNEIGH,
    GETROUTE,
    GETRULE,
    attributes,
    dump,
)
from skep.dataplane.netns.state import (
    LOCAL_TABLE,
    MAIN_TABLE,
    Address,
    EntryKind,
    Link,
    NamespaceState,
    NeighborEntry,
    Route,
    RouteKind,
    RoutingRule,
    Vxlan,
)

_KINDS = frozenset({"bridge", "vxlan", "tun", "veth", "wireguard", "loopback", "macvlan", "ipvlan"})
_IFINFO = struct.Struct("=BxHiII")
_IFADDR = struct.Struct("=BBBBi")
_NDMSG = struct.Struct("=BxxxiHBB")
_RTMSG = struct.Struct("=BBBBBBBBI")
_RULE = struct.Struct("=BBBBBBBBI")
_KINDS_OF_ROUTES = frozenset(map(int, RouteKind))
# Source: linux/if.h, linux/neighbour.h and linux/fib_rules.h.
_UP, _LOOPBACK = 0x1, 0x8
_NTF_SELF, _NTF_MASTER = 0x02, 0x04
_PERMANENT, _STATIC = 0x80, 0x40
BY_KERNEL = 2
"""RTPROT_KERNEL, the origin of routes that the kernel itself has added."""
# Source: linux/rtnetlink.h: RTPROT_RA.
_BY_ADVERTISEMENT = 9
_SOURCE, _PRIORITY, _MARK, _RULE_TABLE, _MASK, _IP_PROTOCOL = 2, 6, 10, 15, 16, 22
_RULE_ATTRIBUTES = frozenset({_SOURCE, _PRIORITY, _MARK, _RULE_TABLE, _MASK, _IP_PROTOCOL, 14, 21})
"""Attributes that Skep's rules can have.  14 is the suppressed prefix length and 21 the rule's origin."""
_CLONED = 0x200
"""RTM_F_CLONED: a path MTU that the kernel has learned for one address.  It is listed like a route, and expires."""
_ROUTE_TABLE = 15
"""RTA_TABLE, the complete number of the routing table.  The header has only eight bits of it."""
_VLAN = 5
"""NDA_VLAN, which is set if a bridge entry is for one VLAN.  Skep makes no such entries."""
_DF = 29
"""IFLA_VXLAN_DF."""

Selection = Callable[[Link], bool]
"""Returns whether to read a link."""


class ReadState(msgspec.Struct, frozen=True):
    """The ``state`` of the selected links, and the ``indices`` of all links of the namespace by name."""

    state: NamespaceState
    indices: dict[str, int]


def read_namespace(selects: Selection, wanted: NamespaceState) -> ReadState:
    """Read the calling thread's namespace.  Blocks.  Raises: OSError.

    ``wanted`` determines which sysctls are read, and which items of the kernel's own.
    """
    indices, links = _links()
    chosen = {index: link for index, link in links.items() if selects(link)}
    names = {index: link.name for index, link in chosen.items()}
    rules = frozenset(_rules(wanted.rules)) if wanted.rules else frozenset[RoutingRule]()
    policies = {(rule.version, rule.table) for rule in rules | wanted.rules if rule.is_policy}
    state = NamespaceState(
        links={link.name: link for link in chosen.values()},
        addresses=frozenset(_addresses(names)),
        routes=frozenset(_routes(names, wanted.routes, policies)),
        entries=frozenset(_entries(chosen)),
        rules=rules,
        sysctls=_sysctls(wanted.sysctls),
    )
    return ReadState(state, indices)


def _links() -> tuple[dict[str, int], dict[int, Link]]:
    replies = dump(GETLINK, _IFINFO.pack(0, 0, 0, 0, 0))
    indices: dict[str, int] = {}
    details: dict[int, tuple[int, dict[int, memoryview]]] = {}
    for _, body in replies:
        _, _, index, flags, _ = _IFINFO.unpack_from(body)
        found = dict(attributes(body[_IFINFO.size :]))
        indices[_text(found[3])] = index
        details[index] = (flags, found)
    names = {index: name for name, index in indices.items()}
    links = {}
    for index, (flags, found) in details.items():
        info = dict(attributes(found[18])) if 18 in found else {}
        kind = "loopback" if flags & _LOOPBACK else _text(info[1]) if 1 in info else ""
        if kind in _KINDS:
            master = names.get(_number(found[10]), "") if 10 in found else ""
            links[index] = Link(
                name=names[index],
                kind=kind,
                mtu=_number(found[4]),
                mac=bytes(found[1]).hex(":") if 1 in found else "",
                master=master,
                is_up=bool(flags & _UP),
                is_closed_port=_is_closed(info),
                vxlan=_vxlan(dict(attributes(info[2]))) if kind == "vxlan" else None,
                offloads=offloads(names[index]) if kind == "vxlan" else None,
            )
    return indices, links


def _is_closed(info: dict[int, memoryview]) -> bool:
    port = dict(attributes(info[5])) if 5 in info else {}
    learning, flooding = port.get(8), port.get(9)
    return learning is not None and flooding is not None and not learning[0] and not flooding[0]


def _vxlan(data: dict[int, memoryview]) -> Vxlan | None:
    """Return the parameters, or None for a device that Skep never creates, because it learns or does not answer for
    neighbors.
    """
    # The kernel shows no address for a device that sends from any IPv6 address, like those inside tunnels.
    local = (
        inet_ntop(AF_INET, data[4]) if 4 in data else inet_ntop(AF_INET6, data[17]) if 17 in data else "::"
    )
    is_ours = not data[7][0] and data[11][0]
    if not is_ours:
        return None
    is_whole = _DF in data and bool(data[_DF][0])
    return Vxlan(vni=_number(data[1]), port=int.from_bytes(data[15], "big"), local=local, is_whole=is_whole)


def _addresses(names: dict[int, str]) -> Iterable[Address]:
    for _, body in dump(GETADDR, _IFADDR.pack(0, 0, 0, 0, 0)):
        family, length, _, _, index = _IFADDR.unpack_from(body)
        if index not in names:
            continue
        found = dict(attributes(body[_IFADDR.size :]))
        if value := found.get(2) or found.get(1):
            yield Address(names[index], f"{inet_ntop(family, value)}/{length}")


def _routes(
    names: dict[int, str], wanted: frozenset[Route], policies: set[tuple[int, int]]
) -> Iterable[Route]:
    """Yield the routes.  ``policies`` has IP version and number of each routing table that policy rules select."""
    for _, body in dump(GETROUTE, _RTMSG.pack(0, 0, 0, 0, 0, 0, 0, 0, 0)):
        family, length, _, _, table, protocol, _, kind, flags = _RTMSG.unpack_from(body)
        if family not in (AF_INET, AF_INET6) or flags & _CLONED:
            continue
        found = dict(attributes(body[_RTMSG.size :]))
        table = _number(found[_ROUTE_TABLE]) if _ROUTE_TABLE in found else table
        version = 4 if family == AF_INET else 6
        if table not in (MAIN_TABLE, LOCAL_TABLE) and (version, table) not in policies:
            continue
        index = _number(found[4]) if 4 in found else 0
        if index not in names or kind not in _KINDS_OF_ROUTES or protocol == _BY_ADVERTISEMENT:
            continue
        any_address = "0.0.0.0" if family == AF_INET else "::"
        destination = f"{inet_ntop(family, found[1]) if 1 in found else any_address}/{length}"
        gateway = inet_ntop(family, found[5]) if 5 in found else ""
        source = inet_ntop(family, found[7]) if 7 in found and family == AF_INET else ""
        own = Route(names[index], destination, gateway, RouteKind(kind), table, source, is_kernels=True)
        sourced = own._replace(is_kernels=False)
        if own in wanted:
            yield own
        elif source and sourced in wanted:
            yield sourced
        elif (version, table) in policies:
            yield Route(names[index], destination, gateway, RouteKind(kind), table)
        elif protocol != BY_KERNEL and kind == RouteKind.UNICAST and table == MAIN_TABLE:
            yield Route(names[index], destination, gateway)


def _rules(wanted: frozenset[RoutingRule]) -> Iterable[RoutingRule]:
    """Yield those ``wanted`` rules that match all packets, and all rules that have the priority of a wanted policy
    rule.
    """
    priorities = {(rule.version, rule.priority) for rule in wanted if rule.is_policy}
    for version, family in ((4, AF_INET), (6, AF_INET6)):
        for _, body in dump(GETRULE, _RULE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)):
            answered, to_length, from_length, _, table, _, _, _, _ = _RULE.unpack_from(body)
            found = dict(attributes(body[_RULE.size :]))
            is_whole = not from_length or from_length == (32 if version == 4 else 128)
            if answered != family or to_length or not is_whole or not found.keys() <= _RULE_ATTRIBUTES:
                continue
            source = inet_ntop(family, found[_SOURCE]) if _SOURCE in found else ""
            priority, mark, protocol = (
                _number(found[one]) if one in found else 0 for one in (_PRIORITY, _MARK, _IP_PROTOCOL)
            )
            table = _number(found[_RULE_TABLE]) if _RULE_TABLE in found else table
            rule = RoutingRule(version, priority, table, mark, protocol, source)
            if rule in wanted or (version, priority) in priorities:
                yield rule


def _entries(links: dict[int, Link]) -> Iterable[NeighborEntry]:
    devices = {index: link.name for index, link in links.items() if link.kind == "vxlan"}
    ports = {index: link.name for index, link in links.items() if link.master}
    bridges = {index: link.name for index, link in links.items() if link.kind == "bridge"}
    for family in (AF_BRIDGE, AF_INET, AF_INET6) if devices else (AF_BRIDGE,):
        for _, body in dump(GETNEIGH, _NDMSG.pack(family, 0, 0, 0, 0)):
            _, index, state, flags, _ = _NDMSG.unpack_from(body)
            if index not in ports and index not in devices and index not in bridges:
                continue
            found = dict(attributes(body[_NDMSG.size :]))
            mac = bytes(found[2]).hex(":") if 2 in found else ""
            address = _address(found[1]) if 1 in found else ""
            if family == AF_BRIDGE:
                if flags & _NTF_SELF and index in devices and address:
                    yield NeighborEntry(EntryKind.FORWARD, devices[index], mac, address)
                elif index in ports and state & _STATIC and not state & _PERMANENT:
                    yield NeighborEntry(EntryKind.PORT, ports[index], mac)
                elif index in bridges and state & _PERMANENT and not flags & _NTF_SELF and _VLAN not in found:
                    yield NeighborEntry(EntryKind.OWN, bridges[index], mac)
            elif state & _PERMANENT and index in devices:
                yield NeighborEntry(EntryKind.NEIGHBOR, devices[index], mac, address)


def _sysctls(names: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in names:
        with suppress(OSError):
            found[name] = Path("/proc/sys", name).read_text().strip()
    return found


def _address(value: memoryview) -> str:
    return inet_ntop(socket.AF_INET if len(value) == 4 else socket.AF_INET6, value)


def _text(value: memoryview) -> str:
    return bytes(value).rstrip(b"\0").decode(errors="replace")


def _number(value: memoryview) -> int:
    return int.from_bytes(value, sys.byteorder)
