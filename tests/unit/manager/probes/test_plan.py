"""The peers that each node probes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skep.manager.probes.plan import ALL_PAIRS_MAX, NEIGHBORS, PEERS_MAX, ProbePlan
from skep.model.values.ids import NetworkId, NodeId


def nodes(count: int) -> list[NodeId]:
    return [NodeId(f"n{number}") for number in range(count)]


@pytest.mark.parametrize("count", [1, 2, ALL_PAIRS_MAX])
def test_in_a_small_cluster_every_node_probes_every_other(count: int) -> None:
    plan = ProbePlan(nodes(count), {})
    for id in nodes(count):
        assert set(plan.peers(id)) == set(nodes(count)) - {id}


def test_a_node_without_probes_has_no_peers() -> None:
    assert ProbePlan(nodes(3), {}).peers(NodeId("stranger")) == ()
    assert ProbePlan(nodes(100), {}).peers(NodeId("stranger")) == ()


@given(
    count=st.integers(ALL_PAIRS_MAX + 1, 150),
    networks=st.dictionaries(st.integers(0, 149), st.sets(st.integers(0, 12), max_size=12)),
)
def test_pairs_are_the_same_from_both_ends_and_no_node_has_too_many(
    count: int, networks: dict[int, set[int]]
) -> None:
    known = {NodeId(f"n{node}"): [NetworkId(f"net{one}") for one in on] for node, on in networks.items()}
    plan = ProbePlan(nodes(count), known)
    peers = {id: plan.peers(id) for id in nodes(count)}
    for id, theirs in peers.items():
        assert id not in theirs
        assert 2 * NEIGHBORS <= len(theirs) <= PEERS_MAX
        assert all(id in peers[other] for other in theirs)


def test_nodes_that_share_a_small_network_probe_each_other_however_large_the_cluster() -> None:
    three = [NodeId("n7"), NodeId("n700"), NodeId("n1400")]
    plan = ProbePlan(nodes(2000), {id: [NetworkId("backend")] for id in three})
    for id in three:
        assert set(three) - {id} <= set(plan.peers(id))


def test_a_node_that_joins_changes_the_peers_of_few() -> None:
    before, after = ProbePlan(nodes(1000), {}), ProbePlan(nodes(1001), {})
    changed = [id for id in nodes(1000) if before.peers(id) != after.peers(id)]
    assert len(changed) == 2 * NEIGHBORS


def test_all_managers_work_out_the_same() -> None:
    assert ProbePlan(nodes(60), {}).peers(NodeId("n1")) == ProbePlan(reversed(nodes(60)), {}).peers(
        NodeId("n1")
    )


def test_the_whole_cluster_hangs_together() -> None:
    """A node that is cut off from one half has a peer in it."""
    plan = ProbePlan(nodes(500), {})
    seen, wave = {NodeId("n0")}, [NodeId("n0")]
    while wave:
        wave = [peer for id in wave for peer in plan.peers(id) if peer not in seen]
        seen.update(wave)
    assert len(seen) == 500
