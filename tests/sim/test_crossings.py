"""Features that meet in one cluster.  Each test is skipped until its rule is in force (``sim.invariants.in_force``)."""

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from sim.cluster import SimulatedCluster
from sim.invariants import in_force
from sim.random_specs import ENDING_IMAGES, with_labels
from sim.storage import DRIVER, SimulatedStorage
from skep.api.permissions import STACK_LABEL
from skep.errors import InvalidArgument
from skep.manager.control.jobs import retry_job
from skep.manager.control.quotas import set_quota
from skep.manager.control.services import create_service, update_service
from skep.manager.control.volumes import create_volume
from skep.model.container import Mount
from skep.model.dependencies import DEPENDS_ON
from skep.model.ids import NodeId, ServiceId
from skep.model.labels import FORGET_NODES, JOB_TTL, VOLUMES
from skep.model.meta import Driver
from skep.model.node import Availability, Node
from skep.model.quota import QuotaSpec
from skep.model.schedules import CRON, CRON_DEADLINE
from skep.model.service import (
    GlobalJob,
    ReplicatedJob,
    ReplicatedService,
    RestartCondition,
    RestartPolicy,
    Service,
    ServiceMode,
    ServiceSpec,
)
from skep.model.swarm import Swarm
from skep.model.task import Task
from skep.model.times import SECOND_NS, Timestamp, timestamp
from skep.model.volume import AccessMode, TypeMount, VolumeSpec
from skep.store.interface import Transaction
from tests.support.builders import a_service_spec
from tests.support.sim_services import with_image

