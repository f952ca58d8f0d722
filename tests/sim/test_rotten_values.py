"""A leader whose own disk has lost single values: all goes on as it was, and what is written anew is whole again."""

import pytest
from msgspec.structs import replace

from sim.cluster import SimulatedCluster
from skep.model.node import Node
from skep.model.options.dependencies import DEPENDS_ON
from skep.model.service import (
    EndpointSpec,
    GlobalService,
    JobStatus,
    PortConfig,
    PublishMode,
    ReplicatedJob,
    RestartCondition,
    RestartPolicy,
    Service,
    ServiceMode,
    UpdateConfig,
    UpdateOrder,
)
from skep.model.task import Task, TaskState, TaskStatus
from skep.model.values.ids import NodeId, ServiceId, TaskId
from skep.model.values.meta import Version
from skep.model.values.times import SECOND_NS, timestamp
from skep.store.etcd.requests import etcd_key
from skep.store.etcd.store import EtcdStore
from tests.support.builders import a_service_spec

REPLICAS = 6


@pytest.mark.parametrize("seed", range(2))
def test_a_leader_with_values_that_it_cannot_read_changes_nothing(seed: int) -> None:
    with SimulatedCluster(managers=3, workers=3, seed=seed) as cluster:
        cluster.create(a_service_spec("web", replicas=REPLICAS))
        cluster.run_until(lambda: cluster.running("web") == REPLICAS, within_s=10)
        (service,) = cluster.view.find(Service)
        tasks = {task.id for task in cluster.view.find(Task)}
        rotten = next(id for id in cluster.managers if id != cluster.leader)
        cluster.crash(rotten)
        keys = [f"o/service/{service.id}", "o/node/w1", f"o/node/{rotten}", f"o/task/{min(tasks)}.status"]
        assert all(cluster.raft.corrupt(rotten, etcd_key(key)) for key in keys)
        cluster.start_manager(rotten)
        cluster.run_for(5)
        assert cluster.raft.transfer(rotten)
        cluster.run_until(lambda: cluster.leader == rotten, within_s=10)
        store = cluster.running_managers[rotten].store
        assert store is not None
        assert list(store.view().unreadable(Service)) == [service.id]
        assert set(store.view().unreadable(Node)) == {"w1", rotten} & {
            node.id for node in store.view().find(Node)
        }
        cluster.run_for(60)
        assert {task.id for task in cluster.view.find(Task)} == tasks
        assert (cluster.running("web"), cluster.containers("web")) == (REPLICAS, REPLICAS)


def a_job(*, run: int = 1) -> Service:
    mode = ServiceMode(replicated_job=ReplicatedJob(max_concurrent=2, total_completions=2))
    policy = RestartPolicy(condition=RestartCondition.ON_FAILURE)
    spec = replace(a_service_spec("job", restart=policy), mode=mode)
    return Service(id=ServiceId("job"), spec=spec, job_status=JobStatus(job_iteration=Version(index=run)))


def lead_without(cluster: SimulatedCluster, key: str) -> EtcdStore:
    """The store of a new leader, which has never read the value of ``key``."""
    rotten = next(id for id in cluster.managers if id != cluster.leader)
    cluster.crash(rotten)
    assert cluster.raft.corrupt(rotten, etcd_key(key))
    cluster.start_manager(rotten)
    cluster.run_for(5)
    assert cluster.raft.transfer(rotten)
    cluster.run_until(lambda: cluster.leader == rotten, within_s=10)
    store = cluster.running_managers[rotten].store
    assert store is not None
    return store


def test_a_leader_that_cannot_read_the_run_of_a_job_stops_none_of_its_tasks() -> None:
    with SimulatedCluster(managers=3, workers=3, seed=1) as cluster:
        cluster.write(lambda tx: tx.put(a_job()))
        cluster.run_until(lambda: cluster.containers("job") == 2, within_s=10)
        tasks = {task.id for task in cluster.view.find(Task)}
        lead_without(cluster, "o/service/job.job")
        cluster.run_for(30)
        assert {task.id for task in cluster.view.find(Task)} == tasks
        assert cluster.containers("job") == 2


def test_a_leader_that_cannot_read_the_run_of_a_job_removes_none_of_its_completed_tasks() -> None:
    """Or they would be run once more; where the run can be read, the tasks that failed after it are removed."""
    with SimulatedCluster(managers=3, workers=3, seed=1) as cluster:
        past = a_past_run(1, TaskState.COMPLETE)
        failed = [a_past_run(number, TaskState.FAILED) for number in range(2, 9)]
        cluster.write(lambda tx: [tx.put(one) for one in (a_job(), past)])
        store = lead_without(cluster, "o/service/job.job")
        cluster.write(lambda tx: [tx.put(task) for task in failed])
        cluster.run_for(10)
        assert store.view().damaged(Service)
        assert {past.id, *(task.id for task in failed)} <= {task.id for task in cluster.view.find(Task)}
        assert cluster.raft.transfer(next(id for id in cluster.managers if id != cluster.leader))
        cluster.run_for(20)
        assert len({task.id for task in failed} & {task.id for task in cluster.view.find(Task)}) < len(failed)
        assert cluster.view.lookup(Task, past.id) is not None


