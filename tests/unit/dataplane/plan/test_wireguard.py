"""What WireGuard carries: peers from tables, the choice between old and new keys, and what is left out."""

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.dataplane.plan import wireguard
from skep.dataplane.plan.wireguard import (
    DeviceChange,
    FoundDevice,
    FoundPeer,
    Session,
    WireGuardDevice,
    changes,
    chosen,
    device_name,
    inner_address,
    plan_of,
    tunnel_mtu,
    tunnelled,
)
from skep.model.values.ids import NodeId
from skep.paths import DEFAULT_RUN
from tests.support.encryption.wireguard import a_pair, a_secure_table

N1, N2, N3 = NodeId("n1"), NodeId("n2"), NodeId("n3")
OWN, OWN_NEXT = a_pair(1), a_pair(11, slot=1)
THEIRS, THEIRS_NEXT = a_pair(2), a_pair(12, slot=1)
THIRD = a_pair(3)


def test_each_key_of_each_other_node_is_a_peer_with_one_address() -> None:
    plan = plan_of(N1, (OWN,), [a_secure_table({"n1": (OWN,), "n2": (THEIRS, THEIRS_NEXT), "n3": (THIRD,)})])
    peers = plan.devices[0].peers
    assert peers.keys() == {THEIRS.public, THEIRS_NEXT.public, THIRD.public}
    old, new = peers[THEIRS.public], peers[THEIRS_NEXT.public]
    assert (old.endpoint, old.port, new.port) == ("192.0.2.2", 4799, 4800)
    assert old.inner == inner_address(THEIRS.public) != new.inner
    assert len({peer.inner for peer in peers.values()}) == 3


def test_a_plain_network_brings_no_peer_and_no_device() -> None:
    table = a_secure_table({"n1": (OWN,), "n2": (THEIRS,)})
    plain = msgspec.structs.replace(table, head=msgspec.structs.replace(table.head, is_encrypted=False))
    plan = plan_of(N1, (OWN,), [plain])
    assert (plan.devices, plan.peers, plan.sources) == ({}, {}, frozenset())


def test_ports_follow_the_data_path_port_or_the_configured_one() -> None:
    table = a_secure_table({"n1": (OWN,)})
    assert [one.port for one in plan_of(N1, (OWN, OWN_NEXT), [table]).devices.values()] == [4799, 4800]
    configured = plan_of(N1, (OWN, OWN_NEXT), [table], port=51820)
    assert [one.port for one in configured.devices.values()] == [51820, 51821]


def test_a_node_without_a_key_is_no_peer_is_named_and_gets_nothing() -> None:
    """As one of an older version, or one whose table came from a manager of an older version."""
    table = a_secure_table({"n1": (OWN,), "n2": (), "n3": (THIRD,)})
    plan = plan_of(N1, (OWN,), [table])
    assert plan.keyless == (N2,)
    assert plan.devices[0].peers.keys() == {THIRD.public}
    inner = tunnelled(table, N1, chosen(plan, ()).addresses)
    assert inner.nodes.keys() == {N1, N3}


def test_a_key_that_two_nodes_publish_is_used_for_neither() -> None:
    plan = plan_of(N1, (OWN,), [a_secure_table({"n1": (OWN,), "n2": (THEIRS,), "n3": (THEIRS,)})])
    assert plan.devices[0].peers == {}
    assert plan.contested == (N2, N3)


def test_a_peer_with_this_nodes_key_is_left_out() -> None:
    plan = plan_of(N1, (OWN,), [a_secure_table({"n1": (OWN,), "n2": (OWN, THEIRS)})])
    assert plan.devices[0].peers.keys() == {THEIRS.public}
    assert plan.contested == (N2,)


