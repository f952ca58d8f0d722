"""Nodes that are cut off: what keeps its place, what is replaced, what stops; and storms, in which nothing is."""

from collections.abc import Iterable

import pytest
from msgspec.structs import replace

from sim.cluster import SimulatedCluster
from skep.agent.executor.simulated import Behavior
from skep.manager.control import swarm as control
from skep.manager.control.tasks import known_status
from skep.manager.nodes.heartbeats import RECOVERY_GRACE_S
from skep.manager.orchestrator.replacement.disruption import READY_BEFORE_S
from skep.model.node import Node
from skep.model.service import RestartPolicy, ServiceSpec
from skep.model.swarm import Freeze, Swarm
from skep.model.task import TaskState
from skep.model.values.ids import NodeId
from skep.model.values.times import timestamp
from tests.support.builders import a_service_spec

SEEDS = range(2)
STAMP = timestamp(1_700_000_000_000_000_000)
REPLICAS = 6
ADOPTED_LEASE_S = 6.0
"""Two seconds of silence of the manager, three heartbeats of the node, and the writes."""
LOST = NodeId("w2")


def a_spec(**labels: str) -> ServiceSpec:
    spec = a_service_spec("web", replicas=REPLICAS, restart=RestartPolicy(delay=0))
    return replace(spec, labels={f"skep.{name.replace('_', '-')}": value for name, value in labels.items()})


def cut_off(cluster: SimulatedCluster, nodes: Iterable[NodeId]) -> frozenset[tuple[str, str]]:
    return cluster.links.cut(list(nodes), list(cluster.managers))


def restore(cluster: SimulatedCluster, cut: frozenset[tuple[str, str]]) -> None:
    cluster.loop.call_soon(cluster.links.restore, cut)
    cluster.run_for(0.001)


def freeze_of(cluster: SimulatedCluster) -> Freeze | None:
    (swarm,) = cluster.view.find(Swarm)
    return swarm.freeze


def settle(cluster: SimulatedCluster, spec: ServiceSpec) -> None:
    cluster.create(spec)
    cluster.run_until(lambda: cluster.running("web") == REPLICAS, within_s=10)


def most_containers(cluster: SimulatedCluster, seconds: float) -> int:
    """Let time pass; the largest number of containers that ran at one time."""
    most = cluster.containers("web")
    for _ in range(round(seconds / 0.25)):
        cluster.run_for(0.25)
        most = max(most, cluster.containers("web"))
    return most


