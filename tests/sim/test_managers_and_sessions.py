"""Managers that die, and the sessions they held: nodes move on, and the dead ones among them are still found."""

from collections import Counter

import pytest

from sim.cluster import SimulatedCluster
from sim.faults.targeted_faults import hang_manager
from skep.manager.nodes.heartbeats import RECOVERY_GRACE_S
from skep.model.node import Node, NodeState
from skep.model.service import RestartPolicy
from skep.model.task import TaskState
from skep.model.values.ids import NodeId
from skep.model.values.times import SECOND_NS
from tests.support.builders import a_service_spec

SEEDS = range(3)
ELECTION_S = 2.5
"""A manager that dies may have led: no node registers until there is a new leader, and nodes retry with backoff."""


def session_owner(cluster: SimulatedCluster, node: NodeId) -> NodeId:
    session = cluster.view.get(Node, node).session
    assert session is not None
    return session.manager_id


@pytest.mark.parametrize("seed", SEEDS)
def test_nodes_of_a_dead_manager_are_with_another_one_within_a_heartbeat(seed: int) -> None:
    with SimulatedCluster(managers=3, workers=6, seed=seed) as cluster:
        cluster.create(a_service_spec("web", replicas=12))
        cluster.run_until(lambda: cluster.running("web") == 12, within_s=5)
        dead = session_owner(cluster, NodeId("w1"))
        has_to_elect = dead == cluster.leader
        cluster.crash(dead)
        cluster.run_until(
            lambda: all(session_owner(cluster, id) != dead for id in cluster.workers),
            within_s=1.0 + (ELECTION_S if has_to_elect else 0.0),
        )
        cluster.run_for(20)
        assert all(cluster.is_ready(id) for id in cluster.workers)
        assert cluster.created("web") == 12
        cluster.check_invariants()


@pytest.mark.parametrize("seed", SEEDS)
def test_sessions_that_crowd_at_one_manager_spread_and_nothing_is_noticed(seed: int) -> None:
    with SimulatedCluster(managers=3, workers=9, seed=seed) as cluster:
        cluster.create(a_service_spec("web", replicas=18))
        cluster.run_until(lambda: cluster.running("web") == 18, within_s=5)
        crowded, *others = cluster.managers
        cut = cluster.links.cut(others, list(cluster.workers))
        cluster.run_until(
            lambda: all(session_owner(cluster, id) == crowded for id in cluster.workers), within_s=30
        )
        cluster.run_for(15)  # tasks of nodes that reconnected too late have been replaced
        cluster.run_until(lambda: cluster.running("web") == 18, within_s=10)
        tasks, created = {task.id for task in cluster.wanted("web")}, cluster.created("web")
        cluster.links.restore(cut)
        cluster.run_until(lambda: sessions_of(cluster) == dict.fromkeys(cluster.managers, 3), within_s=300)
        assert all(cluster.is_ready(id) for id in cluster.workers)
        assert {task.id for task in cluster.wanted("web")} == tasks
        owners = {id: session_owner(cluster, id) for id in cluster.workers}
        cluster.run_for(120)
        assert {id: session_owner(cluster, id) for id in cluster.workers} == owners, "then all stay"
        assert all(cluster.is_ready(id) for id in cluster.workers)
        assert cluster.created("web") == created
        cluster.check_invariants()


def sessions_of(cluster: SimulatedCluster) -> Counter[NodeId]:
    return Counter(session_owner(cluster, id) for id in cluster.workers)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_node_that_dies_with_its_manager_is_judged_by_the_leader(seed: int) -> None:
    """Its session has no other owner: the leader adopts it after 2 s of silence, and gives it three periods."""
    with SimulatedCluster(managers=3, workers=5, seed=seed) as cluster:
        cluster.create(a_service_spec("web", replicas=10))
        cluster.run_until(lambda: cluster.running("web") == 10, within_s=5)
        cluster.run_for(RECOVERY_GRACE_S)  # managers that have just started are more patient
        dead = session_owner(cluster, NodeId("w1"))
        cluster.crash(dead)
        cluster.kill_node(NodeId("w1"))
        took_s = cluster.run_until(lambda: not cluster.is_ready(NodeId("w1")), within_s=10)
        assert 2.0 + 3.0 - 0.5 < took_s < 2.0 + 3.0 + 1.0 + ELECTION_S
        assert session_owner(cluster, NodeId("w1")) == cluster.leader
        others = [id for id in cluster.workers if id != "w1"]
        assert all(cluster.is_ready(id) for id in others)
        cluster.run_until(lambda: cluster.created("web") == 12, within_s=10)
        cluster.run_until(lambda: cluster.running("web") == 10, within_s=10)
        cluster.run_for(5)
        assert cluster.created("web") == 12
        cluster.check_invariants()


def test_a_dead_node_of_a_living_manager_is_found_in_less_than_four_seconds() -> None:
    with SimulatedCluster(managers=3, workers=5) as cluster:
        cluster.kill_node(NodeId("w1"))
        assert cluster.run_until(lambda: not cluster.is_ready(NodeId("w1")), within_s=10) < 4.0
        assert cluster.view.get(Node, NodeId("w1")).status.state is NodeState.DOWN


