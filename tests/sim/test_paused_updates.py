"""Updates that are paused, resumed and aborted in a simulated cluster, at random moments and under any leader."""

import pytest

from sim.cluster import SimulatedCluster
from skep.manager.control.updates import abort_update, pause_update, resume_update
from skep.model.service import RestartPolicy, Service, UpdateConfig, UpdateState
from skep.model.task import TaskState
from skep.model.values.ids import ServiceId
from skep.model.values.times import SECOND_NS, Timestamp, timestamp
from tests.support.builders import a_service_spec
from tests.support.managers.sim_services import state_of, with_image

SEEDS = range(8)
REPLICAS = 8
WEB = ServiceId("web")


def now(cluster: SimulatedCluster) -> Timestamp:
    return timestamp(cluster.clocks[cluster.managers[0]].now_ns())


def a_paused_one(cluster: SimulatedCluster, image: str = "app:2") -> set[str]:
    """Paused at a random moment of the update; gives the tasks that it has made."""
    update = UpdateConfig(parallelism=2, monitor=SECOND_NS, delay=SECOND_NS // 2)
    spec = a_service_spec(
        "web", replicas=REPLICAS, image="app:1", update=update, restart=RestartPolicy(delay=0)
    )
    cluster.create(spec)
    cluster.run_until(lambda: cluster.running("web") == REPLICAS, within_s=10)
    cluster.update("web", lambda spec: with_image(spec, image))
    cluster.run_for(cluster.random.uniform(0.0, 2.0))
    cluster.write(lambda tx: pause_update(tx, WEB, now=now(cluster)))
    assert state_of(cluster) is UpdateState.PAUSED
    cluster.run_for(0.2)  # what was being written when the pause was
    return {task.id for task in cluster.tasks("web")}


def change_leaders(cluster: SimulatedCluster) -> None:
    for _ in range(3):
        if cluster.random.random() < 0.5:
            cluster.depose(quietly=cluster.random.random() < 0.5)
        else:
            leader = cluster.leader
            cluster.crash(leader)
            cluster.run_for(3.0)
            cluster.start_manager(leader)
        cluster.run_for(cluster.random.uniform(1.0, 8.0))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_paused_update_stays_paused_over_changes_of_leader_and_is_completed_when_resumed(seed: int) -> None:
    with SimulatedCluster(managers=3, workers=3, seed=seed) as cluster:
        made = a_paused_one(cluster)
        change_leaders(cluster)
        assert state_of(cluster) is UpdateState.PAUSED
        assert {task.id for task in cluster.tasks("web")} == made
        assert cluster.running("web") == REPLICAS
        cluster.write(lambda tx: resume_update(tx, WEB))
        cluster.run_until(lambda: state_of(cluster) is UpdateState.COMPLETED, within_s=60)
        assert cluster.running("web", "app:2") == REPLICAS
        cluster.check_invariants()


@pytest.mark.parametrize("seed", SEEDS)
def test_an_aborted_update_ends_with_all_tasks_as_before(seed: int) -> None:
    with SimulatedCluster(managers=3, workers=3, seed=seed) as cluster:
        a_paused_one(cluster)
        if seed % 2:
            change_leaders(cluster)
        version = cluster.view.get(Service, WEB).version.index
        cluster.write(lambda tx: abort_update(tx, WEB, version, now=now(cluster)))
        cluster.run_until(lambda: state_of(cluster) is UpdateState.ROLLBACK_COMPLETED, within_s=60)
        assert cluster.running("web", "app:1") == REPLICAS
        cluster.check_invariants()


@pytest.mark.parametrize("seed", SEEDS)
def test_one_that_failed_goes_on_when_resumed_until_a_later_task_fails(seed: int) -> None:
    """Every new task is refused: each resume gets as far as the next attempt, under whatever leader."""
    with SimulatedCluster(managers=3, workers=3, seed=seed) as cluster:
        for node in cluster.nodes.values():
            node.broken_images.add("broken:1")
        update = UpdateConfig(parallelism=1, monitor=SECOND_NS)
        cluster.create(a_service_spec("web", replicas=3, image="app:1", update=update))
        cluster.run_until(lambda: cluster.running("web") == 3, within_s=10)
        cluster.update("web", lambda spec: with_image(spec, "broken:1"))
        cluster.run_until(lambda: state_of(cluster) is UpdateState.PAUSED, within_s=30)
        for _ in range(2):
            cluster.depose()
            cluster.run_for(5.0)
            known = {one.id for one in cluster.tasks("web") if one.status.state is TaskState.REJECTED}
            cluster.write(lambda tx: resume_update(tx, WEB))
            assert state_of(cluster) is UpdateState.UPDATING
            cluster.run_until(lambda: state_of(cluster) is UpdateState.PAUSED, within_s=60)
            status = cluster.view.get(Service, WEB).update_status
            assert status is not None
            assert not any(id in status.message for id in known), "a failure from before the resume"
        assert cluster.running("web", "app:1") >= 2
        cluster.check_invariants()
