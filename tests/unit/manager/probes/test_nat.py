"""The tunnels of nodes behind NAT."""

from collections.abc import Iterable
from ipaddress import IPv4Interface
from itertools import combinations, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.errors import FailedPrecondition
from skep.manager.control.nodes import update_node
from skep.manager.probes.directory import directory_of
from skep.manager.probes.nat import NO_WAY, RELAYS_MAX, TUNNEL, Member, NatPlan, members_of
from skep.model.networks import data_planes
from skep.model.networks.data_planes import (
    DATA_PATH_LABEL,
    LOCAL_ADDRESSES_LABEL,
    NAT_LABEL,
    PATHS_LABEL,
    RELAY_LABEL,
    SEEN_NAT_LABEL,
    TUNNEL_LABEL,
    holder,
    nat_of,
    tunnel_address,
    underlay_of,
)
from skep.model.networks.paths import NatTunnels
from skep.model.networks.wireguard import PublicKey, public_keys_label
from skep.model.node import ManagerStatus, Node, NodeRole, NodeState, NodeStatus
from skep.model.values.ids import NodeId
from skep.store.interface import Transaction
from skep.store.memory import MemoryStore
from tests.support.builders import a_node


def member(number: int, nat: str = "", *, local: bool = True, has_key: bool = True) -> Member:
    id = NodeId(f"n{number}")
    return Member(
        id=id,
        hostname=f"h{number}",
        address=tunnel_address(id) if nat else f"192.0.{number // 250}.{number % 250 + 1}",
        key=PublicKey(number.to_bytes(32, "big"), 4802) if has_key else None,
        nat=nat,
        local=IPv4Interface(f"10.0.0.{number % 250 + 1}/24") if nat and local else None,
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
    engine = replace(node.description.engine, labels={"skep.node": "true", PATHS_LABEL: "1", **labels})
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


def down(node: Node) -> Node:
    return replace(node, status=replace(node.status, state=NodeState.DOWN))


def test_nodes_without_a_usable_address_are_left_out() -> None:
    assert members_of([described("l", "127.0.0.1"), described("six", "fd00::1")]) == ()


def keyed(number: int) -> dict[str, str]:
    return {TUNNEL_LABEL: public_keys_label([PublicKey(number.to_bytes(32, "big"), 4802)])}


def owners(*nodes: Node) -> set[str]:
    return {one.id for one in members_of(nodes) if one.key is not None}


def test_of_nodes_with_one_address_only_the_owner_has_tunnels() -> None:
    """The same rule as in network tables."""
    honest = described("m", "192.0.2.10", created_at="2026-01-02", **keyed(1))
    claimed = {DATA_PATH_LABEL: "192.0.2.10"}
    hostile = described("a", "192.0.2.66", created_at="2026-01-01", **keyed(2), **claimed)
    assert holder([hostile, honest]) == "m"
    assert owners(hostile, honest) == {"m"}
    assert owners(down(honest), hostile) == {"a"}, (
        "a node that is down owns an address that nobody else claims"
    )
    assert owners(down(honest)) == {"m"}


def test_a_node_cannot_report_an_address_inside_the_tunnels() -> None:
    local = {LOCAL_ADDRESSES_LABEL: "10.0.0.5/24"}
    victim = described("v", "203.0.113.9", created_at="2026-01-02", **keyed(1), **local)
    claimed = {DATA_PATH_LABEL: tunnel_address(NodeId("v"))}
    hostile = described("h", "192.0.2.66", created_at="2026-01-01", **keyed(2), **claimed)
    assert underlay_of(hostile) == "192.0.2.66"
    assert owners(victim, hostile) == {"v", "h"}
    seen_inside = described("s", tunnel_address(NodeId("v")))
    assert underlay_of(seen_inside) == ""


def test_of_nodes_with_the_same_address_inside_the_tunnels_the_first_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two ids whose hashes collide."""
    monkeypatch.setattr(data_planes, "tunnel_address", lambda _: "240.0.0.7")
    local = {LOCAL_ADDRESSES_LABEL: "10.0.0.5/24"}
    first = described("z", "203.0.113.9", created_at="2026-01-01", **keyed(1), **local)
    second = described("a", "203.0.113.8", created_at="2026-01-02", **keyed(2), **local)
    assert holder([second, first]) == "z"
    assert owners(second, first) == {"z"}


def test_a_node_that_goes_down_and_comes_back_changes_no_tunnels() -> None:
    local = {LOCAL_ADDRESSES_LABEL: "10.0.0.5/24"}
    nodes = [described(f"m{number}", f"192.0.2.{number}", **keyed(number)) for number in range(1, 13)]
    nodes += [
        described(f"w{number}", f"203.0.113.{number}", **keyed(20 + number), **local) for number in (1, 2)
    ]
    before = NatPlan(members_of(nodes))
    relay = before.relay_of(NodeId("w1"), NodeId("w2"))
    assert relay is not None
    for lost in nodes:
        after = NatPlan(members_of([down(one) if one.id == lost.id else one for one in nodes]))
        changed = {one.id for one in nodes if before.tunnels_for(one.id) != after.tunnels_for(one.id)}
        moved = after.relay_of(NodeId("w1"), NodeId("w2"))
        if lost.id == relay.id:
            assert moved not in (None, relay)
            assert {"w1", "w2"} <= changed
        else:
            assert moved == relay
            assert not changed & {"w1", "w2"}


def test_the_tunnels_of_a_node_are_computed_once_and_share_their_peers() -> None:
    plan = NatPlan(large(3, 5))
    first, second = plan.tunnels_for(NodeId("n0")), plan.tunnels_for(NodeId("n1"))
    assert first is plan.tunnels_for(NodeId("n0"))
    assert first is not None
    assert second is not None
    assert any(one is other for one, other in zip(first.peers, second.peers, strict=True))
    nodes = [described("m", "192.0.2.1", **keyed(1)), described("n", "192.0.2.2", **keyed(2))]
    directory = directory_of(nodes, 4789)
    assert directory_of([*map(down, nodes[:1]), nodes[1]], 4789, directory.nat).nat is not directory.nat
    assert directory_of(nodes, 4789, directory.nat).nat is directory.nat


def test_a_node_without_overlay_networks_is_not_behind_nat_and_does_not_relay() -> None:
    """A rootless node: managers see the address of its machine, and it sees the one of its namespace."""
    label = {LOCAL_ADDRESSES_LABEL: "10.0.2.100/24", **keyed(1)}
    node = described("r", "192.0.2.12", **label)
    labels = {name: value for name, value in node.description.engine.labels.items() if name != PATHS_LABEL}
    engine = replace(node.description.engine, labels=labels)
    node = replace(node, description=replace(node.description, engine=engine))
    assert nat_of(node) == ""
    assert members_of([node]) == ()


def test_neighbors_behind_one_nat_have_private_addresses_in_each_others_subnet() -> None:
    def way(one: str, other: str) -> str:
        labels = ({LOCAL_ADDRESSES_LABEL: one, **keyed(1)}, {LOCAL_ADDRESSES_LABEL: other, **keyed(2)})
        nodes = [described(id, "203.0.113.9", **own) for id, own in zip(("a", "b"), labels, strict=True)]
        return NatPlan(members_of([*nodes, described("m", "192.0.2.1", **keyed(3))])).way(
            NodeId("a"), NodeId("b")
        )

    assert way("10.0.0.5/24", "10.0.0.6/24") == TUNNEL
    for claimed in (
        "10.0.1.6/16",
        "10.0.1.6/24",
        "8.8.8.8/0",
        "10.0.0.6",
        "x/24",
        "10.0.0.6/x",
        "fd00::1/64",
    ):
        assert way("10.0.0.5/24", claimed) == "relay m", claimed


def test_a_nat_that_managers_have_seen_counts_for_every_session() -> None:
    labels = {LOCAL_ADDRESSES_LABEL: "10.0.0.5/24", SEEN_NAT_LABEL: "198.51.100.7", **keyed(1)}
    seen = {
        described("w", addr, **labels).status.addr for addr in ("10.0.0.5", "198.51.100.8", "2001:db8::7")
    }
    underlays = {underlay_of(described("w", addr, **labels)) for addr in seen}
    assert underlays == {tunnel_address(NodeId("w"))}
    assert nat_of(described("w", "198.51.100.8", **labels)) == "198.51.100.8"


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


async def test_a_node_behind_nat_does_not_become_a_manager() -> None:
    store = MemoryStore(SystemClock())
    behind = described("w", "203.0.113.9", **{LOCAL_ADDRESSES_LABEL: "10.0.0.5/24"})

    def join(tx: Transaction) -> None:
        tx.put(behind)

    await store.update(join)

    def promote(tx: Transaction) -> None:
        node = tx.get(Node, "w")
        update_node(tx, node.id, replace(node.spec, role=NodeRole.MANAGER), node.version.index)

    with pytest.raises(
        FailedPrecondition, match=r"is behind NAT \(203\.0\.113\.9\) and cannot manage a cluster"
    ):
        await store.update(promote)