@pytest.mark.parametrize("seed", SEEDS)
def test_the_end_of_every_node_process_moves_nothing_if_they_are_back_in_time(seed: int) -> None:
    with SimulatedCluster(managers=3, workers=4, seed=seed) as cluster:
        cluster.create(a_service_spec("web", replicas=8))
        cluster.run_until(lambda: cluster.running("web") == 8, within_s=5)
        for id in cluster.workers:
            cluster.kill_node(id, keeps_containers=True)
            cluster.run_for(cluster.random.uniform(0.1, 1.5))
            cluster.start_node(id)
        cluster.run_for(15)
        assert cluster.created("web") == 8
        assert cluster.containers("web") == 8
        cluster.check_invariants()


@pytest.mark.parametrize("seed", SEEDS)
def test_an_outage_of_all_managers_moves_nothing(seed: int) -> None:
    with SimulatedCluster(managers=3, workers=4, seed=seed) as cluster:
        cluster.create(a_service_spec("web", replicas=8))
        cluster.run_until(lambda: cluster.running("web") == 8, within_s=5)
        for id in cluster.managers:
            cluster.crash(id)
        cluster.run_for(600)
        assert cluster.containers("web") == 8
        for id in cluster.managers:
            cluster.start_manager(id)
        cluster.run_for(30)
        assert all(cluster.is_ready(id) for id in cluster.workers)
        assert cluster.running("web") == 8
        assert cluster.created("web") == 8
        cluster.check_invariants()


@pytest.mark.parametrize("seed", SEEDS)
def test_without_managers_a_failed_container_is_started_again_as_the_same_task(seed: int) -> None:
    with SimulatedCluster(managers=3, workers=3, seed=seed) as cluster:
        cluster.create(a_service_spec("web", replicas=3, restart=RestartPolicy(delay=2 * SECOND_NS)))
        cluster.run_until(lambda: cluster.running("web") == 3, within_s=5)
        tasks = {task.id for task in cluster.wanted("web")}
        for id in cluster.managers:
            cluster.crash(id)
        cluster.run_for(60)
        victim = cluster.random.choice(cluster.wanted("web"))
        cluster.kill_container(victim)
        assert cluster.containers("web") == 2
        assert 2 <= cluster.run_until(lambda: cluster.containers("web") == 3, within_s=10) < 4
        for id in cluster.managers:
            cluster.start_manager(id)
        cluster.run_for(30)
        assert {task.id for task in cluster.wanted("web")} == tasks
        assert cluster.created("web") == 3
        status = next(task.status for task in cluster.wanted("web") if task.id == victim.id)
        assert status.message == "started again without a manager (attempt 1)"
        cluster.check_invariants()


def test_without_managers_a_task_has_failed_when_its_policy_gives_up() -> None:
    with SimulatedCluster(managers=1, workers=1) as cluster:
        cluster.create(a_service_spec("web", restart=RestartPolicy(delay=SECOND_NS, max_attempts=2)))
        cluster.run_until(lambda: cluster.running("web") == 1, within_s=5)
        (task,) = cluster.wanted("web")
        cluster.crash(cluster.managers[0])
        cluster.run_for(1)
        for _ in range(3):
            cluster.run_until(lambda: cluster.containers("web") == 1, within_s=20)
            cluster.kill_container(task)
        cluster.run_for(100)
        assert cluster.containers("web") == 0
        cluster.start_manager(cluster.managers[0])
        cluster.run_until(lambda: cluster.created("web") == 2 and cluster.running("web") == 1, within_s=30)
        failed = next(one for one in cluster.tasks("web") if one.id == task.id)
        assert failed.status.state is TaskState.FAILED
        cluster.check_invariants()


def test_a_container_that_fails_while_managers_are_only_away_for_a_moment_is_replaced_by_them() -> None:
    with SimulatedCluster(managers=1, workers=1) as cluster:
        cluster.create(a_service_spec("web", restart=RestartPolicy(delay=0)))
        cluster.run_until(lambda: cluster.running("web") == 1, within_s=5)
        (task,) = cluster.wanted("web")
        cluster.crash(cluster.managers[0])
        cluster.run_for(1)
        cluster.kill_container(task)
        cluster.run_for(3)
        cluster.start_manager(cluster.managers[0])
        cluster.run_until(lambda: cluster.created("web") == 2 and cluster.running("web") == 1, within_s=20)
        cluster.check_invariants()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_leader_that_hangs_beside_its_living_member_is_replaced_within_seconds(seed: int) -> None:
    with SimulatedCluster(managers=3, workers=3, seed=seed) as cluster:
        cluster.create(a_service_spec("web", replicas=3))
        cluster.run_until(lambda: cluster.running("web") == 3, within_s=5)
        cluster.run_for(5)
        hung = cluster.leader
        hang_manager(cluster, hung)
        cluster.create(a_service_spec("other", replicas=3))
        cluster.run_until(lambda: cluster.running("other") == 3, within_s=10)
        cluster.run_for(30)
        assert hung in cluster.running_managers, "it is back"
        assert cluster.created("web") == cluster.created("other") == 3
        cluster.check_invariants()