def test_keys_with_the_same_address_are_used_for_neither_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that made its key so would get what is sent to the other one: a device knows a peer by that address."""
    real = inner_address
    twin = {THEIRS.public: "fd73::1", THIRD.public: "fd73::1"}
    monkeypatch.setattr(wireguard, "inner_address", lambda public: twin.get(public) or real(public))
    table = a_secure_table({"n1": (OWN,), "n2": (THEIRS, THEIRS_NEXT), "n3": (THIRD,)})
    plan = plan_of(N1, (OWN,), [table])
    assert plan.devices[0].peers.keys() == {THEIRS_NEXT.public}, "the owner goes on by its other key"
    assert plan.contested == (N2, N3)
    twin[THIRD.public] = real(OWN.public)
    plan = plan_of(N1, (OWN,), [table])
    assert THIRD.public not in plan.devices[0].peers, "nor is it this node's own"


def test_an_old_key_that_another_node_publishes_again_changes_nothing() -> None:
    """Its owner has rotated, so no node has the private half.  While the owner still publishes it, it is contested, and
    the owner is reached by the newer one.
    """
    replayed = a_secure_table({"n1": (OWN,), "n2": (THEIRS_NEXT,), "n3": (THEIRS, THIRD)})
    plan = plan_of(N1, (OWN,), [replayed])
    assert (plan.contested, plan.keyless) == ((), ())
    assert chosen(plan, {(OWN.public, THEIRS_NEXT.public), (OWN.public, THIRD.public)}).addresses == {
        N2: inner_address(THEIRS_NEXT.public),
        N3: inner_address(THIRD.public),
    }
    during = a_secure_table({"n1": (OWN,), "n2": (THEIRS, THEIRS_NEXT), "n3": (THEIRS, THIRD)})
    plan = plan_of(N1, (OWN,), [during])
    assert plan.contested == (N2, N3)
    assert plan.devices[0].peers.keys() == {THEIRS_NEXT.public, THIRD.public}


def test_an_endpoint_follows_the_node_and_never_another_nodes_packets() -> None:
    """A node that publishes another's address gets packets for its own keys sent there, and nothing else changes."""
    table = a_secure_table({"n1": (OWN,), "n2": (THEIRS,), "n3": (THIRD,)})
    moved = msgspec.structs.replace(table.nodes[N3], underlay=table.nodes[N2].underlay)
    lying = msgspec.structs.replace(table, nodes={**table.nodes, N3: moved})
    before, after = (plan_of(N1, (OWN,), [one]).devices[0] for one in (table, lying))
    assert changes(_as_made(before), after, before).put == (after.peers[THIRD.public],)
    assert after.peers[THEIRS.public] == before.peers[THEIRS.public]


def test_frames_of_a_network_come_from_its_own_nodes_only() -> None:
    """A node that is a peer because of one network has no say in another."""
    one = a_secure_table({"n1": (OWN,), "n2": (THEIRS,)}, vni=4097, name="one")
    other = a_secure_table({"n1": (OWN,), "n3": (THIRD,)}, vni=4098, name="other")
    plan = plan_of(N1, (OWN,), [one, other])
    assert plan.sources == {(inner_address(THEIRS.public), 4097), (inner_address(THIRD.public), 4098)}


def test_a_node_that_left_every_encrypted_network_is_removed_at_once() -> None:
    before = plan_of(N1, (OWN,), [a_secure_table({"n1": (OWN,), "n2": (THEIRS,), "n3": (THIRD,)})])
    after = plan_of(N1, (OWN,), [a_secure_table({"n1": (OWN,), "n3": (THIRD,)})])
    change = changes(_as_made(before.devices[0]), after.devices[0], before.devices[0])
    assert change == DeviceChange(removed=(THEIRS.public,))


def test_traffic_moves_to_a_peers_new_key_when_its_session_is_there() -> None:
    plan = plan_of(N1, (OWN,), [a_secure_table({"n1": (OWN,), "n2": (THEIRS, THEIRS_NEXT)})])
    old, new = inner_address(THEIRS.public), inner_address(THEIRS_NEXT.public)
    by_old, by_new = (OWN.public, THEIRS.public), (OWN.public, THEIRS_NEXT.public)
    assert chosen(plan, {by_old}).addresses == {N2: old}
    assert chosen(plan, {by_old, by_new}).addresses == {N2: new}
    assert chosen(plan, ()).addresses == {N2: new}, "nothing works yet: the newest is tried"


def test_traffic_moves_to_the_own_new_key_when_its_session_is_there() -> None:
    plan = plan_of(N1, (OWN, OWN_NEXT), [a_secure_table({"n1": (OWN, OWN_NEXT), "n2": (THEIRS,)})])
    inner = inner_address(THEIRS.public)
    by_old, by_new = (OWN.public, THEIRS.public), (OWN_NEXT.public, THEIRS.public)
    assert chosen(plan, {by_old}).slots == {inner: 0}
    assert chosen(plan, {by_old, by_new}).slots == {inner: 1}


def test_a_handshake_with_the_key_that_a_device_had_before_is_none_with_the_present_one() -> None:
    third = a_pair(21, slot=0)
    plan = plan_of(N1, (OWN_NEXT, third), [a_secure_table({"n1": (OWN_NEXT, third), "n2": (THEIRS,)})])
    sessions = {(OWN.public, THEIRS.public), (OWN_NEXT.public, THEIRS.public)}
    assert chosen(plan, sessions).slots == {inner_address(THEIRS.public): 1}


