"""The IP routes of nodes, as they report them to the managers.

Containers on an overlay network cannot reach host networks with the same subnet.  So skep nodes report their IP routes
in an engine label, which existing messages carry and users can read:
``10.0.0.0/24=eth0 192.168.7.0/24=eth1``.
"""

from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Final, TypeAlias

import msgspec

from skep.model.node import Node

ROUTES_LABEL: Final = "skep.routes"
ROUTES_MAX: Final = 64
"""A node reports at most this many routes, the widest ones, and managers read no more."""
_LABEL_CHARACTERS_MAX = 8192
"""Managers read at most this many characters of the label, because nodes are not trusted."""

Subnet: TypeAlias = IPv4Network | IPv6Network


class MachineRoute(msgspec.Struct, frozen=True):
    """An IP route of a machine."""

    subnet: Subnet
    interface: str

    def __str__(self) -> str:
        return f"{self.subnet}={self.interface}"


class RouteOverlap(msgspec.Struct, frozen=True):
    """An overlap of a cluster subnet with an IP route of a node."""

    subnet: Subnet
    node: str
    """The node's name, or else its id."""
    route: MachineRoute

    def __str__(self) -> str:
        return (
            f"{self.subnet} overlaps with {self.route.subnet} on {self.route.interface} of node {self.node}"
        )


def routes_label(routes: Iterable[MachineRoute]) -> str:
    """Return the label for ``routes``, widest first, without routes inside another route of the same interface."""
    outermost: list[MachineRoute] = []
    for route in sorted(set(filter(_is_specific, routes)), key=_by_interface_and_subnet):
        last = outermost[-1] if outermost else None
        if last is None or last.interface != route.interface or not _contains(last.subnet, route.subnet):
            outermost.append(route)
    outermost.sort(key=lambda route: (route.subnet.version, route.subnet.prefixlen, str(route)))
    return " ".join(map(str, outermost[:ROUTES_MAX]))


def routes_of(node: Node) -> tuple[MachineRoute, ...]:
    """Return the routes in the node's label; invalid ones are ignored."""
    return _read(_label_of(node))


def differ_in_routes(one: Node, other: Node) -> bool:
    """Return whether two states of a node have different routes."""
    return _label_of(one) != _label_of(other)


def routes_of_all(nodes: Iterable[Node]) -> frozenset[Subnet]:
    """Return the routes of all ``nodes``.  Many nodes have equal labels, so each label is parsed once."""
    labels = {_label_of(node) for node in nodes}
    return frozenset(route.subnet for label in labels for route in _read(label))


def route_overlaps(subnets: Iterable[Subnet], nodes: Iterable[Node]) -> list[RouteOverlap]:
    """Return the overlaps of ``subnets`` with routes of ``nodes``, in the order of the nodes."""
    wanted = list(subnets)
    by_label: dict[str, list[tuple[Subnet, MachineRoute]]] = {}
    found: list[RouteOverlap] = []
    for node in nodes:
        label = _label_of(node)
        if label not in by_label:
            by_label[label] = [
                (subnet, route)
                for route in _read(label)
                for subnet in wanted
                if overlap(subnet, route.subnet)
            ]
        name = node.description.hostname or node.id
        found += (RouteOverlap(subnet, name, route) for subnet, route in by_label[label])
    return found


def _label_of(node: Node) -> str:
    return node.description.engine.labels.get(ROUTES_LABEL, "")[:_LABEL_CHARACTERS_MAX]


@lru_cache(
    16_384
)  # The cache holds more labels than a cluster has nodes, because ``routes_of_all`` reads them all.
def _read(label: str) -> tuple[MachineRoute, ...]:
    routes = []
    for item in label.split()[:ROUTES_MAX]:
        text, _, interface = item.partition("=")
        try:
            routes.append(MachineRoute(ip_network(text), interface))
        except ValueError:
            continue
    return tuple(filter(_is_specific, routes))


def _is_specific(route: MachineRoute) -> bool:
    """Return False for default routes, and for the two /1 routes with which tunnels override a default route."""
    return route.subnet.prefixlen > 1


def _by_interface_and_subnet(route: MachineRoute) -> tuple[str, int, int, int]:
    """Return a sort key that puts each subnet before the subnets inside it."""
    return route.interface, route.subnet.version, int(route.subnet.network_address), route.subnet.prefixlen


def _contains(one: Subnet, other: Subnet) -> bool:
    return overlap(one, other) and one.prefixlen <= other.prefixlen


def overlap(one: Subnet, other: Subnet) -> bool:
    """Return whether two subnets have an address in common.  Subnets of different IP versions do not."""
    match one, other:
        case (IPv4Network(), IPv4Network()) | (IPv6Network(), IPv6Network()):
            return one.overlaps(other)
        case _:
            return False
