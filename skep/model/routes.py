"""Which networks a machine reaches by itself, as its node tells the managers.

An overlay whose subnet is also that of a machine's own network cuts the containers there off from that network.  So
skep nodes report their routes, in an engine label of the node, which the wire carries already and the user can read:
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
"""As many of a node are told and heard of; of more than that, the widest."""
_LABEL_CHARACTERS_MAX = 8192

Subnet: TypeAlias = IPv4Network | IPv6Network


class MachineRoute(msgspec.Struct, frozen=True):
    """A network that a machine reaches through one of its interfaces."""

    subnet: Subnet
    interface: str

    def __str__(self) -> str:
        return f"{self.subnet}={self.interface}"


class Clash(msgspec.Struct, frozen=True):
    """A subnet of the cluster lies across a route of a node."""

    subnet: Subnet
    node: str
    """Its name, or its id where it has none."""
    route: MachineRoute

    def __str__(self) -> str:
        return (
            f"{self.subnet} overlaps with {self.route.subnet} on {self.route.interface} of node {self.node}"
        )


def routes_label(routes: Iterable[MachineRoute]) -> str:
    """The label for ``routes``: without those that others of their interface contain, the widest first."""
    outermost: list[MachineRoute] = []
    for route in sorted(set(filter(_says_something, routes)), key=_by_interface_and_place):
        last = outermost[-1] if outermost else None
        if last is None or last.interface != route.interface or not _contains(last.subnet, route.subnet):
            outermost.append(route)
    outermost.sort(key=lambda route: (route.subnet.version, route.subnet.prefixlen, str(route)))
    return " ".join(map(str, outermost[:ROUTES_MAX]))


def routes_of(node: Node) -> tuple[MachineRoute, ...]:
    """What the node reports; words that are no routes are passed over."""
    return _read(_label_of(node))


def routes_of_all(nodes: Iterable[Node]) -> frozenset[Subnet]:
    """What any of ``nodes`` reports.  Machines of one kind report the same, so each label is looked at once."""
    labels = {_label_of(node) for node in nodes}
    return frozenset(route.subnet for label in labels for route in _read(label))


def clashes(subnets: Iterable[Subnet], nodes: Iterable[Node]) -> list[Clash]:
    """Where ``subnets`` lie across routes of ``nodes``, in their order."""
    wanted = list(subnets)
    by_label: dict[str, list[tuple[Subnet, MachineRoute]]] = {}
    found: list[Clash] = []
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
        found += (Clash(subnet, name, route) for subnet, route in by_label[label])
    return found


def _label_of(node: Node) -> str:
    return node.description.engine.labels.get(ROUTES_LABEL, "")[:_LABEL_CHARACTERS_MAX]


@lru_cache(4096)
def _read(label: str) -> tuple[MachineRoute, ...]:
    routes = []
    for word in label.split()[:ROUTES_MAX]:
        text, _, interface = word.partition("=")
        try:
            routes.append(MachineRoute(ip_network(text), interface))
        except ValueError:
            continue
    return tuple(filter(_says_something, routes))


def _says_something(route: MachineRoute) -> bool:
    """Default routes do not; nor do the two halves of everything, by which tunnels take a default route's place."""
    return route.subnet.prefixlen > 1


def _by_interface_and_place(route: MachineRoute) -> tuple[str, int, int, int]:
    """Behind each subnet come those within it."""
    return route.interface, route.subnet.version, int(route.subnet.network_address), route.subnet.prefixlen


def _contains(one: Subnet, other: Subnet) -> bool:
    return overlap(one, other) and one.prefixlen <= other.prefixlen


def overlap(one: Subnet, other: Subnet) -> bool:
    """Whether two subnets have an address in common; those of different versions have none."""
    match one, other:
        case (IPv4Network(), IPv4Network()) | (IPv6Network(), IPv6Network()):
            return one.overlaps(other)
        case _:
            return False