@pytest.mark.parametrize(
    ("labels", "cut_s", "replaced", "doubled"),
    [
        pytest.param({}, 20, True, True, id="20s-by-default"),
        pytest.param({"on_disconnect_delay": "30s"}, 20, False, False, id="20s-replace-after-30s"),
        pytest.param({"on_disconnect_delay": "30s"}, 60, True, True, id="60s-replace-after-30s"),
        pytest.param({"on_disconnect": "keep"}, 20, False, False, id="20s-keep"),
        pytest.param({"on_disconnect": "keep"}, 60, False, False, id="60s-keep"),
        pytest.param({"on_disconnect": "keep"}, 600, False, False, id="10min-keep"),
        pytest.param({"on_disconnect": "stop"}, 20, False, False, id="20s-stop-after-30s"),
        pytest.param({"on_disconnect": "stop"}, 60, True, False, id="60s-stop-after-30s"),
        pytest.param(
            {"on_disconnect": "stop", "on_disconnect_delay": "5m"}, 60, False, False, id="60s-stop-after-5m"
        ),
        pytest.param(
            {"on_disconnect": "stop", "on_disconnect_delay": "5m"}, 600, True, False, id="10min-stop-after-5m"
        ),
        pytest.param({"on_disconnect_delay": "30s"}, 600, True, True, id="10min-replace-after-30s"),
    ],
)
@pytest.mark.parametrize("seed", range(1))
def test_a_partition_ends_as_the_service_says(
    seed: int, labels: dict[str, str], cut_s: float, replaced: bool, doubled: bool
) -> None:
    """``doubled``: while the way is cut its own containers run on beside their successors, as was asked for."""
    with SimulatedCluster(managers=3, workers=3, seed=seed) as cluster:
        settle(cluster, a_spec(**labels))
        before = {task.id for task in cluster.wanted("web")}
        lost = {task.id for task in cluster.wanted("web") if task.node_id == LOST}
        assert lost
        cut = cut_off(cluster, [LOST])
        most = most_containers(cluster, cut_s)
        assert not cluster.is_ready(LOST)
        assert (most > REPLICAS) is doubled
        restore(cluster, cut)
        cluster.run_until(lambda: cluster.is_ready(LOST), within_s=15)
        cluster.run_until(
            lambda: cluster.containers("web") == cluster.running("web") == REPLICAS, within_s=20
        )
        cluster.run_for(10)
        now = {task.id for task in cluster.wanted("web")}
        assert before - now == (lost if replaced else set())
        assert cluster.created("web") == REPLICAS + (len(lost) if replaced else 0)
        cluster.check_invariants()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_node_process_started_while_cut_off_stops_its_tasks_as_early_as_any(seed: int) -> None:
    with SimulatedCluster(managers=3, workers=3, seed=seed) as cluster:
        settle(cluster, a_spec(on_disconnect="stop"))
        cut_off(cluster, [LOST])
        cluster.run_for(20)
        cluster.kill_node(LOST, keeps_containers=True)
        cluster.run_for(5)
        assert cluster.nodes[LOST].containers
        cluster.start_node(LOST)
        most = most_containers(cluster, 60)
        assert not cluster.nodes[LOST].containers
        assert most == REPLICAS, "no task ran twice"
        assert cluster.running("web") == REPLICAS


@pytest.mark.parametrize("seed", SEEDS)
def test_a_node_that_is_cut_off_stops_containers_that_take_their_time(seed: int) -> None:
    slowly = Behavior(shutdown_s=4.0)
    with SimulatedCluster(managers=3, workers=3, seed=seed, behavior=slowly) as cluster:
        settle(cluster, a_spec(on_disconnect="stop", on_disconnect_delay="5s"))
        cut_off(cluster, [LOST])
        assert most_containers(cluster, 30) == REPLICAS, "no task ran twice"
        assert not cluster.nodes[LOST].containers
        cluster.check_invariants(at_rest=False)


@pytest.mark.parametrize("seed", SEEDS)
def test_labels_that_were_changed_while_tasks_ran_hold_in_the_next_partition(seed: int) -> None:
    """The change replaces no task: the nodes are sent it."""
    with SimulatedCluster(managers=3, workers=3, seed=seed) as cluster:
        settle(cluster, a_spec())
        stops = a_spec(on_disconnect="stop", on_disconnect_delay="10s")
        cluster.update("web", lambda spec: stops)
        cluster.run_for(10)
        assert cluster.created("web") == REPLICAS
        cut = cut_off(cluster, [LOST])
        assert most_containers(cluster, 60) == REPLICAS, "no task ran twice"
        assert not cluster.nodes[LOST].containers
        assert cluster.running("web") == REPLICAS
        restore(cluster, cut)
        cluster.run_for(20)
        keeper = next(task.node_id for task in cluster.wanted("web"))
        cluster.update("web", lambda spec: a_spec(on_disconnect="keep"))
        cluster.run_for(10)
        cut_off(cluster, [keeper])
        cluster.run_for(60)
        assert cluster.containers("web") == REPLICAS
        assert cluster.nodes[keeper].containers, "no longer stopped by its node"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_node_that_was_cut_off_when_labels_changed_is_not_taken_to_go_by_them(seed: int) -> None:
    """Nor by a new leader.  It stops nothing, so nothing is started elsewhere until it is back."""
    with SimulatedCluster(managers=3, workers=3, seed=seed) as cluster:
        settle(cluster, a_spec(on_disconnect_delay="1h"))
        cluster.run_for(10)
        cut = cut_off(cluster, [LOST])
        cluster.run_for(20)
        cluster.update("web", lambda spec: a_spec(on_disconnect="stop", on_disconnect_delay="5s"))
        cluster.run_for(20)
        cluster.crash(cluster.leader)
        assert most_containers(cluster, 60) == REPLICAS
        assert cluster.created("web") == REPLICAS
        assert cluster.nodes[LOST].containers
        restore(cluster, cut)
        cluster.run_until(lambda: cluster.is_ready(LOST), within_s=15)
        cluster.run_for(10)
        cut_off(cluster, [LOST])
        assert most_containers(cluster, 60) == REPLICAS
        assert not cluster.nodes[LOST].containers
        assert cluster.running("web") == REPLICAS


