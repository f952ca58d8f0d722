"""Adds to a desired state everything that the kernel derives from addresses, so that it is repaired if deleted.  Pure.

With an IPv4 address the kernel adds routes to its network, to the address itself and to the network's broadcast
address.  With an IPv6 address it adds routes to its network and to the address itself, and on a router one to the
address of all routers.  An interface with IPv6 gets a link-local address and a multicast route.  A new namespace has
rules for the local, the main and the default table.  A bridge has an entry for its own hardware address, and accepts no
frames without it.  The kernel adds each of these only once, so Skep must restore them.

Source: linux, net/ipv4/fib_frontend.c (fib_add_ifaddr), net/ipv4/fib_rules.c (fib_default_rules_init),
net/ipv6/addrconf.c (addrconf_add_dev, add_addr, addrconf_prefix_route), net/ipv6/fib6_rules.c.
"""

from collections.abc import Iterable, Mapping
from ipaddress import IPv4Interface, ip_interface

import msgspec

from skep.dataplane.netns.state import (
    DEFAULT_TABLE,
    LOCAL_TABLE,
    MAIN_TABLE,
    Address,
    EntryKind,
    NamespaceState,
    NeighborEntry,
    Route,
    RouteKind,
    RoutingRule,
)
from skep.dataplane.plan.packet_filter import link_local

RULES_4 = frozenset(
    {RoutingRule(4, 0, LOCAL_TABLE), RoutingRule(4, 32766, MAIN_TABLE), RoutingRule(4, 32767, DEFAULT_TABLE)}
)
RULES_6 = frozenset({RoutingRule(6, 0, LOCAL_TABLE), RoutingRule(6, 32766, MAIN_TABLE)})
_MULTICAST = "ff00::/8"
_BROADCAST_LENGTH_MAX = 30
"""Longest IPv4 prefix with a broadcast address.  A network of two addresses has none (RFC 3021)."""
_ANYCAST_LENGTH_MAX = 126
"""Longest IPv6 prefix with an anycast address for routers.  A network of two addresses has none (RFC 6164)."""


def completed(wanted: NamespaceState, rules: frozenset[RoutingRule] = frozenset()) -> NamespaceState:
    """Return ``wanted`` with the kernel's own additions.

    ``rules`` are the routing rules that a new namespace has, if Skep owns this namespace.
    """
    addresses = wanted.addresses | frozenset(_link_locals(wanted))
    is_router = wanted.sysctls.get("net/ipv6/conf/all/forwarding") == "1"
    routes = {route for address in addresses for route in _routes(address, is_router=is_router)}
    routes |= {
        Route(link, _MULTICAST, kind=RouteKind.MULTICAST, table=LOCAL_TABLE, is_kernels=True)
        for link in wanted.links
        if _has_ipv6(wanted.sysctls, link)
    }
    own = {
        NeighborEntry(EntryKind.OWN, link.name, link.mac)
        for link in wanted.links.values()
        if link.kind == "bridge" and link.mac
    }
    return msgspec.structs.replace(
        wanted,
        addresses=addresses,
        routes=wanted.routes | routes,
        entries=wanted.entries | own if own else wanted.entries,
        rules=wanted.rules | rules,
    )


def is_link_local(address: Address) -> bool:
    """Return whether the kernel assigns such an address by itself."""
    return address.interface.startswith("fe80:")


def _link_locals(wanted: NamespaceState) -> Iterable[Address]:
    for name, link in wanted.links.items():
        makes_none = wanted.sysctls.get(f"net/ipv6/conf/{name}/addr_gen_mode") == "1"
        if link.mac and _has_ipv6(wanted.sysctls, name) and not makes_none:
            yield Address(name, f"{link_local(link.mac)}/64")


def _has_ipv6(sysctls: Mapping[str, str], link: str) -> bool:
    return sysctls.get(f"net/ipv6/conf/{link}/disable_ipv6") == "0"


def _routes(address: Address, *, is_router: bool) -> Iterable[Route]:
    link, held = address.link, ip_interface(address.interface)
    network = held.network
    own = f"{held.ip}/{held.max_prefixlen}"
    if not isinstance(held, IPv4Interface):
        yield Route(link, own, kind=RouteKind.LOCAL, table=LOCAL_TABLE, is_kernels=True)
        if network.prefixlen < held.max_prefixlen:
            yield Route(link, str(network), is_kernels=True)
        if is_router and network.prefixlen <= _ANYCAST_LENGTH_MAX:
            routers = f"{network.network_address}/{held.max_prefixlen}"
            yield Route(link, routers, kind=RouteKind.ANYCAST, table=LOCAL_TABLE, is_kernels=True)
        return
    source = str(held.ip)
    yield Route(link, own, "", RouteKind.LOCAL, LOCAL_TABLE, source, is_kernels=True)
    if held.is_loopback:
        yield Route(link, str(network), "", RouteKind.LOCAL, LOCAL_TABLE, source, is_kernels=True)
    elif network.prefixlen < held.max_prefixlen:
        yield Route(link, str(network), source=source, is_kernels=True)
    if network.prefixlen <= _BROADCAST_LENGTH_MAX:
        to_all = f"{network.broadcast_address}/32"
        yield Route(link, to_all, "", RouteKind.BROADCAST, LOCAL_TABLE, source, is_kernels=True)
