"""Network tables: the state of a network that its nodes need.

The managers derive one table for each network of skep nodes from the store.  It is the same for every node, and has the
location of each container (for forwarding), the services, and their serving tasks.  Nodes receive a complete table,
then changes.  Each table has a revision, which nodes acknowledge.
"""

from collections.abc import Mapping
from typing import TypeVar

import msgspec

from skep.model.networks.publishing import PublishOptions
from skep.model.networks.wireguard import PublicKey
from skep.model.swarm import DEFAULT_DATA_PATH_PORT
from skep.model.values.ids import NetworkId, NodeId, ServiceId, TaskId

K = TypeVar("K", bound=str)
V = TypeVar("V")


class Segment(msgspec.Struct, frozen=True):
    """One subnet of a network with its VXLAN id.  ``subnet``: ``10.0.1.0/24``."""

    subnet: str
    gateway: str
    vni: int


class ParentLink(msgspec.Struct, frozen=True, kw_only=True):
    """The host device of a macvlan or ipvlan network: containers have devices of ``kind`` on ``device``.

    ``kind``: ``macvlan`` or ``ipvlan``.  ``mode``: the driver's mode, such as ``bridge`` or ``l2``.  ``made``: type of
    the device if the node creates it, ``vlan`` (on the device that its name begins with) or ``dummy``, else empty.
    """

    kind: str
    device: str
    mode: str
    made: str = ""


class NetworkHead(msgspec.Struct, frozen=True, kw_only=True):
    """The network's own properties."""

    id: NetworkId
    name: str
    segments: tuple[Segment, ...] = ()
    mtu: int = 0
    """Configured MTU, or 0 to use the measured one."""
    port: int = DEFAULT_DATA_PATH_PORT
    """UDP port of its VXLAN."""
    is_ingress: bool = False
    is_internal: bool = False
    is_encrypted: bool = False
    is_door: bool = False
    """Whether HTTP routes lead over it."""
    parent: ParentLink | None = None
    """Host device of a macvlan or ipvlan network.  None for an overlay or a bridge."""

    @property
    def is_of_node(self) -> bool:
        """Return whether the network is local to one node, with its own gateway and without VXLAN."""
        return not any(one.vni for one in self.segments)

    @property
    def gateway(self) -> str:
        """Return the containers' gateway as in the Engine API, or an empty text without one."""
        return self._gateway(is_6=False)

    @property
    def gateway6(self) -> str:
        """Return the containers' IPv6 gateway, as ``gateway``."""
        return self._gateway(is_6=True)

    def _gateway(self, *, is_6: bool) -> str:
        is_shut = self.is_internal and self.parent is not None
        found = [one.gateway for one in self.segments if (":" in one.subnet) is is_6]
        return found[0] if found and self.is_of_node and not is_shut else ""


class TableNode(msgspec.Struct, frozen=True, kw_only=True):
    """A node with containers on the network."""

    id: NodeId
    underlay: str
    """Underlay address of its VXLAN."""
    addresses: tuple[str, ...] = ()
    """The node's own addresses on the network (ingress only), without prefix length."""
    wireguard_keys: tuple[PublicKey, ...] = ()
    """Public keys on encrypted networks, oldest first.  Without a key, nothing can be sent to the node."""
    site: str = ""
    """The site of the node, or empty without one."""


class TableEndpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A task's container on the network; in the table from its assignment until it has ended."""

    task_id: TaskId
    node_id: NodeId
    service_id: ServiceId = ServiceId("")
    """Empty for a plain container on an attachable network."""
    slot: int = 0
    """0 for a global service."""
    name: str = ""
    """Name of the container."""
    aliases: tuple[str, ...] = ()
    """Additional names of this container only."""
    addresses: tuple[str, ...] = ()
    """Addresses without prefix length, IPv4 first."""
    is_running: bool = False
    """Whether its process runs, healthy or not."""
    is_serving: bool = False
    """Whether it gets new connections: it runs, is healthy, and is desired to run."""
    is_named_early: bool = False
    """Whether its names resolve before it serves, because its service is published before it is ready."""
    is_left_out: bool = False
    """Whether it gets no new connections although it serves, because its node does not respond and no manager is
    reachable (``dataplane/tables/unreachable.py``)."""
    version: int = 0
    """Index of the spec version that the task was created from.  0 for a plain container."""
    is_far: bool = False
    """Whether it gets no new connections from this node, because its service prefers tasks at the node's own site,
    where others serve (``dataplane/tables/unreachable.py``).  Managers never set it.
    """

    @property
    def gets_connections(self) -> bool:
        """Return whether new connections of this node to the service may lead here."""
        return self.is_serving and not self.is_far