@given(
    st.sets(
        st.sampled_from(
            [(own.public, peer.public) for own in (OWN, OWN_NEXT) for peer in (THEIRS, THEIRS_NEXT)]
        )
    )
)
def test_while_anything_works_what_is_chosen_works(sessions: set[Session]) -> None:
    plan = plan_of(
        N1, (OWN, OWN_NEXT), [a_secure_table({"n1": (OWN, OWN_NEXT), "n2": (THEIRS, THEIRS_NEXT)})]
    )
    choice = chosen(plan, sessions)
    address = choice.addresses[N2]
    keys = {inner_address(pair.public): pair.public for pair in (THEIRS, THEIRS_NEXT)}
    assert not sessions or (plan.devices[choice.slots[address]].public, keys[address]) in sessions


def test_the_tunnelled_table_has_tunnel_addresses_and_a_port_of_its_own() -> None:
    table = a_secure_table({"n1": (OWN,), "n2": (THEIRS,)})
    inner = tunnelled(table, N1, chosen(plan_of(N1, (OWN,), [table]), ()).addresses)
    assert {id: node.underlay for id, node in inner.nodes.items()} == {
        N1: "::",
        N2: inner_address(THEIRS.public),
    }
    assert inner.head.port == table.head.port + 12


def test_a_bare_device_is_configured_whole_and_then_needs_nothing() -> None:
    device = plan_of(N1, (OWN,), [a_secure_table({"n1": (OWN,), "n2": (THEIRS,)})]).devices[0]
    change = changes(FoundDevice(), device, None)
    assert change == DeviceChange(private=OWN.private, port=4799, put=tuple(device.peers.values()))
    assert not changes(_as_made(device), device, device).is_needed


def test_what_was_changed_by_hand_is_put_right_and_sessions_go_on() -> None:
    device = plan_of(N1, (OWN,), [a_secure_table({"n1": (OWN,), "n2": (THEIRS,), "n3": (THIRD,)})]).devices[0]
    made = _as_made(device)
    other = msgspec.structs.replace(made.peers[THIRD.public], inner=("fd00::1",))
    for found, expected in (
        (
            msgspec.structs.replace(made, peers={**made.peers, THIRD.public: other}),
            DeviceChange(put=(device.peers[THIRD.public],)),
        ),
        (msgspec.structs.replace(made, port=1), DeviceChange(port=4799)),
        (
            msgspec.structs.replace(made, peers={**made.peers, OWN_NEXT.public: FoundPeer()}),
            DeviceChange(removed=(OWN_NEXT.public,)),
        ),
    ):
        assert changes(found, device, device) == expected


def test_an_endpoint_is_set_when_the_node_has_moved() -> None:
    table = a_secure_table({"n1": (OWN,), "n2": (THEIRS,)})
    before = plan_of(N1, (OWN,), [table]).devices[0]
    node = msgspec.structs.replace(table.nodes[N2], underlay="198.51.100.7")
    after = plan_of(N1, (OWN,), [msgspec.structs.replace(table, nodes={**table.nodes, N2: node})]).devices[0]
    assert changes(_as_made(before), after, before).put == (after.peers[THEIRS.public],)


def test_a_device_with_another_key_gets_all_its_peers_anew() -> None:
    """They would go on showing the handshakes that were made with the key before."""
    table = a_secure_table({"n1": (OWN,), "n2": (THEIRS,), "n3": (THIRD,)})
    before, after = (plan_of(N1, (pair,), [table]).devices[0] for pair in (OWN, a_pair(21)))
    change = changes(_as_made(before), after, before)
    assert change.private == after.private
    assert {peer.public for peer in change.put} == {THEIRS.public, THIRD.public}
    assert change.removed == ()


def test_a_packet_of_the_tunnels_mtu_fits_when_it_is_encrypted() -> None:
    assert tunnel_mtu(1500, is_ipv6=False) == 1440
    assert tunnel_mtu(1500, is_ipv6=True) == 1408
    for mtu in range(1300, 9200):
        assert tunnel_mtu(mtu, is_ipv6=False) % 16 == 0
        assert mtu - 16 < tunnel_mtu(mtu, is_ipv6=False) + 60 <= mtu


def test_devices_have_names_that_the_kernel_takes_and_no_two_run_directories_share() -> None:
    assert device_name(DEFAULT_RUN, 0) == "skep-wg0"
    names = {
        device_name(Path(f"/tmp/playground/n{number}/run"), slot) for number in range(9) for slot in (0, 1)
    }
    assert len(names) == 18
    assert all(len(name) <= 15 for name in names)


def _as_made(device: WireGuardDevice) -> FoundDevice:
    return FoundDevice(
        private=device.private,
        port=device.port,
        peers={
            public: FoundPeer(inner=(peer.inner,), keepalive_s=25, has_endpoint=True)
            for public, peer in device.peers.items()
        },
    )