@pytest.mark.parametrize("seed", SEEDS)
def test_a_machine_that_comes_back_cut_off_begins_nothing_that_runs_elsewhere(seed: int) -> None:
    with SimulatedCluster(managers=3, workers=3, seed=seed) as cluster:
        settle(cluster, a_spec(on_disconnect="stop"))
        cut_off(cluster, [LOST])
        cluster.kill_node(LOST)
        cluster.run_for(60)
        assert cluster.running("web") == REPLICAS
        cluster.start_node(LOST)
        assert most_containers(cluster, 60) == REPLICAS
        assert not cluster.nodes[LOST].containers


def test_a_node_whose_removal_is_not_committed_yet_is_connected_again_when_its_links_are() -> None:
    with SimulatedCluster(managers=1, workers=2) as cluster:
        settle(cluster, a_spec(on_disconnect="stop", on_disconnect_delay="10s"))
        cut = cut_off(cluster, [LOST])
        cluster.run_for(1.0)
        cluster.workers = tuple(id for id in cluster.workers if id != LOST)
        restore(cluster, cut)
        cluster.run_for(30.0)
        assert cluster.running("web") == REPLICAS
        assert not cluster.observer.violations


@pytest.mark.parametrize("seed", SEEDS)
def test_a_storm_freezes_replacement_until_half_are_back(seed: int) -> None:
    with SimulatedCluster(managers=1, workers=6, seed=seed) as cluster:
        settle(cluster, a_spec())
        cluster.run_for(READY_BEFORE_S)
        before = {task.id for task in cluster.wanted("web")}
        fallen = list(cluster.workers[:5])
        cut = cut_off(cluster, fallen)
        cluster.run_until(lambda: freeze_of(cluster) is not None, within_s=10)
        replaced_early = cluster.created("web") - REPLICAS
        cluster.run_for(60)
        freeze = freeze_of(cluster)
        assert freeze is not None
        assert set(freeze.nodes) <= set(fallen)
        assert len(freeze.nodes) >= 3
        assert cluster.created("web") == REPLICAS + replaced_early
        moved = before - {task.id for task in cluster.wanted("web")}
        assert len(moved) <= replaced_early, "some went to a node that fell next"
        restore(cluster, cut)
        cluster.run_until(lambda: freeze_of(cluster) is None, within_s=20)
        cluster.run_until(
            lambda: cluster.containers("web") == cluster.running("web") == REPLICAS, within_s=20
        )
        cluster.run_for(10)
        assert cluster.created("web") == REPLICAS + replaced_early
        assert before - {task.id for task in cluster.wanted("web")} == moved
        cluster.check_invariants()


@pytest.mark.parametrize(("managers", "workers"), [(1, 9), (3, 9), (5, 9), (5, 8)])
@pytest.mark.parametrize("seed", SEEDS)
def test_most_nodes_gone_at_once_are_a_storm_for_any_number_of_managers_and_nothing_is_replaced(
    managers: int, workers: int, seed: int
) -> None:
    """Among five managers some have one of the lost nodes only."""
    with SimulatedCluster(managers=managers, workers=workers, seed=seed) as cluster:
        settle(cluster, a_spec())
        cluster.run_for(READY_BEFORE_S + 15)
        cut = cluster.links.cut(list(cluster.workers[:-1]), [*cluster.managers, cluster.workers[-1]])
        cluster.run_until(lambda: freeze_of(cluster) is not None, within_s=10)
        cluster.run_for(30)
        assert cluster.created("web") == REPLICAS
        cluster.loop.call_soon(cluster.links.restore, cut)
        cluster.run_until(lambda: freeze_of(cluster) is None, within_s=20)
        cluster.run_for(10)
        assert cluster.created("web") == REPLICAS
        cluster.check_invariants()