def test_what_waits_for_a_job_whose_run_cannot_be_read_waits_on() -> None:
    """The tasks of its earlier run have completed, with the same spec."""
    with SimulatedCluster(managers=3, workers=3, seed=1) as cluster:
        past = [a_past_run(1, TaskState.COMPLETE), replace(a_past_run(2, TaskState.COMPLETE), slot=2)]
        cluster.write(lambda tx: [tx.put(one) for one in (a_job(run=2), *past)])
        cluster.run_until(lambda: cluster.containers("job") == 2, within_s=10)
        lead_without(cluster, "o/service/job.job")
        labels = {DEPENDS_ON: "job=service_completed_successfully"}
        cluster.create(replace(a_service_spec("web"), labels=labels))
        cluster.run_for(10)
        assert cluster.containers("web") == 0
        assert {task.status.err for task in cluster.wanted("web")} == {"waits for job to complete"}


@pytest.mark.parametrize("condition", [RestartCondition.ANY, RestartCondition.NONE])
def test_a_task_whose_spec_cannot_be_read_is_restarted_as_the_present_one_says(
    condition: RestartCondition,
) -> None:
    with SimulatedCluster(managers=3, workers=3, seed=1) as cluster:
        id = cluster.create(
            a_service_spec("web", restart=RestartPolicy(condition=condition, delay=5 * SECOND_NS))
        )
        cluster.run_until(lambda: cluster.running("web") == 1, within_s=10)
        (task,) = cluster.tasks("web")
        assert task.spec_version is not None
        cluster.update("web", lambda spec: replace(spec, labels={"team": "a"}))
        cluster.run_for(1)
        lead_without(cluster, f"o/spec/{id}/{task.spec_version.index}")
        cluster.kill_container(task)
        cluster.run_for(3)
        assert cluster.containers("web") == 0
        cluster.run_for(10)
        assert cluster.containers("web") == cluster.created("web") - 1 == (condition is RestartCondition.ANY)


@pytest.mark.parametrize("runs", [False, True])
def test_a_task_that_may_wait_is_neither_started_nor_stopped_while_its_status_cannot_be_read(
    runs: bool,
) -> None:
    """The node of a global service's task is known before the task is assigned; here another one holds its port."""
    port = PortConfig(target_port=80, published_port=8080, publish_mode=PublishMode.HOST)
    spec = replace(
        a_service_spec("web"),
        mode=ServiceMode(global_=GlobalService()),
        endpoint_spec=EndpointSpec(ports=(port,)),
    )
    holding = replace(spec, name="holder")
    with SimulatedCluster(managers=1, workers=1, seed=1) as cluster:
        if not runs:
            cluster.create(holding)
            cluster.run_until(lambda: cluster.containers("holder") == 1, within_s=10)
        cluster.create(spec)
        cluster.run_until(
            lambda: cluster.containers("web") == runs and bool(cluster.tasks("web")), within_s=10
        )
        cluster.run_for(2)
        (task,) = cluster.tasks("web")
        cluster.crash(NodeId("m1"))
        assert cluster.raft.corrupt(NodeId("m1"), etcd_key(f"o/task/{task.id}.status"))
        cluster.start_manager(NodeId("m1"))
        cluster.run_for(20)
        assert cluster.containers("web") == runs
        assert cluster.created("web") == 1
        assert cluster.observer.violations == []


def a_past_run(number: int, state: TaskState) -> Task:
    """The task of the first slot and the first run of the job that ended as ``number``-th."""
    return Task(
        id=TaskId(f"past{number}"),
        created_at=timestamp(number * SECOND_NS),
        service_id=ServiceId("job"),
        spec=a_job().spec.task_template,
        slot=1,
        node_id=NodeId("w1"),
        status=TaskStatus(timestamp=timestamp(number * SECOND_NS), state=state),
        desired_state=TaskState.COMPLETE if state is TaskState.COMPLETE else TaskState.SHUTDOWN,
        job_iteration=Version(index=1),
    )


@pytest.mark.parametrize("order", list(UpdateOrder))
def test_an_update_keeps_a_task_whose_status_its_leader_cannot_read_until_the_new_one_is_ready(
    order: UpdateOrder,
) -> None:
    # A seed in which no node reports the status anew before the second update, which would mend it.
    with SimulatedCluster(managers=3, workers=3, seed=3) as cluster:
        for node in cluster.nodes.values():
            node.broken_images.add("broken:1")
        config = UpdateConfig(parallelism=1, order=order)
        cluster.create(a_service_spec("web", replicas=1, image="app:1", update=config))
        cluster.run_until(lambda: cluster.running("web") == 1, within_s=10)
        (task,) = cluster.wanted("web")
        store = lead_without(cluster, f"o/task/{task.id}.status")
        for image in ("broken:1", "app:2"):
            new = a_service_spec("web", replicas=1, image=image, update=config)
            assert store.view().damaged(Task)
            cluster.update("web", lambda _, new=new: new)  # type: ignore[misc]
            cluster.run_for(20)
            assert cluster.running("web", image="app:1") == (image == "broken:1")
        assert cluster.running("web", image="app:2") == 1
        cluster.check_invariants()


def test_nodes_keep_their_sessions_with_a_manager_that_cannot_read_the_cluster_itself() -> None:
    with SimulatedCluster(managers=1, workers=3, seed=1) as cluster:
        (manager,) = cluster.managers
        cluster.crash(manager)
        assert cluster.raft.corrupt(manager, etcd_key("o/swarm/sim"))
        cluster.start_manager(manager)
        cluster.run_for(5)
        sessions = [cluster.view.get(Node, id).session for id in cluster.workers]
        cluster.run_for(20)
        assert [cluster.view.get(Node, id).session for id in cluster.workers] == sessions
        cluster.check_invariants()
