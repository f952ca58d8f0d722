"""What a network needs on a node, from its table and the containers there."""

from ipaddress import ip_address

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.dataplane.addresses import mac_for
from skep.dataplane.netns.state import Address, EntryKind, NamespaceState, NeighborEntry, Route
from skep.dataplane.plan.overlay import (
    LocalEndpoint,
    Underlay,
    container_state,
    mtu_of,
    network_state,
    remote_entries,
)
from skep.dataplane.plan.packet_filter import door_filter, link_local, owner, spoofing_filter, vxlan_filter
from skep.dataplane.plan.wireguard import tunnelled
from skep.model.networks.sandbox import Endpoint, EndpointConfig, Sandbox
from skep.model.networks.tables import NetworkHead, NetworkTable, Segment, TableEndpoint, TableNode
from skep.model.values.ids import NetworkId, NodeId, TaskId

ME, OTHER, THIRD = NodeId("me"), NodeId("other"), NodeId("third")
HEAD = NetworkHead(
    id=NetworkId("net1"),
    name="web",
    segments=(Segment("10.0.1.0/24", "10.0.1.1", 4097), Segment("10.0.2.0/24", "10.0.2.1", 4098)),
)
UNDERLAYS = {ME: "192.0.2.1", OTHER: "192.0.2.2", THIRD: "192.0.2.3"}
MINE = Underlay("192.0.2.1")


def a_table(*endpoints: tuple[NodeId, str], head: NetworkHead = HEAD) -> NetworkTable:
    return NetworkTable(
        head=head,
        nodes={id: TableNode(id=id, underlay=underlay) for id, underlay in UNDERLAYS.items()},
        endpoints={
            TaskId(f"t{number}"): TableEndpoint(
                task_id=TaskId(f"t{number}"), node_id=node, addresses=tuple(addresses.split())
            )
            for number, (node, addresses) in enumerate(endpoints)
        },
    )


def a_place(*addresses: str, port: str = "vs1", head: NetworkHead = HEAD) -> LocalEndpoint:
    mac = mac_for(one.partition("/")[0] for one in addresses)
    place = EndpointConfig(head=head, addresses=addresses)
    return LocalEndpoint("/netns", Endpoint(config=place, interface="eth0", port=port, mac_address=mac))


def state(
    table: NetworkTable | None, *places: LocalEndpoint, underlay: Underlay | None = MINE
) -> NamespaceState:
    head = table.head if table is not None else HEAD
    remote = remote_entries(table, ME, underlay) if table is not None else frozenset()
    return network_state(head, table, places, node_id=ME, underlay=underlay, remote=remote)


def test_a_remote_endpoint_has_its_three_entries_on_the_device_of_its_subnet() -> None:
    found = state(a_table((OTHER, "10.0.2.5")))
    mac = "02:42:0a:00:02:05"
    assert found.entries == {
        NeighborEntry(EntryKind.FORWARD, "vx4098", mac, "192.0.2.2"),
        NeighborEntry(EntryKind.PORT, "vx4098", mac),
        NeighborEntry(EntryKind.NEIGHBOR, "vx4098", mac, "10.0.2.5"),
    }
    assert sorted(found.links) == ["br0", "vx4097", "vx4098"]
    assert found.addresses == {Address("br0", "10.0.1.1/24"), Address("br0", "10.0.2.1/24")}


def test_a_local_container_is_a_port_and_nothing_more() -> None:
    found = state(a_table((ME, "10.0.1.5")), a_place("10.0.1.5/24"))
    assert found.entries == {NeighborEntry(EntryKind.PORT, "vs1", "02:42:0a:00:01:05")}
    assert found.links["vs1"].master == "br0"


def test_before_the_table_there_is_a_bridge_without_a_way_to_other_nodes() -> None:
    found = state(None, a_place("10.0.1.5/24"), underlay=None)
    assert sorted(found.links) == ["br0", "vs1"]


