"""The state of one network namespace as data, desired or read.  Its nftables are in ``nft_table``."""

from collections.abc import Mapping
from enum import IntEnum
from typing import NamedTuple

import msgspec

from skep.model.networks.tables import ParentLink


class Vxlan(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters of a VXLAN device that cannot be changed after its creation.

    ``local`` is the source address of its packets.  If ``is_whole``, routers must not fragment its packets (IPv4's DF).
    Otherwise packets that do not fit are fragmented.
    """

    vni: int
    port: int
    local: str
    is_whole: bool = False


class VethPeer(msgspec.Struct, frozen=True, kw_only=True):
    """The far end of a veth: an interface in the namespace at path ``netns``."""

    netns: str
    interface: str
    mac: str


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """A network device.  In a desired state, 0, empty and None mean any value.

    Args:
        is_closed_port: Whether, as a bridge port, it neither learns addresses nor receives frames for unknown
            addresses.
        offloads: Whether checksums and TCP segmentation are left to the layer below.  For VXLAN only, otherwise None.
        peer: Desired only: the other end of a veth.
        sockets: Desired only: the namespace with the VXLAN's UDP socket, or empty for the node's own.
        parent: Desired only: the device of the node's own namespace that it is attached to.
    """

    name: str
    kind: str
    mtu: int = 0
    mac: str = ""
    master: str = ""
    is_up: bool = True
    is_closed_port: bool = False
    vxlan: Vxlan | None = None
    offloads: bool | None = None
    peer: VethPeer | None = None
    sockets: str = ""
    parent: ParentLink | None = None


class EntryKind(IntEnum):
    """The kernel table that contains an entry, and what the entry means there."""

    FORWARD = 1
    """VXLAN: frames for ``mac`` are sent to the node at ``address``."""
    PORT = 2
    """Bridge: frames for ``mac`` leave by this port.  ``address`` is empty."""
    NEIGHBOR = 3
    """``address`` (IPv4 or IPv6) has ``mac``.  The device answers a container that asks for the address."""
    OWN = 4
    """Bridge: frames for ``mac`` are for the bridge itself.

    The kernel creates the entry when the bridge gets its address.
    """


class NeighborEntry(NamedTuple):
    """A permanent entry.  It is a tuple and not a struct, because a large network has thousands of entries."""

    kind: EntryKind
    link: str
    mac: str
    address: str = ""


class Address(NamedTuple):
    """An address of a device.  ``interface`` has the prefix length (``10.0.1.5/24``)."""

    link: str
    interface: str


class RouteKind(IntEnum):
    """Kinds of routes, with the kernel's numbers (RTN_*)."""

    UNICAST = 1
    LOCAL = 2
    BROADCAST = 3
    ANYCAST = 4
    MULTICAST = 5


# Source: linux/rtnetlink.h: RT_TABLE_*.
MAIN_TABLE, LOCAL_TABLE, DEFAULT_TABLE = 254, 255, 253


class Route(NamedTuple):
    """A route.  ``destination`` is ``0.0.0.0/0`` for the default route.  Without a ``gateway`` it is on-link.

    Args:
        is_kernels: Whether the kernel adds it with an address (``kernel_made.py``).
        source: The preferred IPv4 source address.  Routes of the kernel have one, and those into tunnels.
        table: The routing table.  A table other than the main one belongs to Skep, is selected by a policy rule, and
            its gateway is on-link.
    """

    link: str
    destination: str
    gateway: str = ""
    kind: RouteKind = RouteKind.UNICAST
    table: int = MAIN_TABLE
    source: str = ""
    is_kernels: bool = False

    @property
    def is_policy(self) -> bool:
        """Whether it is in a routing table of Skep's own."""
        return self.table not in (MAIN_TABLE, LOCAL_TABLE)


class RoutingRule(NamedTuple):
    """A routing rule of one IP version, which selects ``table``.

    With a ``mark``, a ``protocol`` (IPPROTO_*) or a ``source`` address, it is a policy rule for packets that have them.
    Otherwise it matches all packets.
    """

    version: int
    priority: int
    table: int
    mark: int = 0
    protocol: int = 0
    source: str = ""

    @property
    def is_policy(self) -> bool:
        """Whether it is one of Skep's own rules, which are recognized by their priority."""
        return bool(self.mark or self.protocol or self.source)


class NamespaceState(msgspec.Struct, frozen=True, kw_only=True):
    """The relevant state of one namespace.  ``sysctls`` maps ``net/...`` to values."""

    links: Mapping[str, Link] = {}
    addresses: frozenset[Address] = frozenset()
    routes: frozenset[Route] = frozenset()
    entries: frozenset[NeighborEntry] = frozenset()
    rules: frozenset[RoutingRule] = frozenset()
    sysctls: Mapping[str, str] = {}


class Tuple(msgspec.Struct, frozen=True):
    """Addresses and ports of one direction of a flow.  Ports are 0 if the protocol has none."""

    protocol: int
    source: str
    source_port: int
    destination: str
    destination_port: int


class Flow(msgspec.Struct, frozen=True):
    """An entry of connection tracking.

    ``name`` identifies it for deletion.  It includes the entry's id, so that a later flow is not deleted instead.
    ``is_answered``: whether the other end has sent a packet.
    """

    original: Tuple
    reply: Tuple
    name: bytes
    is_answered: bool = True
