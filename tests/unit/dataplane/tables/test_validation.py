"""What of a manager's tables is acted on: an address that is none takes nothing else with it."""

import re
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.dataplane.plan.overlay import Underlay, remote_entries
from skep.dataplane.plan.packet_filter import vxlan_filter
from skep.dataplane.tables.validation import valid_set, valid_table
from skep.model.networks.publishing import PublishOptions
from skep.model.networks.tables import (
    NetworkHead,
    NetworkTable,
    Segment,
    TableChange,
    TableEndpoint,
    TableNode,
    TablePort,
    TableService,
    TableSet,
    changed,
    whole,
)
from skep.model.networks.wireguard import PublicKey
from skep.model.values.ids import NetworkId, NodeId, ServiceId, TaskId

NET = NetworkId("net1")
HEAD = NetworkHead(id=NET, name="net1", segments=(Segment("10.0.1.0/24", "10.0.1.1", 4096),))
GOOD = TableNode(id=NodeId("n2"), underlay="192.168.0.2")
WEB = TableEndpoint(task_id=TaskId("t1"), node_id=GOOD.id, addresses=("10.0.1.5",))
VIP = TableService(
    id=ServiceId("web"),
    name="web",
    virtual_ips=("10.0.1.2",),
    ports=(TablePort(protocol="tcp", published=80, target=80),),
)
TABLE = NetworkTable(head=HEAD, nodes={GOOD.id: GOOD}, endpoints={WEB.task_id: WEB}, services={VIP.id: VIP})

WORDS = st.one_of(
    st.sampled_from(["", "fe80::1%x", "fd00::1%x }", "::", "0.0.0.0", "224.0.0.1", "ff02::1", "10.0.0.1/8"]),
    st.ip_addresses().map(str),
    st.builds(lambda ip, scope: f"{ip}%{scope}", st.ip_addresses(v=6), st.text(max_size=8)),
    st.text(max_size=20),
)
ELEMENT = re.compile(r'(?:[0-9a-f:.]+ \. \d+|\d+|"[a-z0-9-]+")')


@given(underlay=WORDS, addresses=st.lists(WORDS, max_size=3), virtual=WORDS)
def test_whatever_is_said_rules_are_made_of_addresses_and_numbers_only(
    underlay: str, addresses: list[str], virtual: str
) -> None:
    bad = TableNode(id=NodeId("bad"), underlay=underlay)
    endpoint = replace(WEB, task_id=TaskId("t2"), node_id=bad.id, addresses=tuple(addresses))
    service = replace(VIP, id=ServiceId("s2"), virtual_ips=(virtual,))
    said = replace(
        TABLE,
        nodes={**TABLE.nodes, bad.id: bad},
        endpoints={**TABLE.endpoints, endpoint.task_id: endpoint},
        services={**TABLE.services, service.id: service},
    )
    table = valid_table(said, lambda _: None)
    rules = vxlan_filter({NET: table}, NodeId("n1"), ["br0"])
    assert all(ELEMENT.fullmatch(element) for _, element in rules.elements)
    assert ("peers4", "192.168.0.2 . 4096") in rules.elements
    remote_entries(table, NodeId("n1"), Underlay("192.168.0.1"))  # and routes and neighbors can be made
    for one in table.services.values():
        assert all(text == str(ip_address(text)) and "%" not in text for text in one.virtual_ips)


@pytest.mark.parametrize(
    "underlay",
    ["fe80::1%x", "fe80::1", "::ffff:10.0.0.1", "224.0.0.1", "0.0.0.0", "255.255.255.255", "::", "x"],
)
def test_a_node_at_no_address_of_a_machine_is_left_out_alone_and_said(underlay: str) -> None:
    notes: list[str] = []
    bad = TableNode(id=NodeId("bad"), underlay=underlay)
    updates = TableSet(revision=1, changes=(whole(replace(TABLE, nodes={bad.id: bad, GOOD.id: GOOD})),))
    (change,) = valid_set(updates, notes.append).changes
    assert changed(None, change).nodes == {GOOD.id: GOOD}
    assert len(notes) == 1


def test_a_node_has_two_wireguard_keys_at_most_and_none_that_is_malformed() -> None:
    """A manager could name thousands, each of which would be a peer of every device."""
    many = tuple(PublicKey(bytes([number]) * 32, 4799) for number in range(1, 100))
    wrong = (PublicKey(b"short", 4799), PublicKey(bytes(32), 0))
    nodes = {
        NodeId(id): TableNode(id=NodeId(id), underlay="192.168.0.3", wireguard_keys=keys)
        for id, keys in (("many", many), ("wrong", wrong))
    }
    table = valid_table(replace(TABLE, nodes=nodes), lambda _: None)
    assert {id: node.wireguard_keys for id, node in table.nodes.items()} == {"many": many[:2], "wrong": ()}


def test_an_entry_that_is_not_sound_any_more_goes() -> None:
    """It is not where it was; to keep it there would send its frames to another."""
    bad = replace(GOOD, underlay="fe80::1%x")
    moved = replace(WEB, addresses=("10.0.1.9%x",))
    change = TableChange(head=HEAD, revision=2, nodes=(bad,), endpoints=(moved,))
    (sound,) = valid_set(TableSet(revision=2, changes=(change,)), lambda _: None).changes
    after = changed(TABLE, sound)
    assert (dict(after.nodes), dict(after.endpoints), dict(after.services)) == ({}, {}, {VIP.id: VIP})


def test_a_subnet_or_a_published_port_that_is_none_is_left_out_alone() -> None:
    scoped = replace(VIP.ports[0], options=PublishOptions(host_ip="fe80::1%x }"))
    segments = (*HEAD.segments, Segment("fd00::/64", "fd00::1%x", 4097), Segment("10.0.2.0/24", "", 1 << 24))
    said = replace(
        TABLE,
        head=replace(HEAD, segments=segments),
        services={VIP.id: VIP, ServiceId("b"): replace(VIP, id=ServiceId("b"), ports=(scoped,))},
    )
    table = valid_table(said, lambda _: None)
    assert table.head.segments == HEAD.segments
    assert set(table.services) == {VIP.id}


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "224.0.0.1", "::1", "::", "ff02::1"])
def test_a_container_at_no_address_of_a_container_is_left_out_alone_and_said(address: str) -> None:
    said: list[str] = []
    odd = replace(WEB, task_id=TaskId("t2"), addresses=(address,))
    table = replace(TABLE, endpoints={WEB.task_id: WEB, odd.task_id: odd})
    assert set(valid_table(table, said.append).endpoints) == {WEB.task_id}
    assert said == [f"TableEndpoint: {address} is not an address of a container"]


def test_addresses_are_spelled_in_one_way() -> None:
    node = replace(GOOD, underlay="FD00:0::1")
    assert valid_table(replace(TABLE, nodes={node.id: node}), print).nodes[node.id].underlay == "fd00::1"