class TablePort(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """A published port of a service, in ingress mode."""

    protocol: str
    published: int
    target: int
    options: PublishOptions = PublishOptions()


class TableSplit(msgspec.Struct, frozen=True):
    """The share of new connections, in percent, for the tasks of some spec versions during a staged update."""

    percent: int
    versions: tuple[int, ...]
    withdrawn: tuple[int, ...] = ()
    """Versions whose tasks get no new connections while others serve."""


class TableService(msgspec.Struct, frozen=True, kw_only=True):
    """A service with tasks on the network."""

    id: ServiceId
    name: str
    aliases: tuple[str, ...] = ()
    virtual_ips: tuple[str, ...] = ()
    """Virtual addresses without prefix length.  Empty if names resolve to the tasks' own addresses (DNSRR)."""
    ports: tuple[TablePort, ...] = ()
    """Published ports on the ingress network.  Empty on other networks."""
    labels: Mapping[str, str] = {}
    """Labels of routes and proxies on the front door's network.  Empty on other networks."""
    created_at: str = ""
    """Age of the service, which decides between two claims of a route.  Empty where ``labels`` are."""
    split: TableSplit | None = None
    """None treats all tasks alike."""
    is_near: bool = False
    """Whether a node prefers tasks at its own site."""


class NetworkTable(msgspec.Struct, frozen=True, kw_only=True):
    """The table of one network, as of ``revision`` of the store."""

    head: NetworkHead
    revision: int = 0
    nodes: Mapping[NodeId, TableNode] = {}
    endpoints: Mapping[TaskId, TableEndpoint] = {}
    services: Mapping[ServiceId, TableService] = {}
    unread: tuple[ServiceId, ...] = ()
    """Services of any network that the managers cannot read.  Their earlier entries stay valid."""


class TableChange(msgspec.Struct, frozen=True, kw_only=True):
    """The difference of two tables.  ``is_whole``: it replaces the previous table."""

    head: NetworkHead
    revision: int
    is_whole: bool = False
    nodes: tuple[TableNode, ...] = ()
    removed_nodes: tuple[NodeId, ...] = ()
    endpoints: tuple[TableEndpoint, ...] = ()
    removed_endpoints: tuple[TaskId, ...] = ()
    services: tuple[TableService, ...] = ()
    removed_services: tuple[ServiceId, ...] = ()
    unread: tuple[ServiceId, ...] = ()
    """See ``NetworkTable.unread``.  Set in whole tables only."""


class TableSet(msgspec.Struct, frozen=True, kw_only=True):
    """One message to a node.  ``is_complete``: the node is only on these networks."""

    revision: int
    is_complete: bool = False
    changes: tuple[TableChange, ...] = ()
    removed: tuple[NetworkId, ...] = ()


def whole(table: NetworkTable) -> TableChange:
    """Return ``table`` as a change that replaces any other table."""
    return TableChange(
        head=table.head,
        revision=table.revision,
        is_whole=True,
        nodes=tuple(table.nodes.values()),
        endpoints=tuple(table.endpoints.values()),
        services=tuple(table.services.values()),
        unread=table.unread,
    )


def difference(old: NetworkTable, new: NetworkTable) -> TableChange | None:
    """Return the change from ``old`` to ``new``, or None if they differ at most in their revision."""
    nodes, removed_nodes = _differing(old.nodes, new.nodes)
    endpoints, removed_endpoints = _differing(old.endpoints, new.endpoints)
    services, removed_services = _differing(old.services, new.services)
    change = TableChange(
        head=new.head,
        revision=new.revision,
        nodes=nodes,
        removed_nodes=removed_nodes,
        endpoints=endpoints,
        removed_endpoints=removed_endpoints,
        services=services,
        removed_services=removed_services,
    )
    nothing = TableChange(head=old.head, revision=new.revision)
    return None if change == nothing else change


def changed(old: NetworkTable | None, change: TableChange) -> NetworkTable:
    """Return the table after ``change``.  ``old`` may be None only if ``change`` is whole."""
    before = None if change.is_whole else old
    return NetworkTable(
        head=change.head,
        revision=change.revision,
        nodes=_merged(before.nodes if before else {}, change.removed_nodes, {n.id: n for n in change.nodes}),
        endpoints=_merged(
            before.endpoints if before else {},
            change.removed_endpoints,
            {one.task_id: one for one in change.endpoints},
        ),
        services=_merged(
            before.services if before else {}, change.removed_services, {s.id: s for s in change.services}
        ),
        unread=_still_unread(change.unread if change.is_whole or old is None else old.unread, change),
    )


def keeping_unread(before: NetworkTable | None, after: NetworkTable) -> NetworkTable:
    """Return ``after`` with the names, addresses and ports from ``before`` of services that can no longer be read."""
    if before is None or not after.unread:
        return after
    kept = {
        id: before.services[id] for id in after.unread if id in before.services and id not in after.services
    }
    names = {
        id: msgspec.structs.replace(one, name=known.name)
        for id, one in after.endpoints.items()
        if not one.name and one.service_id in after.unread and (known := before.endpoints.get(id)) is not None
    }
    return msgspec.structs.replace(
        after, services={**after.services, **kept}, endpoints={**after.endpoints, **names}
    )


def _still_unread(unread: tuple[ServiceId, ...], change: TableChange) -> tuple[ServiceId, ...]:
    known = {*(one.id for one in change.services), *change.removed_services}
    return tuple(id for id in unread if id not in known)


def _differing(old: Mapping[K, V], new: Mapping[K, V]) -> tuple[tuple[V, ...], tuple[K, ...]]:
    put = tuple(value for key, value in sorted(new.items()) if old.get(key) != value)
    return put, tuple(sorted(old.keys() - new.keys()))


def _merged(old: Mapping[K, V], removed: tuple[K, ...], put: Mapping[K, V]) -> Mapping[K, V]:
    gone = frozenset(removed)
    kept = {key: value for key, value in old.items() if key not in gone}
    return kept | dict(put)