SOON = RestartPolicy(delay=SECOND_NS // 2)
LOST_S = 120.0
"""Longer than a minute, after which the clusters here remove lost nodes."""


def needs(rule: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not in_force.is_in_force(rule), reason=f"not in force: {rule}")


def a_cluster(seed: int, *, workers: int = 4, managers: int = 3) -> SimulatedCluster:
    cluster = SimulatedCluster(managers=managers, workers=workers, seed=seed, storage=SimulatedStorage())
    for node in cluster.nodes.values():
        node.ending_images.update(ENDING_IMAGES)
    return cluster


def now(cluster: SimulatedCluster) -> Timestamp:
    return timestamp(cluster.clocks[cluster.managers[0]].now_ns())


def create(cluster: SimulatedCluster, spec: ServiceSpec) -> ServiceId:
    at = now(cluster)
    cluster.write(lambda tx: create_service(tx, spec, new_id=lambda: spec.name, new_name=lambda: "", now=at))
    return ServiceId(spec.name)


def update(cluster: SimulatedCluster, id: ServiceId, change: Callable[[ServiceSpec], ServiceSpec]) -> None:
    at = now(cluster)

    def body(tx: Transaction) -> None:
        service = tx.get(Service, id)
        update_service(tx, id, change(service.spec), service.version.index, now=at)

    cluster.write(body)


def mounting(spec: ServiceSpec, mount: Mount) -> ServiceSpec:
    container = spec.task_template.container_spec
    assert container is not None
    template = replace(spec.task_template, container_spec=replace(container, mounts=(mount,)))
    return replace(spec, task_template=template)


def a_database(cluster: SimulatedCluster) -> ServiceId:
    """One task with a cluster volume that tasks cannot share."""
    mode = AccessMode(mount_volume=TypeMount())
    volume = VolumeSpec(name="orders", driver=Driver(name=DRIVER), access_mode=mode)
    at = now(cluster)
    cluster.write(lambda tx: create_volume(tx, volume, new_id=lambda: "orders", now=at))
    spec = mounting(
        a_service_spec("db", image="app:1", replicas=1, restart=SOON),
        Mount(type="cluster", source="orders", target="/data"),
    )
    id = create(cluster, spec)
    cluster.run_until(lambda: cluster.running("db") == 1, within_s=30)
    return id


def remove_lost_nodes(tx: Transaction) -> None:
    (swarm,) = tx.find(Swarm)
    tx.put(replace(swarm, spec=replace(swarm.spec, labels={FORGET_NODES: "1m"})))


def home(cluster: SimulatedCluster, name: str) -> NodeId:
    (task,) = cluster.wanted(name)
    return task.node_id


@needs(in_force.WRITERS)
def test_a_machine_that_is_cut_off_keeps_its_volume_when_lost_nodes_are_removed() -> None:
    with a_cluster(1) as cluster:
        a_database(cluster)
        cluster.write(remove_lost_nodes)
        cluster.links.cut([home(cluster, "db")], cluster.managers)
        cluster.run_for(LOST_S)
        cluster.check_invariants(at_rest=False)


@needs(in_force.UPDATES)
def test_an_update_of_a_service_with_a_volume_that_is_not_shared_ends() -> None:
    with a_cluster(2) as cluster:
        id = a_database(cluster)
        update(cluster, id, lambda spec: with_image(spec, "app:2"))
        cluster.run_until(lambda: cluster.running("db", "app:2") == 1, within_s=60)
        cluster.check_invariants()


@needs(in_force.ATTEMPTS)
def test_a_service_that_never_fails_is_not_given_up_after_drains() -> None:
    with a_cluster(3, workers=2) as cluster:
        policy = RestartPolicy(condition=RestartCondition.ON_FAILURE, max_attempts=2, delay=0)
        create(cluster, a_service_spec("web", image="app:1", replicas=1, restart=policy))
        for _ in range(5):
            cluster.run_until(lambda: cluster.running("web") == 1, within_s=30)
            drained = home(cluster, "web")
            for id in cluster.workers:
                cluster.set_availability(id, Availability.DRAIN if id == drained else Availability.ACTIVE)
            cluster.run_for(5)
        cluster.run_until(lambda: cluster.running("web") == 1, within_s=30)
        cluster.check_invariants()


@needs(in_force.DEPENDENCIES)
def test_a_service_starts_again_after_the_job_that_it_depended_on_has_removed_itself() -> None:
    """Unless the two are refused together, or the job stays."""
    with a_cluster(4) as cluster:
        once = ServiceMode(replicated_job=ReplicatedJob(max_concurrent=1, total_completions=1))
        job = replace(a_service_spec("migrate", image="job:1"), mode=once)
        create(cluster, with_labels(job, {JOB_TTL: "5s"}))
        web = a_service_spec("web", image="app:1", replicas=2, restart=SOON)
        try:
            create(cluster, with_labels(web, {DEPENDS_ON: "migrate=service_completed_successfully"}))
        except InvalidArgument:
            return
        cluster.run_until(lambda: cluster.running("web") == 2, within_s=30)
        cluster.run_for(20)
        for task in cluster.wanted("web"):
            cluster.kill_container(task)
        cluster.run_for(5)
        cluster.run_until(lambda: cluster.running("web") == 2, within_s=30)
        cluster.check_invariants()


@needs(in_force.SHRINKING)
def test_a_service_shrinks_under_a_quota_of_what_it_does_not_reserve() -> None:
    with a_cluster(5) as cluster:
        spec = with_labels(a_service_spec("web", image="app:1", replicas=6), {STACK_LABEL: "shop"})
        id = create(cluster, spec)
        quota, at = QuotaSpec(name="shop", memory_bytes=1 << 30), now(cluster)
        cluster.write(lambda tx: set_quota(tx, quota, new_id=lambda: "q", now=at))
        cluster.run_for(1)  # every manager knows of it
        fewer = ServiceMode(replicated=ReplicatedService(replicas=2))
        update(cluster, id, lambda spec: replace(spec, mode=fewer))
        cluster.run_until(lambda: cluster.containers("web") == 2, within_s=30)


@needs(in_force.DUE_TIMES)
def test_a_node_that_is_back_gets_no_task_of_a_run_that_began_without_it() -> None:
    with a_cluster(6) as cluster:
        job = replace(a_service_spec("report", image="job:1"), mode=ServiceMode(global_job=GlobalJob()))
        create(cluster, with_labels(job, {CRON: "*/2 * * * *", CRON_DEADLINE: "20s"}))
        away = cluster.workers[0]
        cluster.kill_node(away)
        cluster.run_until(lambda: cluster.created("report") == len(cluster.workers) - 1, within_s=180)
        cluster.run_for(60)
        cluster.start_node(away)
        cluster.run_for(30)
        cluster.check_invariants()
        assert cluster.created("report") == len(cluster.workers) - 1


@needs(in_force.REMAINS)
def test_nothing_of_a_removed_node_is_left_with_a_global_service() -> None:
    with a_cluster(7) as cluster:
        create(cluster, a_service_spec("agent", image="app:1", is_global=True))
        cluster.run_until(lambda: cluster.running("agent") == len(cluster.workers), within_s=30)
        gone = cluster.workers[0]
        cluster.kill_node(gone)
        cluster.forget(gone)
        cluster.run_for(30)
        assert cluster.view.lookup(Node, gone) is None
        assert not cluster.view.find(Task, node_id=gone)


@needs(in_force.ONLY_COPIES)
def test_a_node_with_the_only_data_of_a_slot_is_not_removed_as_lost() -> None:
    with a_cluster(8) as cluster:
        mount = Mount(type="volume", source="db-{{.Task.Slot}}", target="/data")
        spec = mounting(a_service_spec("db", image="app:1", replicas=1, restart=SOON), mount)
        id = create(cluster, with_labels(spec, {VOLUMES: "keep"}))
        cluster.run_until(lambda: cluster.running("db") == 1, within_s=30)
        cluster.run_for(15)
        node = home(cluster, "db")
        none = ServiceMode(replicated=ReplicatedService(replicas=0))
        update(cluster, id, lambda spec: replace(spec, mode=none))
        cluster.run_until(lambda: not cluster.tasks("db"), within_s=30)
        cluster.write(remove_lost_nodes)
        cluster.kill_node(node)
        cluster.run_for(LOST_S)
        cluster.check_invariants(at_rest=False)
        assert cluster.view.lookup(Node, node) is not None


@needs(in_force.RETRIES)
def test_a_retried_job_has_its_attempts_by_whatever_clock_its_leader_has() -> None:
    with a_cluster(9) as cluster:
        policy = RestartPolicy(condition=RestartCondition.ON_FAILURE, max_attempts=1, delay=0)
        mode = ServiceMode(replicated_job=ReplicatedJob(max_concurrent=2, total_completions=2))
        id = create(cluster, replace(a_service_spec("job", image="crashing:1", restart=policy), mode=mode))
        cluster.run_until(lambda: cluster.created("job") == 4, within_s=60)
        cluster.run_for(10)
        for manager in cluster.managers:
            cluster.clocks[manager].wall_off_s -= 60.0
        cluster.depose()
        cluster.run_for(5)
        cluster.write(lambda tx: retry_job(tx, id))
        cluster.run_for(10)
        assert cluster.created("job") == 8
        cluster.check_invariants(at_rest=False)
