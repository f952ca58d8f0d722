"""A node's end of the tunnels through NAT."""

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.dataplane.netns.diff import difference
from skep.dataplane.netns.kernel_made import completed
from skep.dataplane.netns.state import Address, Link, NamespaceState, Route, RoutingRule
from skep.dataplane.plan.nat import (
    ADDRESSES_MAX,
    condition,
    port_towards,
    sound,
    tunnel_device,
    tunnel_filter,
    tunnel_state,
)
from skep.dataplane.plan.wireguard import FoundDevice, FoundPeer, WireGuardKey, changes
from skep.model.networks.paths import NatPeer, NatTunnels
from skep.model.values.ids import NodeId

LINK = Link(name="wg3", kind="tun", mtu=1440)
PORTS = (("tcp", 2374), ("udp", 4789))
PAIR = WireGuardKey(private=bytes(range(32)), slot=3, made_at=0.0)


def a_peer(number: int, *addresses: str, endpoint: str = "") -> NatPeer:
    return NatPeer(
        node_id=NodeId(f"n{number}"),
        key=number.to_bytes(32, "big"),
        port=4802,
        endpoint=endpoint,
        addresses=addresses,
    )


BEHIND = NatTunnels(
    address="240.0.0.1",
    is_behind_nat=True,
    peers=(
        a_peer(1, "192.0.2.1", "240.0.0.9", endpoint="192.0.2.1"),
        a_peer(2, "192.0.2.2", endpoint="192.0.2.2"),
    ),
)
OPEN = NatTunnels(
    address="192.0.2.1",
    peers=(a_peer(3, "240.0.0.1"), a_peer(4, "240.0.0.9")),
    relayed=("240.0.0.1", "240.0.0.9"),
)


def test_a_node_behind_nat_sends_everything_from_its_address_into_the_tunnels() -> None:
    state = tunnel_state(BEHIND, LINK)
    assert state.addresses == {Address("wg3", "240.0.0.1/32")}
    assert state.rules == {RoutingRule(4, 1043, 1043, source="240.0.0.1")}
    assert Route("wg3", "0.0.0.0/0", table=1043) in state.routes
    assert state.sysctls["net/ipv4/conf/wg3/forwarding"] == "0"


def test_a_node_that_others_reach_has_a_route_and_sends_from_its_own_address() -> None:
    state = tunnel_state(OPEN, LINK)
    assert not state.addresses
    assert not state.rules
    assert state.routes == {Route("wg3", "240.0.0.0/4", source="192.0.2.1")}
    assert state.sysctls["net/ipv4/conf/wg3/forwarding"] == "1"


def test_a_node_without_its_address_has_it_in_the_tunnels() -> None:
    """Its address is translated outside of the machine, and routes need a source address that the machine has."""
    state = tunnel_state(OPEN, LINK, has_address=False)
    assert state.addresses == {Address("wg3", "192.0.2.1/32")}
    assert state.routes == tunnel_state(OPEN, LINK).routes


def test_from_the_tunnels_only_the_ports_of_the_cluster_are_reached() -> None:
    table = tunnel_filter(BEHIND, "wg3", PORTS)
    here = [rule.removeprefix('iifname "wg3" ') for chain, rule in table.rules if chain == "here"]
    assert here[0] == "ip daddr != 240.0.0.1 drop"
    assert here[-1] == "drop"
    assert here[3:-1] == ["tcp dport 2374 accept", "udp dport 4789 accept"]


def test_the_port_towards_a_node_is_the_one_of_the_node_that_others_reach() -> None:
    """Of the relay, for a node behind another NAT."""
    first, second = BEHIND.peers
    tunnels = replace(BEHIND, peers=(replace(first, port=51823), second))
    ports = [port_towards(tunnels, one, 4802) for one in ("192.0.2.1", "240.0.0.9", "192.0.2.2")]
    assert ports == [51823, 51823, 4802]
    assert port_towards(OPEN, "240.0.0.9", 51823) == 51823


def test_what_exceeds_the_bounds_is_named() -> None:
    assert condition(None) == condition(sound(BEHIND)) == ""
    addresses = tuple(f"240.1.{number >> 8}.{number & 255}" for number in range(ADDRESSES_MAX + 6))
    peers = (a_peer(1, "192.0.2.1", *addresses, endpoint="192.0.2.1"),)
    assert "leave out 7 nodes" in condition(sound(replace(BEHIND, peers=peers)))
    many = tuple(
        a_peer(number, f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}") for number in range(1, 8200)
    )
    assert "leave out 7 nodes" in condition(sound(replace(BEHIND, peers=many)))


