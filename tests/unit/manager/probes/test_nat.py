"""The tunnels of nodes behind NAT."""

from collections.abc import Iterable
from itertools import combinations, permutations

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.manager.probes.nat import NO_WAY, RELAYS_MAX, TUNNEL, Member, NatPlan, members_of
from skep.model.networks.data_planes import (
    LOCAL_ADDRESSES_LABEL,
    NAT_LABEL,
    RELAY_LABEL,
    TUNNEL_LABEL,
    nat_of,
    tunnel_address,
    underlay_of,
)
from skep.model.networks.paths import NatTunnels
from skep.model.networks.wireguard import PublicKey, public_keys_label
from skep.model.node import ManagerStatus, Node, NodeState, NodeStatus
from skep.model.values.ids import NodeId
from tests.support.builders import a_node


def member(number: int, nat: str = "", *, local: bool = True, has_key: bool = True) -> Member:
    id = NodeId(f"n{number}")
    return Member(
        id=id,
        hostname=f"h{number}",
        address=tunnel_address(id) if nat else f"192.0.{number // 250}.{number % 250 + 1}",
        key=PublicKey(number.to_bytes(32, "big"), 4802) if has_key else None,
        nat=nat,
        local=f"10.0.0.{number % 250 + 1}" if nat and local else "",
    )


MEMBERS = st.lists(
    st.tuples(st.sampled_from(["", "", "a", "b", "c"]), st.booleans(), st.booleans()), min_size=2, max_size=12
).map(lambda drawn: [member(i, nat, local=local, has_key=key) for i, (nat, local, key) in enumerate(drawn)])


def journey(plan: NatPlan, members: dict[NodeId, Member], a: Member, b: Member) -> list[NodeId] | None:
    """Return the nodes that a packet from ``a`` to ``b`` passes, or None if one of them drops it."""
    at, passed = a.id, [a.id]
    while at != b.id:
        tunnels = plan.tunnels_for(at)
        peers = [one for one in tunnels.peers if b.address in one.addresses] if tunnels else []
        assert len(peers) <= 1, "WireGuard gives an address to one peer only"
        if not peers:
            return None
        before, at = at, peers[0].node_id
        passed.append(at)
        assert len(passed) <= 4, "in circles"
        theirs = plan.tunnels_for(at)
        assert theirs is not None
        accepted = [one.node_id for one in theirs.peers if a.address in one.addresses]
        if accepted != [before]:  # WireGuard accepts a source address from one peer only
            return None
        assert peers[0].endpoint or members[at].nat, "a node that others reach has an endpoint"
        if at != b.id and not {a.address, b.address} <= set(theirs.relayed):
            return None
    return passed


@given(MEMBERS)
def test_each_pair_has_exactly_one_way_that_its_packets_take(members: list[Member]) -> None:
    plan, by_id = NatPlan(members), {one.id: one for one in members}
    for a, b in permutations(members, 2):
        way = plan.way(a.id, b.id)
        assert way == plan.way(b.id, a.id)
        if not (a.nat or b.nat):
            assert way == ""
            continue
        passed = journey(plan, by_id, a, b) if a.key and b.key else None
        if way == NO_WAY:
            assert passed is None
            continue
        assert passed is not None
        assert passed[0] == a.id
        assert passed[-1] == b.id
        between = passed[1:-1]
        assert way == (f"relay {by_id[between[0]].hostname}" if between else TUNNEL)
        assert len(between) <= 1
        assert not any(by_id[one].nat for one in between)


@given(MEMBERS)
def test_a_tunnel_is_planned_at_both_ends_and_one_end_can_begin(members: list[Member]) -> None:
    plan = NatPlan(members)
    ends = {
        (one.id, peer.node_id): peer
        for one in members
        for tunnels in [plan.tunnels_for(one.id)]
        if tunnels is not None
        for peer in tunnels.peers
    }
    for (a, b), peer in ends.items():
        assert (b, a) in ends
        assert peer.endpoint or ends[b, a].endpoint


@given(MEMBERS)
def test_nodes_without_a_way_lack_a_key_or_a_relay(members: list[Member]) -> None:
    plan = NatPlan(members)
    can_relay = any(one.key and not one.nat for one in members)
    for a, b in combinations(members, 2):
        if plan.way(a.id, b.id) == NO_WAY:
            assert not (a.key and b.key) or (a.nat and b.nat and not can_relay)


def test_without_nodes_behind_nat_there_are_no_tunnels() -> None:
    assert NatPlan([member(1), member(2)]).tunnels_for(NodeId("n1")) is None
    assert NatPlan([member(1), member(2, "a", has_key=False)]).tunnels_for(NodeId("n1")) is None


def large(nats: int, reachable: int) -> list[Member]:
    return [member(i, f"nat{i}" if i < nats else "") for i in range(nats + reachable)]


def relays(plan: NatPlan, members: Iterable[Member]) -> dict[tuple[NodeId, NodeId], NodeId]:
    behind = [one.id for one in members if one.nat]
    return {(a, b): found.id for a, b in combinations(behind, 2) if (found := plan.relay_of(a, b))}


def test_a_lost_relay_moves_its_own_pairs_only() -> None:
    members = large(60, 6)
    before = relays(NatPlan(members), members)
    assert len(set(before.values())) == 6, "the pairs are spread over all"
    lost = before[NodeId("n0"), NodeId("n1")]
    after = relays(NatPlan(one for one in members if one.id != lost), members)
    assert {pair for pair in before if before[pair] != after[pair]} == {
        pair for pair, relay in before.items() if relay == lost
    }