def test_an_encrypted_network_sends_from_the_tunnels_namespace_to_addresses_inside() -> None:
    secure = a_table((OTHER, "10.0.1.5"), head=msgspec.structs.replace(HEAD, is_encrypted=True))
    table = tunnelled(secure, ME, {OTHER: "fd73::2"})
    underlay = Underlay("::", 1440, netns="/run/tunnels")
    found = state(table, underlay=underlay)
    devices = [link for link in found.links.values() if link.vxlan is not None]
    assert [link.name for link in devices] == ["vx4097", "vx4098"]
    assert {(link.vxlan.local, link.vxlan.port, link.sockets) for link in devices if link.vxlan} == {
        ("::", 4801, "/run/tunnels")
    }
    assert {link.mtu for link in found.links.values()} == {1370}
    mac = mac_for(["10.0.1.5"])
    assert NeighborEntry(EntryKind.FORWARD, "vx4097", mac, "fd73::2") in found.entries
    unreachable = tunnelled(secure, ME, {})
    assert not [one for one in state(unreachable, underlay=underlay).entries if one.kind is EntryKind.FORWARD]
    assert sorted(state(table, underlay=None).links) == ["br0"]


def test_a_node_that_is_not_in_the_table_has_no_vxlan() -> None:
    assert sorted(state(a_table((OTHER, "10.0.1.5")), underlay=None).links) == ["br0"]


def test_an_address_that_the_table_gives_to_another_node_is_there() -> None:
    """The container that had it here has not been stopped yet."""
    place = a_place("10.0.1.5/24")
    moved = state(a_table((OTHER, "10.0.1.5")), place)
    assert NeighborEntry(EntryKind.PORT, "vx4097", "02:42:0a:00:01:05") in moved.entries
    assert NeighborEntry(EntryKind.PORT, "vs1", "02:42:0a:00:01:05") not in moved.entries
    both = state(a_table((OTHER, "10.0.1.5"), (ME, "10.0.1.5")), place)
    assert both.entries == {NeighborEntry(EntryKind.PORT, "vs1", "02:42:0a:00:01:05")}


def test_nodes_with_another_version_of_ip_are_left_out() -> None:
    table = a_table((OTHER, "10.0.1.5"))
    assert remote_entries(table, ME, Underlay("fd09::1")) == frozenset()


def test_both_versions_are_neighbors_on_one_device() -> None:
    segments = (Segment("10.0.1.0/24", "10.0.1.1", 4097), Segment("fd01::/64", "fd01::1", 4097))
    head = msgspec.structs.replace(HEAD, segments=segments)
    found = state(a_table((OTHER, "10.0.1.5 FD01:0::5"), head=head))
    assert {one.address for one in found.entries if one.kind is EntryKind.NEIGHBOR} == {
        "10.0.1.5",
        "fd01::5",
    }
    assert {one.link for one in found.entries} == {"vx4097"}


def test_the_ingress_bridge_has_the_nodes_own_address() -> None:
    head = msgspec.structs.replace(HEAD, is_ingress=True)
    nodes = {
        id: TableNode(id=id, underlay=underlay, addresses=(f"10.0.1.{number}",))
        for number, (id, underlay) in enumerate(UNDERLAYS.items(), 2)
    }
    found = state(msgspec.structs.replace(a_table(head=head), nodes=nodes))
    assert found.addresses == {Address("skep-ingress", "10.0.1.2/24")}
    assert found.links["skep-ingress"].mac == "02:42:0a:00:01:02"
    assert {one.mac for one in found.entries} == {"02:42:0a:00:01:03", "02:42:0a:00:01:04"}


@pytest.mark.parametrize(
    ("requested", "underlay", "mtu"),
    [
        (0, Underlay("192.0.2.1"), 1450),
        (0, Underlay("192.0.2.1", 9000), 8950),
        (0, Underlay("fd09::1"), 1430),
        (0, None, 1450),
        (1400, Underlay("fd09::1"), 1400),
    ],
)
def test_the_mtu_leaves_room_for_vxlan(requested: int, underlay: Underlay | None, mtu: int) -> None:
    assert mtu_of(msgspec.structs.replace(HEAD, mtu=requested), underlay) == mtu