def test_relays_pass_on_packets_of_nodes_behind_nat_only() -> None:
    table = tunnel_filter(OPEN, "wg3", PORTS)
    assert table.elements == {("relayed", "240.0.0.1"), ("relayed", "240.0.0.9")}
    assert tunnel_filter(replace(OPEN, relayed=()), "wg3", PORTS).elements == frozenset()
    through = [rule for chain, rule in table.rules if chain == "through"]
    assert through[0].endswith("accept")
    assert all(rule.endswith("drop") for rule in through[1:])


def test_a_relay_that_moves_changes_two_peers() -> None:
    before = tunnel_device(BEHIND, PAIR, 4802)
    first, second = BEHIND.peers
    moved = replace(
        BEHIND,
        peers=(
            replace(first, addresses=first.addresses[:1]),
            replace(second, addresses=(*second.addresses, "240.0.0.9")),
        ),
    )
    found = FoundDevice(
        private=PAIR.private,
        port=4802,
        peers={
            key: FoundPeer(inner=peer.allowed, keepalive_s=25, has_endpoint=True)
            for key, peer in before.peers.items()
        },
    )
    assert not changes(found, before, before).is_needed
    change = changes(found, tunnel_device(moved, PAIR, 4802), before)
    assert [peer.allowed for peer in change.put] == [("192.0.2.1",), ("192.0.2.2", "240.0.0.9")]
    assert not change.removed


def test_a_peer_behind_nat_stays_without_an_endpoint_until_it_sends() -> None:
    device = tunnel_device(OPEN, PAIR, 4802)
    silent = {key: FoundPeer(inner=peer.allowed, keepalive_s=25) for key, peer in device.peers.items()}
    assert not changes(FoundDevice(private=PAIR.private, port=4802, peers=silent), device, device).is_needed


def test_the_state_is_complete_after_one_application() -> None:
    for tunnels in (BEHIND, OPEN):
        wanted = completed(tunnel_state(tunnels, LINK))
        assert difference(wanted, wanted) == []
        assert difference(wanted, NamespaceState()) != []


# -- what managers send is not trusted --------------------------------------------------------------------------------

WORDS = st.sampled_from(
    [
        "240.0.0.1",
        "240.0.0.2",
        "192.0.2.1",
        "192.0.2.2",
        "127.0.0.1",
        "fd00::1",
        "224.0.0.1",
        "x",
        "",
        "0.0.0.0",
    ]
)
PEERS = st.builds(
    NatPeer,
    node_id=st.just(NodeId("n")),
    key=st.sampled_from([b"", bytes(32), b"k" * 32]),
    port=st.integers(-1, 70_000),
    endpoint=WORDS,
    addresses=st.lists(WORDS, max_size=4).map(tuple),
)


@given(
    st.builds(
        NatTunnels,
        address=WORDS,
        is_behind_nat=st.booleans(),
        peers=st.lists(PEERS, max_size=4).map(tuple),
        relayed=st.lists(WORDS, max_size=3).map(tuple),
    )
)
def test_whatever_is_sent_a_sound_device_is_made(sent: NatTunnels) -> None:
    tunnels = sound(sent)
    if tunnels is None:
        return
    addresses = [address for peer in tunnels.peers for address in peer.addresses]
    assert len(set(addresses)) == len(addresses), "an address belongs to one peer"
    assert tunnels.address not in addresses
    assert all(one.startswith(("240.", "192.")) for one in (*addresses, tunnels.address))
    assert tunnels.is_behind_nat == tunnels.address.startswith("240.")
    assert all(one.startswith("240.") for one in tunnels.relayed)
    assert all(0 < peer.port < 1 << 16 and len(peer.key) == 32 for peer in tunnels.peers)
    assert sound(tunnels) == tunnels


def test_the_addresses_of_a_peer_fit_into_one_message() -> None:
    many = tuple(f"240.1.{number // 250}.{number % 250 + 1}" for number in range(ADDRESSES_MAX + 100))
    found = sound(replace(BEHIND, peers=(a_peer(1, "192.0.2.1", *many, endpoint="192.0.2.1"),)))
    assert found is not None
    assert len(found.peers[0].addresses) == ADDRESSES_MAX
