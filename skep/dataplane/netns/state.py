"""What one network namespace holds, as data: wanted or read.  Its nftables are in ``nft_table``."""

from collections.abc import Mapping
from enum import IntEnum
from typing import NamedTuple

import msgspec

from skep.model.tables import ParentLink


class Vxlan(msgspec.Struct, frozen=True, kw_only=True):
    """What cannot be changed of a VXLAN device once it is made.  ``local``: address that its packets leave from.

    ``is_whole``: its packets are never fragmented on the way (IPv4's DF); others are where they do not fit.
    """

    vni: int
    port: int
    local: str
    is_whole: bool = False


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """The far end of a veth: an interface in the namespace at path ``netns``."""

    netns: str
    interface: str
    mac: str


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """A network device.  In a wanted state, 0, empty and None mean: whatever it is.

    ``is_closed_port``: as a port of a bridge it neither learns addresses nor gets what is meant for unknown ones.
    ``offloads``: whether checksums and TCP's segments are left to what lies below; of VXLAN only, None elsewhere.
    Of wanted states only: ``peer``, where the other end of a veth is to be made; ``sockets``, the namespace that has a
    VXLAN's UDP socket, empty: the node's own; ``parent``, the device of the node's own namespace that it is on.
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
    peer: Peer | None = None
    sockets: str = ""
    parent: ParentLink | None = None


class EntryKind(IntEnum):
    """Which of the kernel's tables of neighbours an entry is in."""

    FORWARD = 1
    """VXLAN: frames for ``mac`` go to the node at ``address``."""
    PORT = 2
    """Bridge: frames for ``mac`` leave by this port; ``address`` is empty."""
    NEIGHBOUR = 3
    """``address`` (IPv4 or IPv6) has ``mac``: what the device answers with when a container asks."""
    OWN = 4
    """Bridge: frames for ``mac`` are for the bridge itself; the kernel makes it with the bridge's address."""


class Entry(NamedTuple):
    """A permanent entry; tuples, because a large network has thousands."""

    kind: EntryKind
    link: str
    mac: str
    address: str = ""


class Address(NamedTuple):
    """An address of a device; ``interface``: ``10.0.1.5/24``."""

    link: str
    interface: str


class RouteKind(IntEnum):
    """The kernel's numbers (RTN_*)."""

    UNICAST = 1
    LOCAL = 2
    BROADCAST = 3
    ANYCAST = 4
    MULTICAST = 5


MAIN_TABLE, LOCAL_TABLE, DEFAULT_TABLE = 254, 255, 253


class Route(NamedTuple):
    """A route.  ``destination``: ``0.0.0.0/0`` for the default; ``gateway`` empty: on the link.

    ``is_kernels``: the kernel makes it with an address (``kernel_made.py``).  ``source``: IPv4's preferred source, of
    such routes only.  In a table of its own it is found by a policy rule, and its gateway is on the link.
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


class Rule(NamedTuple):
    """A routing rule of one IP version: look into ``table``.

    With a ``mark`` or a ``protocol`` (IPPROTO_*) it is a policy rule, for packets that have these; without, for all.
    """

    version: int
    priority: int
    table: int
    mark: int = 0
    protocol: int = 0

    @property
    def is_policy(self) -> bool:
        """Whether it is one of Skep's own, which is recognized by its priority."""
        return bool(self.mark or self.protocol)


class State(msgspec.Struct, frozen=True, kw_only=True):
    """All that matters of one namespace.  ``sysctls``: ``net/...`` to value."""

    links: Mapping[str, Link] = {}
    addresses: frozenset[Address] = frozenset()
    routes: frozenset[Route] = frozenset()
    entries: frozenset[Entry] = frozenset()
    rules: frozenset[Rule] = frozenset()
    sysctls: Mapping[str, str] = {}


class Tuple(msgspec.Struct, frozen=True):
    """One direction of a flow.  Ports are 0 where the protocol has none."""

    protocol: int
    source: str
    source_port: int
    destination: str
    destination_port: int


class Flow(msgspec.Struct, frozen=True):
    """An entry of connection tracking.

    ``name``: what it is deleted by, with its id, so that it is not the flow that came after it.
    """

    original: Tuple
    reply: Tuple
    name: bytes