def test_a_node_that_joins_changes_the_tunnels_of_others_by_one_peer() -> None:
    members = large(40, RELAYS_MAX + 4)
    before, after = NatPlan(members), NatPlan([*members, member(999, "nat999")])
    for one in members:
        old, new = before.tunnels_for(one.id), after.tunnels_for(one.id)
        assert old is not None
        assert new is not None
        assert sum(peer not in old.peers for peer in new.peers) == 1, "a relay's addresses, or the new node"


def test_a_thousand_nodes_are_planned() -> None:
    """Bounded by counts and not by time: a node has one peer for each node that others reach."""
    members = large(500, 500)
    plan = NatPlan(members)
    found = plan.tunnels_for(NodeId("n0"))
    assert found is not None
    assert len(found.peers) == 500
    assert sum(map(len, (peer.addresses for peer in found.peers))) == 500 + 499
    assert sum(len(peer.addresses) > 1 for peer in found.peers) <= RELAYS_MAX


def test_the_label_chooses_relays() -> None:
    members = [member(0, "a"), member(1, "b"), *map(member, range(2, 6))]
    never = [replace(one, relays=False) if not one.nat else one for one in members]
    assert NatPlan(never).way(NodeId("n0"), NodeId("n1")) == NO_WAY
    for chosen in range(2, 6):
        some = [replace(one, relays=True) if one.id == f"n{chosen}" else one for one in members]
        assert NatPlan(some).way(NodeId("n0"), NodeId("n1")) == f"relay h{chosen}"


# -- facts ---------------------------------------------------------------------------------------------------------


def described(id: str, addr: str, *, created_at: str = "", **labels: str) -> Node:
    node = a_node(id)
    engine = replace(node.description.engine, labels={"skep.node": "true", **labels})
    return replace(
        node,
        description=replace(node.description, engine=engine),
        status=NodeStatus(state=NodeState.READY, addr=addr),
        created_at=created_at,
    )


KEY = public_keys_label([PublicKey(bytes(32), 4802)])


def test_a_worker_is_behind_nat_if_it_connects_from_an_address_that_it_does_not_have() -> None:
    local = {LOCAL_ADDRESSES_LABEL: "10.0.0.5,192.168.1.2"}
    assert nat_of(described("w", "203.0.113.9", **local)) == "203.0.113.9"
    assert nat_of(described("w", "192.168.1.2", **local)) == ""
    assert nat_of(described("w", "203.0.113.9")) == "", "an earlier version says nothing"
    assert nat_of(described("w", "127.0.0.1", **local)) == ""
    assert nat_of(described("w", "fd00::9", **local)) == "", "tunnels have IPv4 addresses only"
    manager = replace(described("m", "203.0.113.9", **local), manager_status=ManagerStatus())
    assert nat_of(manager) == ""


def test_the_configured_nat_counts_more_than_addresses() -> None:
    local = {LOCAL_ADDRESSES_LABEL: "10.0.0.5"}
    assert nat_of(described("w", "203.0.113.9", **local, **{NAT_LABEL: "no"})) == ""
    assert nat_of(described("w", "203.0.113.9", **local, **{NAT_LABEL: "office"})) == "office"
    assert nat_of(described("w", "10.0.0.5", **local, **{NAT_LABEL: "office"})) == "office"
    explicit = {"skep.data-path-addr": "203.0.113.9"}
    assert nat_of(described("w", "203.0.113.9", **local, **explicit)) == ""


def test_a_node_behind_nat_has_an_address_inside_the_tunnels_if_it_can_have_tunnels() -> None:
    local = {LOCAL_ADDRESSES_LABEL: "10.0.0.5"}
    assert underlay_of(described("w", "203.0.113.9", **local)) == "203.0.113.9"
    tunnelled = underlay_of(described("w", "203.0.113.9", **local, **{TUNNEL_LABEL: KEY}))
    assert tunnelled == tunnel_address(NodeId("w"))
    assert 240 <= int(tunnelled.split(".")[0]) < 255


def test_a_key_that_two_nodes_publish_is_the_one_of_the_first() -> None:
    nodes = [
        described("thief", "192.0.2.2", created_at="2026-02-01", **{TUNNEL_LABEL: KEY}),
        described("owner", "192.0.2.1", created_at="2026-01-01", **{TUNNEL_LABEL: KEY}),
    ]
    assert {one.id for one in members_of(nodes) if one.key is not None} == {"owner"}


def test_nodes_that_are_down_or_have_no_usable_address_are_left_out() -> None:
    down = replace(described("w", "192.0.2.1"), status=NodeStatus(state=NodeState.DOWN, addr="192.0.2.1"))
    assert members_of([down, described("l", "127.0.0.1"), described("six", "fd00::1")]) == ()


def test_the_label_of_a_node_says_whether_it_relays() -> None:
    def relays_of(word: str) -> bool | None:
        node = described("w", "192.0.2.1")
        (found,) = members_of([replace(node, spec=replace(node.spec, labels={RELAY_LABEL: word}))])
        return found.relays

    assert [relays_of(word) for word in ("true", "false", "")] == [True, False, None]


def test_the_tunnels_of_a_node_that_others_reach_have_no_endpoints() -> None:
    plan = NatPlan([member(0, "a"), member(1, "b"), member(2)])
    found = plan.tunnels_for(NodeId("n2"))
    assert isinstance(found, NatTunnels)
    assert not found.is_behind_nat
    assert [peer.endpoint for peer in found.peers] == ["", ""]
    assert found.relayed == tuple(peer.addresses[0] for peer in found.peers)