def test_a_container_has_the_other_subnets_on_its_link_and_the_gateway_last() -> None:
    connected = a_place("10.0.1.5/24").endpoint
    endpoint = Sandbox(
        netns="/netns",
        address="172.18.0.2",
        prefix_length=16,
        gateway="172.18.0.1",
        interface="eth1",
        endpoints=(connected,),
    )
    found = container_state(endpoint, {HEAD.id: (HEAD, 1450)})
    assert found.routes == {Route("eth0", "10.0.2.0/24"), Route("eth1", "0.0.0.0/0", "172.18.0.1")}
    assert found.addresses == {
        Address("lo", "127.0.0.1/8"),
        Address("eth0", "10.0.1.5/24"),
        Address("eth1", "172.18.0.2/16"),
    }
    assert (found.links["eth0"].mtu, found.links["eth1"].mtu) == (1450, 1500)


def test_a_way_out_by_ipv6_is_an_address_and_a_default_route_of_the_gateways_interface() -> None:
    endpoint = Sandbox(
        netns="/netns",
        address="172.18.0.2",
        prefix_length=16,
        gateway="172.18.0.1",
        interface="eth0",
        address6="fd12::ac12:2",
        gateway6="fd12::1",
    )
    found = container_state(endpoint, {})
    assert Route("eth0", "::/0", "fd12::1") in found.routes
    assert Address("eth0", "fd12::ac12:2/64") in found.addresses
    assert found.sysctls["net/ipv6/conf/eth0/disable_ipv6"] == "0"


def test_a_container_may_send_as_itself_only() -> None:
    table = spoofing_filter([owner(a_place("10.0.1.5/24", "fd01::5/64").endpoint)])
    assert {
        ("macs", '"vs1" . 02:42:0a:00:01:05'),
        ("addresses4", '"vs1" . 10.0.1.5'),
        ("senders4", '"vs1" . 02:42:0a:00:01:05 . 10.0.1.5'),
        ("addresses6", '"vs1" . fd01::5'),
        ("addresses6", '"vs1" . fe80::42:aff:fe00:105'),
    } <= table.elements
    assert link_local("02:42:0a:00:01:05") == "fe80::42:aff:fe00:105"


def test_on_the_front_doors_network_other_tasks_than_its_own_open_no_connection() -> None:
    owners = [
        owner(a_place("10.254.0.5/16", port="vs1").endpoint),
        owner(a_place("10.254.0.6/16", port="vs2").endpoint),
    ]
    table = door_filter(owners, {"10.254.0.6", "10.254.0.9"})
    assert table.elements == {("ports", '"vs1"'), ("ports", '"vs2"'), ("proxies", '"vs2"')}
    assert [rule for _, rule in table.rules] == [
        "iifname != @ports accept",
        "iifname @proxies accept",
        "ether type arp accept",
        "tcp flags & (syn | ack) != syn accept",
        "meta l4proto { icmp, ipv6-icmp } accept",
        "drop",
    ]


def test_vxlan_is_taken_from_the_other_nodes_of_the_same_network_only() -> None:
    found = vxlan_filter({HEAD.id: a_table()}, ME, ["skep-gw"]).elements
    assert {element for name, element in found if name == "peers4"} == {
        f"192.0.2.{node} . {vni}" for node in (2, 3) for vni in (4097, 4098)
    }


node_ids = st.sampled_from((ME, OTHER, THIRD))
addresses = st.integers(2, 6).map(lambda number: f"10.0.{number % 2 + 1}.{number}")


@given(endpoints=st.lists(st.tuples(node_ids, addresses), max_size=8), local=st.lists(addresses, max_size=4))
def test_every_mac_has_one_place_and_is_where_the_table_says(
    endpoints: list[tuple[NodeId, str]], local: list[str]
) -> None:
    owners = {address: node for node, address in endpoints}
    table = a_table(*((node, address) for address, node in owners.items()))
    places = [a_place(f"{one}/24", port=f"vs{number}") for number, one in enumerate(local)]
    found = state(table, *places)
    ports = [one for one in found.entries if one.kind is EntryKind.PORT]
    assert len({one.mac for one in ports}) == len(ports)
    by_mac = {one.mac: one.link for one in ports}
    for address, node in owners.items():
        link = by_mac.get(mac_for([address]))
        assert link is None or link.startswith("vx") == (node != ME)
        assert link is not None or node == ME, "who is elsewhere is always reached"
    for entry in found.entries:
        if entry.kind is EntryKind.NEIGHBOR:
            assert by_mac[entry.mac] == entry.link
            assert ip_address(entry.address)
