"""Services that wait for others, kept by the cluster: at their creation, at updates, and after a loss of power."""

from collections.abc import Iterable

import pytest
from msgspec.structs import replace

from sim.cluster import SimulatedCluster
from sim.invariants.services.dependencies import UNNOTICED_S, DependenciesComeFirst
from skep.model.node import Availability, Node
from skep.model.options.dependencies import DEPENDS_ON
from skep.model.options.labels import STOPPED
from skep.model.service import (
    GlobalJob,
    JobStatus,
    Placement,
    ReplicatedJob,
    Resources,
    RestartCondition,
    RestartPolicy,
    Service,
    ServiceMode,
    ServiceSpec,
)
from skep.model.task import Task, TaskState, TaskStatus
from skep.model.values.ids import ServiceId
from skep.model.values.times import SECOND_NS, Timestamp
from tests.sim.histories import W1, History, a_task
from tests.support.builders import a_service_spec
from tests.support.managers.sim_services import with_image

SEEDS = range(6)
LATER = Timestamp("2999-01-01T00:00:00Z")
ONCE = RestartPolicy(condition=RestartCondition.NONE)
SOON = RestartPolicy(delay=SECOND_NS // 2)


def waiting(spec: ServiceSpec, text: str) -> ServiceSpec:
    return replace(spec, labels={DEPENDS_ON: text})


def a_shop(cluster: SimulatedCluster, *, order: Iterable[str] = ("web", "migrate", "db")) -> None:
    """A web service behind a migration behind a database, created in this order."""
    for node in cluster.nodes.values():
        node.ending_images["migrate:1"] = (0.5, 0)
    specs = {
        "db": a_service_spec("db", restart=SOON),
        "migrate": waiting(a_service_spec("migrate", image="migrate:1", restart=ONCE), "db=service_healthy"),
        "web": waiting(
            a_service_spec("web", replicas=3, restart=SOON), "migrate=service_completed_successfully"
        ),
    }
    for name in order:
        cluster.create(specs[name])


def reasons(cluster: SimulatedCluster, name: str) -> set[str]:
    return {task.status.err for task in cluster.wanted(name) if task.status.state is TaskState.PENDING}


def lose_power(cluster: SimulatedCluster, for_s: float) -> None:
    """All machines at once."""
    for manager in cluster.managers:
        cluster.crash(manager)
    for worker in cluster.workers:
        cluster.kill_node(worker)
    cluster.run_for(for_s)


def test_a_service_starts_after_one_whose_name_its_label_writes_in_another_case() -> None:
    with SimulatedCluster(workers=2, seed=1) as cluster:
        cluster.create(waiting(a_service_spec("web"), "DB=service_healthy"))
        cluster.run_for(5.0)
        assert reasons(cluster, "web") == {"waits for DB, which does not exist"}
        cluster.create(a_service_spec("db"))
        cluster.run_until(lambda: cluster.running("web") == 1, within_s=10)


@pytest.mark.parametrize("seed", SEEDS)
def test_services_start_in_the_order_of_their_dependencies(seed: int) -> None:
    with SimulatedCluster(workers=3, seed=seed) as cluster:
        a_shop(cluster, order=("web", "migrate"))
        cluster.run_for(3)
        assert reasons(cluster, "migrate") == {"waits for db, which does not exist"}
        assert reasons(cluster, "web") == {
            "waits for migrate to complete, which waits for db, which does not exist"
        }
        assert cluster.containers("web") == cluster.containers("migrate") == 0
        cluster.create(a_service_spec("db"))
        cluster.run_until(lambda: cluster.running("web") == 3, within_s=5)
        cluster.check_invariants()


@pytest.mark.parametrize("seed", SEEDS)
def test_after_a_loss_of_power_the_order_holds_whichever_node_is_back_first(seed: int) -> None:
    """Nobody reports that the containers are gone but their nodes, each when it is back."""
    with SimulatedCluster(managers=3, workers=3, seed=seed) as cluster:
        a_shop(cluster)
        cluster.run_until(lambda: cluster.running("web") == 3, within_s=15)
        created = cluster.created("migrate")
        lose_power(cluster, UNNOTICED_S + 20)
        home = next(task.node_id for task in cluster.wanted("db"))
        for manager in cluster.managers:
            cluster.start_manager(manager)
        others = [worker for worker in cluster.workers if worker != home]
        cluster.random.shuffle(others)
        cluster.start_node(others[0])
        cluster.run_for(cluster.random.uniform(0, 8))
        assert cluster.containers("web") == 0, "it did not wait for db"
        cluster.start_node(others[1])
        cluster.start_node(home)
        cluster.run_until(lambda: cluster.containers("web") == 3 == cluster.running("web"), within_s=60)
        assert cluster.running("db") == 1
        assert cluster.created("migrate") == created, "what has completed does not run again"
        cluster.check_invariants()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_service_that_runs_is_scaled_and_restarted_without_what_it_depends_on(seed: int) -> None:
    with SimulatedCluster(workers=3, seed=seed) as cluster:
        cluster.create(a_service_spec("db"))
        cluster.create(waiting(a_service_spec("web", replicas=2, restart=SOON), "db=service_healthy"))
        cluster.run_until(lambda: cluster.running("web") == 2, within_s=5)
        cluster.remove("db")
        cluster.run_until(lambda: cluster.containers("db") == 0, within_s=5)
        cluster.kill_container(cluster.wanted("web")[0])
        cluster.run_until(lambda: cluster.running("web") == 1, within_s=5)
        cluster.run_until(lambda: cluster.running("web") == 2, within_s=5)


@pytest.mark.parametrize("seed", SEEDS)
def test_an_update_waits_and_the_old_tasks_serve_meanwhile(seed: int) -> None:
    with SimulatedCluster(workers=3, seed=seed) as cluster:
        job = ServiceMode(replicated_job=ReplicatedJob(max_concurrent=1, total_completions=1))
        for node in cluster.nodes.values():
            node.ending_images["job:1"] = (20.0, 0)
        spec = replace(a_service_spec("migrate", image="job:1", restart=ONCE), mode=job)
        cluster.write(lambda tx: tx.put(Service(id=ServiceId("migrate"), spec=spec, job_status=JobStatus())))
        text = "migrate=service_completed_successfully"
        cluster.create(
            waiting(
                a_service_spec("web", replicas=2, image="app:1", reserve=Resources(memory_bytes=64 << 20)),
                text,
            )
        )
        cluster.run_for(10)
        assert cluster.containers("web") == 0
        cluster.run_until(lambda: cluster.running("web") == 2, within_s=20)

        def again(tx):  # type: ignore[no-untyped-def]
            migrate = tx.get(Service, "migrate")
            status = migrate.job_status
            iteration = replace(status.job_iteration, index=status.job_iteration.index + 1)
            tx.put(replace(migrate, job_status=replace(status, job_iteration=iteration)))

        cluster.write(again)
        cluster.update("web", lambda spec: with_image(spec, "app:2"))
        cluster.run_for(10)
        assert (cluster.running("web", "app:1"), cluster.running("web", "app:2")) == (2, 0)
        assert reasons(cluster, "web") == {"waits for migrate to complete"}
        cluster.run_until(lambda: cluster.running("web", "app:2") == 2, within_s=40)
        cluster.check_invariants()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_change_of_leader_does_not_hold_up_what_waits_for_long(seed: int) -> None:
    with SimulatedCluster(managers=3, workers=3, seed=seed) as cluster:
        cluster.create(a_service_spec("db"))
        cluster.run_until(lambda: cluster.running("db") == 1, within_s=5)
        cluster.crash(cluster.leader)
        cluster.create(waiting(a_service_spec("web", replicas=2), "db=service_started"))
        cluster.run_until(lambda: cluster.running("web") == 2, within_s=60)
        cluster.check_invariants()


def test_a_task_waits_while_its_dependencies_cannot_be_decided() -> None:
    with SimulatedCluster(workers=3) as cluster:
        cluster.poisoned.add("db")
        cluster.create(a_service_spec("db"))
        cluster.create(waiting(a_service_spec("web"), "db=service_healthy"))
        cluster.run_for(5)
        assert cluster.containers("web") == 0
        (reason,) = reasons(cluster, "web")
        assert reason.startswith("waits for a decision: ")
        cluster.poisoned.clear()
        cluster.run_until(lambda: cluster.running("web") == 1, within_s=30)


def test_what_is_optional_is_not_waited_for_once_it_has_failed() -> None:
    with SimulatedCluster(workers=3) as cluster:
        for node in cluster.nodes.values():
            node.ending_images["bad:1"] = (0.3, 1)
        cluster.create(a_service_spec("cache", image="bad:1", restart=ONCE))
        cluster.create(
            waiting(
                a_service_spec("web"),
                "cache=service_completed_successfully+optional,gone=service_started+optional",
            )
        )
        cluster.run_until(lambda: reasons(cluster, "web") == {"waits for cache to complete"}, within_s=5)
        cluster.run_until(lambda: cluster.running("web") == 1, within_s=10)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_restart_waits_for_the_changed_tasks_and_another_placement_is_no_change(seed: int) -> None:
    with SimulatedCluster(workers=3, seed=seed) as cluster:
        cluster.create(a_service_spec("db", image="app:1"))
        text = "db=service_started+restart"
        cluster.create(waiting(a_service_spec("web", image="app:1"), text))
        cluster.run_until(lambda: cluster.running("web") == 1, within_s=5)

        def elsewhere(spec: ServiceSpec) -> ServiceSpec:
            placement = Placement(constraints=("node.role==worker",))
            return replace(spec, task_template=replace(spec.task_template, placement=placement))

        cluster.update("db", elsewhere)
        cluster.run_for(5)
        assert cluster.created("db") == 1
        cluster.update("web", lambda spec: with_image(spec, "app:2"))
        cluster.run_until(lambda: cluster.running("web", "app:2") == 1, within_s=10)
        for node in cluster.nodes.values():
            node.broken_images.add("broken:1")
        cluster.update("db", lambda spec: with_image(spec, "broken:1"))
        cluster.update("web", lambda spec: with_image(spec, "app:3"))
        cluster.run_for(10)
        assert cluster.running("web", "app:2") == 1
        assert reasons(cluster, "web") == {"waits for db to be started"}
        cluster.update("db", lambda spec: with_image(spec, "app:4"))
        cluster.run_until(lambda: cluster.running("web", "app:3") == 1, within_s=30)


def test_a_service_that_is_scaled_to_nothing_is_not_waited_for() -> None:
    with SimulatedCluster(workers=3) as cluster:
        cluster.create(a_service_spec("db", replicas=0))
        cluster.create(waiting(a_service_spec("web"), "db=service_healthy"))
        cluster.run_until(lambda: cluster.running("web") == 1, within_s=5)


def test_a_service_that_was_removed_after_the_migration_is_not_waited_for() -> None:
    """The web service would otherwise never return after a loss of power."""
    with SimulatedCluster(managers=1, workers=2, seed=1) as cluster:
        a_shop(cluster)
        cluster.run_until(lambda: cluster.running("web") == 3, within_s=15)
        cluster.remove("db")
        cluster.run_until(lambda: cluster.containers("db") == 0, within_s=15)
        lose_power(cluster, UNNOTICED_S + 20)
        for manager in cluster.managers:
            cluster.start_manager(manager)
        for worker in cluster.workers:
            cluster.start_node(worker)
        cluster.run_until(lambda: cluster.containers("web") == 3 == cluster.running("web"), within_s=60)
        cluster.check_invariants()


def test_a_service_that_is_stopped_is_waited_for_until_it_starts() -> None:
    with SimulatedCluster(workers=3) as cluster:
        cluster.create(replace(a_service_spec("db"), labels={STOPPED: "true"}))
        cluster.create(waiting(a_service_spec("web"), "db=service_healthy"))
        reason = "waits for db to be healthy, which is stopped"
        cluster.run_until(lambda: any(t.status.err == reason for t in cluster.view.find(Task)), within_s=5)
        cluster.run_for(5)
        assert cluster.running("web") == 0
        cluster.update("db", lambda spec: replace(spec, labels={}))
        cluster.run_until(lambda: cluster.running("web") == 1, within_s=5)


def test_a_job_on_all_nodes_has_completed_without_a_node_that_was_drained_before() -> None:
    with SimulatedCluster(workers=3) as cluster:
        for node in cluster.nodes.values():
            node.ending_images["job:1"] = (5.0, 0)
        spec = replace(
            a_service_spec("job", image="job:1", restart=ONCE), mode=ServiceMode(global_job=GlobalJob())
        )
        cluster.write(
            lambda tx: tx.put(
                Service(id=ServiceId("job"), spec=spec, job_status=JobStatus(last_execution=LATER))
            )
        )
        cluster.create(waiting(a_service_spec("web"), "job=service_completed_successfully"))
        cluster.run_until(lambda: cluster.containers("job") == 3, within_s=4)
        drained = cluster.workers[0]
        cluster.write(
            lambda tx: tx.put(
                replace(
                    tx.get(Node, drained),
                    spec=replace(tx.get(Node, drained).spec, availability=Availability.DRAIN),
                )
            )
        )
        cluster.run_until(lambda: cluster.running("web") == 1, within_s=20)
        ended = {task.status.state for task in cluster.view.find(Task, node_id=drained)}
        assert TaskState.COMPLETE not in ended


def test_a_job_on_all_nodes_has_completed_without_a_node_that_it_failed_on_and_that_is_drained() -> None:
    failing = replace(ONCE, condition=RestartCondition.ON_FAILURE, delay=30 * SECOND_NS)
    with SimulatedCluster(workers=3) as cluster:
        first = cluster.workers[0]
        for id in cluster.workers:
            cluster.nodes[id].ending_images["job:1"] = (0.5, 1 if id == first else 0)
        spec = replace(
            a_service_spec("job", image="job:1", restart=failing), mode=ServiceMode(global_job=GlobalJob())
        )
        cluster.write(
            lambda tx: tx.put(
                Service(id=ServiceId("job"), spec=spec, job_status=JobStatus(last_execution=LATER))
            )
        )
        cluster.create(waiting(a_service_spec("web"), "job=service_completed_successfully"))
        cluster.run_for(5)
        assert reasons(cluster, "web") == {"waits for job to complete"}
        cluster.write(
            lambda tx: tx.put(
                replace(
                    tx.get(Node, first),
                    spec=replace(tx.get(Node, first).spec, availability=Availability.DRAIN),
                )
            )
        )
        cluster.run_until(lambda: cluster.running("web") == 1, within_s=10)


def test_services_that_wait_for_each_other_start_all_the_same() -> None:
    """Refused one by one; what two managers write at a time, or a leader rolls back, is not seen by that."""
    with SimulatedCluster(workers=3) as cluster:
        cluster.create(waiting(a_service_spec("web"), "api=service_healthy"))
        cluster.create(waiting(a_service_spec("api"), "web=service_healthy,db=service_started"))
        cluster.run_until(
            lambda: reasons(cluster, "api") == {"waits for db, which does not exist"}, within_s=5
        )
        cluster.create(a_service_spec("db"))
        cluster.run_until(lambda: cluster.running("web") == cluster.running("api") == 1, within_s=5)


# -- the rule --------------------------------------------------------------------------------------------------------


def test_the_rule_sees_a_task_that_did_not_wait() -> None:
    rule = DependenciesComeFirst()
    history = History(rule)
    web = waiting(a_service_spec("web"), "db=service_healthy")
    history.put(Service(id=ServiceId("db"), spec=a_service_spec("db")))
    history.put(Service(id=ServiceId("web"), spec=web))

    def assign(id: str) -> None:
        task = replace(a_task(id, state=TaskState.PENDING), service_id=ServiceId("web"))
        history.put(task)
        history.put(replace(task, node_id=W1, status=TaskStatus(state=TaskState.ASSIGNED)))

    database: Task = replace(a_task("d", node=W1), service_id=ServiceId("db"))
    rule.started(database)
    assign("t1")
    assert history.violations == []
    rule.ended(database.id, history.now)
    history.after(UNNOTICED_S - 1)
    assign("t2")
    assert history.violations == []
    history.after(2)
    assign("t3")
    assert history.violations == ["task t3 of web got a node, but db does not run"]


@pytest.mark.parametrize(("completions", "may_start"), [(0, True), (1, False)])
def test_the_rule_lets_tasks_start_that_depend_on_a_job_without_runs(
    completions: int, *, may_start: bool
) -> None:
    history = History(DependenciesComeFirst())
    job = ServiceMode(replicated_job=ReplicatedJob(max_concurrent=1, total_completions=completions))
    web = waiting(a_service_spec("web"), "job=service_completed_successfully")
    history.put(Service(id=ServiceId("job"), spec=replace(a_service_spec("job"), mode=job)))
    history.put(Service(id=ServiceId("web"), spec=web))
    task = replace(a_task("t1", state=TaskState.PENDING), service_id=ServiceId("web"))
    history.put(task)
    history.put(replace(task, node_id=W1, status=TaskStatus(state=TaskState.ASSIGNED)))
    assert (history.violations == []) is may_start
