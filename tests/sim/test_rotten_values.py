"""A leader whose own disk has lost single values: all goes on as it was, and what is written anew is whole again."""

import pytest
from msgspec.structs import replace

from sim.cluster import SimulatedCluster
from skep.model.ids import ServiceId
from skep.model.meta import Version
from skep.model.node import Node
from skep.model.service import JobStatus, ReplicatedJob, Service, ServiceMode
from skep.model.task import Task
from skep.store.etcd.requests import etcd_key
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


def test_a_leader_that_cannot_read_the_run_of_a_job_stops_none_of_its_tasks() -> None:
    with SimulatedCluster(managers=3, workers=3, seed=1) as cluster:
        run = ReplicatedJob(max_concurrent=2, total_completions=2)
        job = replace(a_service_spec("job"), mode=ServiceMode(replicated_job=run))
        status = JobStatus(job_iteration=Version(index=1))
        cluster.write(lambda tx: tx.put(Service(id=ServiceId("job"), spec=job, job_status=status)))
        cluster.run_until(lambda: cluster.containers("job") == 2, within_s=10)
        (service,) = cluster.view.find(Service)
        tasks = {task.id for task in cluster.view.find(Task)}
        rotten = next(id for id in cluster.managers if id != cluster.leader)
        cluster.crash(rotten)
        assert cluster.raft.corrupt(rotten, etcd_key(f"o/service/{service.id}.job"))
        cluster.start_manager(rotten)
        cluster.run_for(5)
        assert cluster.raft.transfer(rotten)
        cluster.run_until(lambda: cluster.leader == rotten, within_s=10)
        cluster.run_for(30)
        assert {task.id for task in cluster.view.find(Task)} == tasks
        assert cluster.containers("job") == 2


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
