"""Nodes that come back all at once to managers that cannot take them all at once: none of them is taken for dead."""

from collections.abc import Callable

import pytest

from sim.cluster import SimulatedCluster
from sim.world.committed import Change
from skep.manager.dispatcher.node_sessions import admission
from skep.model.node import Node, NodeState
from skep.model.values.ids import NodeId
from skep.store.interface import Updated, View
from tests.support.builders import a_service_spec


def falls(cluster: SimulatedCluster) -> list[NodeId]:
    """Nodes that are written down as down from now on."""
    found: list[NodeId] = []

    def watch(change: Change, _: View) -> None:
        for event in change.events:
            match event:
                case Updated(Node(), Node() as node) if node.status.state is NodeState.DOWN:
                    found.append(node.id)

    cluster.committed.watchers.append(watch)
    return found


def owner(cluster: SimulatedCluster, id: NodeId) -> NodeId | None:
    session = cluster.view.get(Node, id).session
    return session.manager_id if session is not None else None


def of_one_manager(cluster: SimulatedCluster) -> NodeId:
    """Have all nodes at one manager that does not lead."""
    chosen = next(id for id in cluster.managers if id != cluster.leader)
    cut = cluster.links.cut([id for id in cluster.managers if id != chosen], list(cluster.workers))
    cluster.run_until(lambda: all(owner(cluster, id) == chosen for id in cluster.workers), within_s=60)
    cluster.links.restore(cut)
    cluster.run_until(lambda: all(map(cluster.is_ready, cluster.workers)), within_s=60)
    return chosen


def reconnect(cluster: SimulatedCluster, lost: Callable[[], object]) -> None:
    """``lost``: what happens to the manager that has all sessions."""
    created, down = cluster.created("web"), falls(cluster)
    cluster.raft.latency_s = 0.4  # a registration takes as long
    lost()
    cluster.run_for(45)
    cluster.raft.latency_s = 0.002
    cluster.run_for(20)
    assert down == []
    assert all(map(cluster.is_ready, cluster.workers))
    assert cluster.created("web") == created, "no task moved"
    cluster.check_invariants()


@pytest.mark.parametrize("is_the_leader_reached", [True, False])
def test_nodes_with_a_retry_time_are_not_taken_for_dead(
    monkeypatch: pytest.MonkeyPatch, is_the_leader_reached: bool
) -> None:
    """The others take one in 0.4 s: the last one is in after 8 s or 16 s; the leader waits for 5 s for those it adopts.

    A leader that no node reaches is not crowded itself: the other managers must report that they are.
    """
    monkeypatch.setattr(admission, "AT_ONCE_MAX", 1)
    with SimulatedCluster(managers=3, workers=40) as cluster:
        cluster.create(a_service_spec("web", replicas=40))
        chosen = of_one_manager(cluster)
        cluster.run_until(lambda: cluster.running("web") == 40, within_s=60)
        cluster.run_for(60)  # the usual grace applies again

        def lost() -> None:
            cluster.crash(chosen)
            if not is_the_leader_reached:
                cluster.links.cut([cluster.leader], list(cluster.workers))

        reconnect(cluster, lost)
