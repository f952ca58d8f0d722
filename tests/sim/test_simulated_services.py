"""Services in a simulated cluster: scale, crash, move, update, removal, under faults."""

from collections import Counter

import pytest
from msgspec.structs import replace

from sim.cluster import SimulatedCluster
from skep.manager.diagnosis.explanations import explain_task
from skep.model.node import Availability
from skep.model.service import (
    Resources,
    RestartCondition,
    RestartPolicy,
    UpdateConfig,
    UpdateFailureAction,
    UpdateOrder,
    UpdateState,
)
from skep.model.task import TaskState
from skep.model.values.ids import NodeId
from skep.model.values.times import SECOND_NS
from tests.support.builders import a_service_spec
from tests.support.managers.sim_services import state_of, with_image, with_replicas

SEEDS = range(8)
AT_ONCE = RestartPolicy(delay=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_scaling_up_and_down_ends_with_what_was_asked_for(seed: int) -> None:
    with SimulatedCluster(workers=3, seed=seed) as cluster:
        cluster.create(a_service_spec("web", replicas=3))
        cluster.run_until(lambda: cluster.running("web") == 3, within_s=5)
        cluster.update("web", lambda spec: with_replicas(spec, 20))
        cluster.run_until(lambda: cluster.running("web") == 20, within_s=5)
        cluster.update("web", lambda spec: with_replicas(spec, 4))
        cluster.run_until(lambda: cluster.containers("web") == 4, within_s=5)
        cluster.run_for(2)
        assert len(cluster.tasks("web")) == 4
        assert cluster.created("web") == 20
        cluster.check_invariants()


def test_a_task_says_why_it_got_its_node_while_it_runs_and_after_its_end() -> None:
    with SimulatedCluster(workers=2, seed=1) as cluster:
        cluster.create(a_service_spec("web", replicas=1))
        cluster.run_until(lambda: cluster.running("web") == 1, within_s=5)
        (first,) = cluster.tasks("web")
        placement = explain_task(first, None).placement
        assert placement.startswith(
            "2 of 3 nodes suitable; 1 node not available for new tasks (m1); the chosen"
        )
        cluster.kill_container(first)
        cluster.run_until(lambda: len(cluster.tasks("web")) == 2 and cluster.running("web") == 1, within_s=30)
        (ended,) = (one for one in cluster.tasks("web") if one.status.state.is_terminal)
        assert (ended.id, explain_task(ended, None).placement) == (first.id, placement)


@pytest.mark.parametrize("at_once", [0, 1, 2])
@pytest.mark.parametrize("order", UpdateOrder)
def test_an_update_leaves_a_service_as_spread_as_it_was(order: UpdateOrder, at_once: int) -> None:
    update = UpdateConfig(parallelism=at_once, order=order, monitor=SECOND_NS)
    with SimulatedCluster(workers=3, seed=at_once) as cluster:
        cluster.create(a_service_spec("web", replicas=6, image="app:1", update=update))
        cluster.run_until(lambda: cluster.running("web") == 6, within_s=5)
        cluster.update("web", lambda spec: with_image(spec, "app:2"))
        cluster.run_until(lambda: state_of(cluster) is UpdateState.COMPLETED, within_s=60)
        assert sorted(Counter(one.node_id for one in cluster.tasks("web") if one.is_wanted).values()) == [
            2,
            2,
            2,
        ]
        cluster.check_invariants()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_service_survives_the_loss_of_the_leader(seed: int) -> None:
    """Crash the leader somewhere in a scale-up; what was asked for still comes to run."""
    with SimulatedCluster(managers=3, workers=5, seed=seed) as cluster:
        cluster.create(a_service_spec("web", replicas=20))
        cluster.run_for(cluster.random.uniform(0, 0.3))
        cluster.crash(cluster.leader)
        cluster.run_until(lambda: cluster.running("web") == 20, within_s=30)
        cluster.run_for(10)
        assert cluster.created("web") == 20
        cluster.check_invariants()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_leader_that_does_not_know_of_its_end_changes_nothing(seed: int) -> None:
    """The old leader goes on deciding until one of its writes is refused; nothing is made twice."""
    with SimulatedCluster(managers=3, workers=4, seed=seed) as cluster:
        cluster.create(a_service_spec("web", replicas=10))
        cluster.run_for(cluster.random.uniform(0, 0.1))
        cluster.depose(quietly=True)
        cluster.run_until(lambda: cluster.running("web") == 10, within_s=10)
        cluster.run_for(5)
        assert cluster.created("web") == 10
        cluster.check_invariants()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_crashed_container_is_replaced_at_once_when_there_is_no_delay(seed: int) -> None:
    with SimulatedCluster(seed=seed) as cluster:
        cluster.create(a_service_spec("web", replicas=5, restart=AT_ONCE))
        cluster.run_until(lambda: cluster.running("web") == 5, within_s=5)
        victim = cluster.random.choice(cluster.wanted("web"))
        cluster.kill_container(victim)
        cluster.run_until(lambda: cluster.running("web") == 4, within_s=1)
        assert cluster.run_until(lambda: cluster.running("web") == 5, within_s=5) < 1
        assert cluster.created("web") == 6
        failed = next(task for task in cluster.tasks("web") if task.id == victim.id)
        assert failed.status.state is TaskState.FAILED
        assert failed.desired_state is TaskState.SHUTDOWN
        cluster.check_invariants()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_successor_is_prepared_during_the_restart_delay_and_started_after_it(seed: int) -> None:
    with SimulatedCluster(seed=seed) as cluster:
        cluster.create(a_service_spec("web", restart=RestartPolicy(delay=3 * SECOND_NS)))
        cluster.run_until(lambda: cluster.running("web") == 1, within_s=5)
        cluster.kill_container(cluster.wanted("web")[0])
        cluster.run_for(2)
        assert [task.status.state for task in cluster.wanted("web")] == [TaskState.READY]
        assert 0.9 < cluster.run_until(lambda: cluster.running("web") == 1, within_s=5) < 1.5
        cluster.check_invariants()


@pytest.mark.parametrize("seed", SEEDS)
def test_restarts_end_after_the_maximum_of_attempts(seed: int) -> None:
    policy = RestartPolicy(delay=SECOND_NS // 2, max_attempts=3)
    with SimulatedCluster(seed=seed) as cluster:
        for node in cluster.nodes.values():
            node.ending_images["bad:1"] = (0.2, 1)
        cluster.create(a_service_spec("web", replicas=2, image="bad:1", restart=policy))
        cluster.run_for(30)
        assert cluster.created("web") == 2 * (1 + 3)
        assert cluster.wanted("web") == []
        assert all(task.status.state is TaskState.FAILED for task in cluster.tasks("web"))
        cluster.check_invariants()


def test_a_task_that_ended_well_is_not_restarted_on_failure() -> None:
    policy = RestartPolicy(condition=RestartCondition.ON_FAILURE, delay=0)
    with SimulatedCluster() as cluster:
        cluster.create(a_service_spec("web", restart=policy))
        cluster.run_until(lambda: cluster.running("web") == 1, within_s=5)
        cluster.kill_container(cluster.wanted("web")[0], exit_code=0)
        cluster.run_for(20)
        assert cluster.created("web") == 1
        assert [task.status.state for task in cluster.tasks("web")] == [TaskState.COMPLETE]


def test_an_image_that_cannot_be_prepared_is_tried_again_after_each_delay() -> None:
    with SimulatedCluster() as cluster:
        for node in cluster.nodes.values():
            node.broken_images.add("missing:1")
        cluster.create(a_service_spec("web", image="missing:1", restart=RestartPolicy(delay=2 * SECOND_NS)))
        cluster.run_for(20)
        assert 8 <= cluster.created("web") <= 11
        assert len(cluster.tasks("web")) <= 6
        rejected = [task for task in cluster.tasks("web") if task.status.state is TaskState.REJECTED]
        assert {task.status.err for task in rejected} == {"No such image: missing:1"}


@pytest.mark.parametrize("seed", SEEDS)
def test_tasks_of_a_lost_node_are_replaced_elsewhere_and_stopped_when_it_returns(seed: int) -> None:
    with SimulatedCluster(workers=3, seed=seed) as cluster:
        cluster.create(a_service_spec("web", replicas=9, restart=AT_ONCE))
        cluster.run_until(lambda: cluster.running("web") == 9, within_s=5)
        lost = NodeId("w2")
        cluster.kill_node(lost, keeps_containers=True)
        cluster.run_until(lambda: all(task.node_id != lost for task in cluster.wanted("web")), within_s=10)
        cluster.run_until(lambda: cluster.running("web") == 9, within_s=10)
        assert cluster.created("web") == 12
        assert cluster.containers("web") == 12
        cluster.start_node(lost)
        cluster.run_until(lambda: cluster.containers("web") == 9, within_s=10)
        cluster.run_for(5)
        assert cluster.created("web") == 12
        cluster.check_invariants()


@pytest.mark.parametrize("seed", SEEDS)
def test_draining_a_node_moves_its_tasks_without_delay(seed: int) -> None:
    with SimulatedCluster(workers=3, seed=seed) as cluster:
        cluster.create(a_service_spec("web", replicas=6))
        cluster.run_until(lambda: cluster.running("web") == 6, within_s=5)
        cluster.set_availability(NodeId("w1"), Availability.DRAIN)
        cluster.run_until(lambda: not cluster.nodes[NodeId("w1")].containers, within_s=4)
        cluster.run_until(lambda: cluster.running("web") == 6, within_s=4)
        cluster.run_for(10)
        assert cluster.created("web") == 8
        cluster.check_invariants()


def test_a_removed_node_leaves_no_task_behind() -> None:
    with SimulatedCluster(workers=2) as cluster:
        cluster.create(a_service_spec("web", replicas=4, restart=AT_ONCE))
        cluster.run_until(lambda: cluster.running("web") == 4, within_s=5)
        cluster.kill_node(NodeId("w1"))
        cluster.run_until(lambda: cluster.running("web") == 4 and cluster.created("web") == 6, within_s=10)
        cluster.forget(NodeId("w1"))
        cluster.run_for(1)
        orphans = [task for task in cluster.tasks("web") if task.node_id == "w1"]
        assert [task.status.state for task in orphans] == [TaskState.ORPHANED] * 2
        cluster.remove("web")
        cluster.run_until(lambda: cluster.service("web") is None, within_s=5)
        assert cluster.tasks("web") == []


@pytest.mark.parametrize("seed", SEEDS)
def test_a_removed_service_stays_hidden_until_its_last_container_stopped(seed: int) -> None:
    with SimulatedCluster(workers=2, seed=seed) as cluster:
        cluster.create(a_service_spec("web", replicas=4))
        cluster.run_until(lambda: cluster.running("web") == 4, within_s=5)
        cluster.kill_node(NodeId("w1"), keeps_containers=True)
        cluster.remove("web")
        cluster.run_for(20)
        assert cluster.service("web") is not None
        assert {task.node_id for task in cluster.tasks("web")} == {"w1"}
        cluster.start_node(NodeId("w1"))
        cluster.run_until(lambda: cluster.service("web") is None, within_s=5)
        assert cluster.containers("web") == 0
        cluster.check_invariants()


@pytest.mark.parametrize("order", list(UpdateOrder))
@pytest.mark.parametrize("seed", SEEDS)
def test_an_update_rolls_through_all_tasks_a_few_at_a_time(seed: int, order: UpdateOrder) -> None:
    update = UpdateConfig(parallelism=2, delay=SECOND_NS, order=order)
    with SimulatedCluster(managers=3, workers=3, seed=seed) as cluster:
        cluster.create(a_service_spec("web", replicas=6, image="app:1", update=update))
        cluster.run_until(lambda: cluster.running("web") == 6, within_s=5)
        cluster.update("web", lambda spec: with_image(spec, "app:2"))
        least = 6

        def is_updated() -> bool:
            nonlocal least
            least = min(least, cluster.running("web"))
            return cluster.running("web", "app:2") == 6

        assert cluster.run_until(is_updated, within_s=30) > 2
        assert least >= (6 if order is UpdateOrder.START_FIRST else 4)
        cluster.run_until(lambda: state_of(cluster) is UpdateState.COMPLETED, within_s=8)
        assert cluster.created("web") == 12
        assert cluster.containers("web") == 6
        cluster.check_invariants()


@pytest.mark.parametrize("seed", SEEDS)
def test_an_update_goes_on_under_a_new_leader(seed: int) -> None:
    update = UpdateConfig(parallelism=2, delay=SECOND_NS)
    with SimulatedCluster(managers=3, workers=3, seed=seed) as cluster:
        cluster.create(a_service_spec("web", replicas=6, image="app:1", update=update))
        cluster.run_until(lambda: cluster.running("web") == 6, within_s=5)
        cluster.update("web", lambda spec: with_image(spec, "app:2"))
        cluster.run_for(cluster.random.uniform(0, 4))
        cluster.crash(cluster.leader)
        cluster.run_until(lambda: cluster.running("web", "app:2") == 6, within_s=30)
        cluster.run_until(lambda: state_of(cluster) is UpdateState.COMPLETED, within_s=10)
        assert cluster.created("web") == 12
        cluster.check_invariants()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_failing_update_pauses_and_leaves_the_rest_alone(seed: int) -> None:
    with SimulatedCluster(workers=3, seed=seed) as cluster:
        for node in cluster.nodes.values():
            node.ending_images["app:2"] = (0.3, 1)
        update = UpdateConfig(parallelism=1, delay=SECOND_NS)
        cluster.create(a_service_spec("web", replicas=4, image="app:1", update=update))
        cluster.run_until(lambda: cluster.running("web") == 4, within_s=5)
        cluster.update("web", lambda spec: with_image(spec, "app:2"))
        cluster.run_until(lambda: state_of(cluster) is UpdateState.PAUSED, within_s=10)
        cluster.run_for(30)
        assert cluster.running("web", "app:1") == 3
        service = cluster.service("web")
        assert service is not None
        assert service.update_status is not None
        message = service.update_status.message
        assert message.startswith("update paused due to failure or early termination of task ")
        cluster.update("web", lambda spec: with_image(spec, "app:3"))
        cluster.run_until(lambda: cluster.running("web", "app:3") == 4, within_s=20)
        cluster.run_until(lambda: state_of(cluster) is UpdateState.COMPLETED, within_s=10)
        cluster.check_invariants()


@pytest.mark.parametrize("order", list(UpdateOrder))
@pytest.mark.parametrize("seed", SEEDS)
def test_a_failing_update_rolls_back(seed: int, order: UpdateOrder) -> None:
    update = UpdateConfig(parallelism=2, failure_action=UpdateFailureAction.ROLLBACK, order=order)
    with SimulatedCluster(workers=3, seed=seed) as cluster:
        for node in cluster.nodes.values():
            node.broken_images.add("app:2")
        cluster.create(
            a_service_spec(
                "web", replicas=6, image="app:1", update=update, rollback=UpdateConfig(parallelism=0)
            )
        )
        cluster.run_until(lambda: cluster.running("web") == 6, within_s=5)
        cluster.update("web", lambda spec: with_image(spec, "app:2"))
        cluster.run_until(lambda: state_of(cluster) is UpdateState.ROLLBACK_COMPLETED, within_s=20)
        assert cluster.running("web", "app:1") == 6
        cluster.run_for(10)
        assert cluster.containers("web") == 6
        cluster.check_invariants()


@pytest.mark.parametrize("seed", SEEDS)
def test_scaling_and_labels_start_no_task_anew(seed: int) -> None:
    with SimulatedCluster(seed=seed) as cluster:
        cluster.create(a_service_spec("web", replicas=3))
        cluster.run_until(lambda: cluster.running("web") == 3, within_s=5)
        cluster.update("web", lambda spec: replace(spec, labels={"tier": "front"}))
        cluster.update(
            "web", lambda spec: replace(with_replicas(spec, 4), update_config=UpdateConfig(parallelism=4))
        )
        cluster.run_for(10)
        assert cluster.created("web") == 4
        assert state_of(cluster) is None
        cluster.check_invariants()


@pytest.mark.parametrize("seed", SEEDS)
def test_an_object_whose_decisions_fail_affects_no_other(seed: int) -> None:
    """Every decision about one service raises; every other service converges, and the bad one says so."""
    with SimulatedCluster(managers=3, workers=3, seed=seed) as cluster:
        cluster.poisoned.add("bad")
        cluster.create(a_service_spec("bad", replicas=3))
        for number in range(5):
            cluster.create(a_service_spec(f"good{number}", replicas=3))
        cluster.run_until(lambda: all(cluster.running(f"good{n}") == 3 for n in range(5)), within_s=5)
        cluster.crash(cluster.leader)
        cluster.kill_container(cluster.wanted("good0")[0])
        cluster.run_for(1)
        cluster.run_until(lambda: cluster.running("good0") == 3, within_s=20)
        bad = cluster.service("bad")
        assert bad is not None
        assert bad.update_status is not None
        assert "InjectedError" in bad.update_status.message
        cluster.poisoned.clear()
        cluster.run_until(lambda: cluster.running("bad") == 3, within_s=70)
        bad = cluster.service("bad")
        assert bad is not None
        assert bad.update_status is None
        cluster.check_invariants()


def test_no_node_gets_more_than_it_has_and_the_rest_waits_with_the_reason() -> None:
    capacity = Resources(nano_cpus=4_000_000_000, memory_bytes=1 << 30)
    with SimulatedCluster(workers=2, capacity=capacity) as cluster:
        cluster.create(a_service_spec("web", replicas=7, reserve=Resources(memory_bytes=300 << 20)))
        cluster.run_until(lambda: cluster.running("web") == 6, within_s=5)
        cluster.run_for(1)
        waiting = next(task for task in cluster.wanted("web") if task.status.state is TaskState.PENDING)
        assert waiting.status.err == (
            "no suitable node (insufficient resources on 2 nodes; 1 node not available for new tasks)"
        )
        cluster.update("web", lambda spec: with_replicas(spec, 2))
        cluster.create(a_service_spec("next", reserve=Resources(memory_bytes=900 << 20)))
        cluster.run_until(lambda: cluster.running("web") == 2 and cluster.containers("web") == 2, within_s=5)
        cluster.check_invariants()


def test_a_pending_task_starts_when_a_label_makes_a_node_fit() -> None:
    with SimulatedCluster(workers=3) as cluster:
        cluster.create(a_service_spec("web", replicas=2, constraints=("node.labels.disk == ssd",)))
        cluster.run_for(2)
        assert {task.status.err for task in cluster.wanted("web")} == {
            (
                "no suitable node (scheduling constraints not satisfied on 3 nodes; "
                "1 node not available for new tasks)"
            )
        }
        cluster.label(NodeId("w3"), disk="ssd")
        cluster.run_until(lambda: cluster.running("web") == 2, within_s=5)
        assert {task.node_id for task in cluster.wanted("web")} == {"w3"}
        assert {task.status.err for task in cluster.wanted("web")} == {""}
        cluster.check_invariants()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_global_service_has_one_task_on_every_node_that_may_have_one(seed: int) -> None:
    with SimulatedCluster(workers=4, seed=seed) as cluster:
        cluster.set_availability(NodeId("w4"), Availability.DRAIN)
        cluster.create(a_service_spec("agent", is_global=True, restart=AT_ONCE))
        cluster.run_until(lambda: cluster.running("agent") == 3, within_s=5)
        cluster.set_availability(NodeId("w4"), Availability.ACTIVE)
        cluster.run_until(lambda: cluster.running("agent") == 4, within_s=5)
        cluster.set_availability(NodeId("w1"), Availability.DRAIN)
        cluster.run_until(lambda: cluster.containers("agent") == 3, within_s=5)
        cluster.kill_container(next(task for task in cluster.wanted("agent") if task.node_id == "w2"))
        cluster.run_for(3)
        assert sorted(task.node_id for task in cluster.wanted("agent")) == ["w2", "w3", "w4"]
        cluster.update("agent", lambda spec: with_image(spec, "app:2"))
        cluster.run_until(lambda: cluster.running("agent", "app:2") == 3, within_s=20)
        cluster.remove("agent")
        cluster.run_until(lambda: cluster.service("agent") is None, within_s=5)
        cluster.check_invariants()
