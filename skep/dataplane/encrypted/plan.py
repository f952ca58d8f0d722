"""What the forwarder is to do: said to it whole, each time anything of it changes."""

from collections.abc import Iterable
from ipaddress import ip_address, ip_network

import msgspec

from skep.model.ids import NodeId
from skep.model.pair_keys import NodeKeys, PairKey
from skep.model.swarm import DEFAULT_DATA_PATH_PORT
from skep.model.tables import Segment, Table

PORT_OFFSET = 10
"""The forwarder's UDP port is that of VXLAN plus this (4799): it moves with the cluster's data-path port."""


def device_of(segment: Segment) -> str:
    """Name of the TAP that carries ``segment`` in its network's namespace."""
    return f"enc{segment.vni}"


class PlannedPeer(msgspec.Struct, frozen=True, kw_only=True):
    """A node to talk to.  ``address``: its underlay's."""

    node_id: NodeId
    address: str
    keys: tuple[PairKey, ...] = ()


class PlannedEndpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A container on another node.  ``mac``: 6 bytes."""

    node_id: NodeId
    mac: bytes
    addresses: tuple[str, ...] = ()


class PlannedSegment(msgspec.Struct, frozen=True, kw_only=True):
    """One subnet's encrypted carrier: a TAP device that is a port of the network's bridge.

    ``namespace``: path of the network's namespace, which has to exist; ``device``: the TAP's name in it.
    """

    vni: int
    namespace: str
    device: str
    endpoints: tuple[PlannedEndpoint, ...] = ()


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """All of it.  ``address``: this node's underlay address; ``mtu``: the underlay's."""

    node_id: NodeId = NodeId("")
    address: str = ""
    port: int = DEFAULT_DATA_PATH_PORT + PORT_OFFSET
    mtu: int = 1500
    peers: tuple[PlannedPeer, ...] = ()
    segments: tuple[PlannedSegment, ...] = ()


def planned_segments(table: Table, own: NodeId, namespace: str) -> tuple[PlannedSegment, ...]:
    """What carries an encrypted network on node ``own``: where everybody else's containers are.

    An endpoint belongs to the subnet of its first address, as on VXLAN: a frame for it leaves by one device.  Subnets
    that share a VXLAN id share the device.
    """
    endpoints: dict[int, list[PlannedEndpoint]] = {one.vni: [] for one in table.head.segments}
    devices = {one.vni: device_of(one) for one in table.head.segments}
    subnets = [(ip_network(one.subnet), one.vni) for one in table.head.segments]
    for _, one in sorted(table.endpoints.items()):
        if one.node_id == own or not one.addresses:
            continue
        address = ip_address(one.addresses[0])
        vni = next((number for subnet, number in subnets if address in subnet), None)
        if vni is not None:
            endpoints[vni].append(
                PlannedEndpoint(node_id=one.node_id, mac=mac_of(one.addresses), addresses=one.addresses)
            )
    return tuple(
        PlannedSegment(vni=vni, namespace=namespace, device=devices[vni], endpoints=tuple(here))
        for vni, here in endpoints.items()
    )


def plan_of(
    own: NodeId,
    tables: Iterable[Table],
    keys: NodeKeys,
    segments: Iterable[PlannedSegment],
    *,
    address: str,
    mtu: int,
) -> Plan:
    """The plan of node ``own`` for its encrypted networks.  ``address``: its underlay's; ``mtu``: of that.

    A node without keys yet is a peer without keys: nothing goes to it, and nothing comes from it.
    """
    encrypted = [table for table in tables if table.head.is_encrypted]
    known = {id: peer.keys for id, peer in keys.peers.items()}
    nodes = {node.id: node.underlay for table in encrypted for node in table.nodes.values()}
    peers = (
        PlannedPeer(node_id=id, address=underlay, keys=known.get(id, ()))
        for id, underlay in sorted(nodes.items())
        if id != own
    )
    port = next((table.head.port for table in encrypted), DEFAULT_DATA_PATH_PORT) + PORT_OFFSET
    return Plan(
        node_id=own,
        address=address,
        port=port,
        mtu=mtu,
        peers=tuple(peers),
        segments=tuple(sorted(segments, key=lambda one: one.vni)),
    )


def mac_of(addresses: Iterable[str]) -> bytes:
    """The MAC address of a container: ``02:42`` and its IPv4 address, else the last four bytes of its first one.

    Source: moby, libnetwork/netutils/utils.go (GenerateMACFromIP).
    """
    parsed = sorted((ip_address(address) for address in addresses), key=lambda one: one.version)
    assert parsed, "an endpoint has an address"
    return b"\x02\x42" + parsed[0].packed[-4:]