def test_a_storm_that_lasts_is_taken_for_true_after_ten_minutes() -> None:
    with SimulatedCluster(managers=1, workers=6) as cluster:
        settle(cluster, a_spec())
        cluster.run_for(READY_BEFORE_S)
        for id in cluster.workers[:5]:
            cluster.kill_node(id)
        cluster.run_until(lambda: freeze_of(cluster) is not None, within_s=10)
        assert (
            cluster.run_until(
                lambda: cluster.running("web") >= REPLICAS and freeze_of(cluster) is None, within_s=700
            )
            > 590
        )
        cluster.run_until(lambda: cluster.containers("web") == REPLICAS, within_s=20)


def test_a_user_ends_a_storm() -> None:
    with SimulatedCluster(managers=1, workers=6) as cluster:
        settle(cluster, a_spec())
        cluster.run_for(READY_BEFORE_S)
        for id in cluster.workers[:5]:
            cluster.kill_node(id)
        cluster.run_until(lambda: freeze_of(cluster) is not None, within_s=10)
        cluster.run_for(10)
        assert cluster.containers("web") < REPLICAS
        cluster.write(control.resume_replacement)
        cluster.run_until(lambda: cluster.containers("web") == REPLICAS, within_s=20)
        assert freeze_of(cluster) is None


@pytest.mark.parametrize("seed", SEEDS)
def test_one_lost_worker_of_three_is_replaced_normally(seed: int) -> None:
    with SimulatedCluster(managers=1, workers=3, seed=seed) as cluster:
        settle(cluster, a_spec())
        cluster.kill_node(LOST)
        cluster.run_until(lambda: cluster.containers("web") == REPLICAS, within_s=8)
        assert freeze_of(cluster) is None


@pytest.mark.parametrize("seed", SEEDS)
def test_a_freeze_outlives_its_leader(seed: int) -> None:
    with SimulatedCluster(managers=3, workers=8, seed=seed) as cluster:
        settle(cluster, a_spec())
        for id in cluster.workers[:4]:
            cluster.kill_node(id)
        cluster.run_for(10)
        freeze = Freeze(since=STAMP, nodes=cluster.workers[:4], ready_before=8)
        cluster.write(lambda tx: tx.put(replace(tx.find(Swarm)[0], freeze=freeze)))
        cluster.crash(cluster.leader)
        cluster.kill_node(cluster.workers[4])
        cluster.run_until(lambda: not cluster.is_ready(cluster.workers[4]), within_s=15)
        created = cluster.created("web")
        cluster.run_for(60)
        assert freeze_of(cluster) == freeze
        assert cluster.created("web") == created


@pytest.mark.parametrize("seed", SEEDS)
def test_once_its_nodes_lease_is_over_a_task_is_never_shown_as_running(seed: int) -> None:
    """Also when its manager died at the same moment, and the leader has to adopt the session first."""
    with SimulatedCluster(managers=3, workers=4, seed=seed) as cluster:
        settle(cluster, a_spec(on_disconnect="keep"))
        cluster.run_for(RECOVERY_GRACE_S)  # managers that have just started are more patient
        session = cluster.view.get(Node, LOST).session
        assert session is not None
        cluster.kill_node(LOST)
        cluster.crash(session.manager_id)
        cluster.run_for(ADOPTED_LEASE_S)
        for _ in range(40):
            cluster.run_for(0.5)
            shown = {
                task.id: known_status(cluster.view, task)
                for task in cluster.tasks("web")
                if task.node_id == LOST
            }
            assert shown
            assert {status.state for status in shown.values()} == {TaskState.UNKNOWN}
        cluster.start_node(LOST)
        cluster.run_until(
            lambda: cluster.running("web") == cluster.containers("web") == REPLICAS, within_s=30
        )
        assert all(
            known_status(cluster.view, task).state is TaskState.RUNNING for task in cluster.wanted("web")
        )
