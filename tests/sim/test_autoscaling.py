"""Autoscaled services on simulated nodes that report a load, with changes of leader and faults."""

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from sim.cluster import SimulatedCluster
from sim.faults.damping import pass_time
from sim.users.random_specs import with_image
from skep.manager.autoscaling.decision import PERIOD_S
from skep.model.options.autoscaling import with_replicas
from skep.model.service import GlobalService, ServiceMode, ServiceSpec
from skep.model.task import Task
from skep.model.values.ids import NodeId, ServiceId
from tests.support.builders import a_service_spec

CPU = 1_000_000_000
MEASURED_S = PERIOD_S + 10.0
"""From a step of the load until the first decision that sees all of it: the average of a node, and a period."""
SEEDS = (0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2)))


def autoscaled(least: int, most: int, *, replicas: int, down_after: str = "5m", cpu: int = 50) -> ServiceSpec:
    labels = {
        "skep.autoscale": f"{least}..{most}",
        "skep.autoscale.cpu": str(cpu),
        "skep.autoscale.down-after": down_after,
    }
    return replace(a_service_spec(replicas=replicas), labels=labels)


def spread_load(cluster: SimulatedCluster, cpus: Callable[[float], float]) -> None:
    """The running tasks of the service share a load of so many processors, at a time."""

    def of_task(task: Task) -> int:
        return round(cpus(cluster.loop.time()) * CPU / max(cluster.containers("web"), 1))

    cluster.nano_cpus = of_task


def replicas(cluster: SimulatedCluster) -> int:
    service = cluster.service("web")
    assert service is not None
    return service.spec.replicas


@pytest.mark.parametrize("seed", SEEDS)
def test_a_step_of_the_load_is_met_within_three_periods_and_the_number_then_stands(seed: int) -> None:
    with SimulatedCluster(workers=2, seed=seed) as cluster:
        cluster.create(autoscaled(2, 12, replicas=2))
        began = cluster.loop.time()
        spread_load(cluster, lambda now: 4.9 if now - began > 100 else 0.9)
        cluster.run_for(99.0)
        assert replicas(cluster) == 2
        cluster.run_until(lambda: replicas(cluster) == 10, within_s=MEASURED_S + 2 * PERIOD_S)
        pass_time(cluster, 300.0)
        assert replicas(cluster) == 10
        cluster.check_invariants()


@pytest.mark.parametrize("seed", SEEDS)
def test_changes_of_leader_change_nothing_under_a_steady_load(seed: int) -> None:
    with SimulatedCluster(managers=3, workers=2, seed=seed) as cluster:
        spread_load(cluster, lambda _: 2.9)
        cluster.create(autoscaled(2, 10, replicas=6, down_after="1m"))
        for turn in range(6):
            pass_time(cluster, cluster.random.uniform(5.0, 60.0))
            if turn % 3:
                cluster.depose(quietly=turn % 2 == 0)
            else:
                id = cluster.leader
                cluster.crash(id)
                pass_time(cluster, 8.0)
                cluster.start_manager(id)
        assert replicas(cluster) == 6
        cluster.check_invariants()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_load_that_comes_and_goes_under_changing_leaders_keeps_the_rules(seed: int) -> None:
    with SimulatedCluster(managers=3, workers=2, seed=seed) as cluster:
        level = [1.0]
        spread_load(cluster, lambda _: level[0])
        cluster.create(autoscaled(1, 12, replicas=3, down_after="90s"))
        for _ in range(8):
            level[0] = cluster.random.uniform(0.0, 8.0)
            pass_time(cluster, cluster.random.uniform(10.0, 120.0))
            if cluster.random.random() < 0.4:
                cluster.depose(quietly=cluster.random.random() < 0.5)
        assert not cluster.observer.violations


@pytest.mark.parametrize("seed", SEEDS[:1])
def test_nothing_is_scaled_without_data(seed: int) -> None:
    with SimulatedCluster(managers=3, workers=2, seed=seed) as cluster:
        cluster.create(autoscaled(1, 10, replicas=4, down_after="30s"))
        pass_time(cluster, 180.0)
        assert replicas(cluster) == 4
        cluster.check_invariants()


def test_nodes_that_report_nothing_do_not_shrink_a_service() -> None:
    """The tasks of the other nodes are idle."""
    with SimulatedCluster(managers=3, workers=3, seed=1) as cluster:
        cluster.create(autoscaled(1, 10, replicas=6, down_after="30s"))
        cluster.nano_cpus = lambda task: 0 if task.node_id != "w1" else None
        pass_time(cluster, 150.0)
        assert replicas(cluster) == 6
        cluster.nano_cpus = lambda _: 0
        cluster.run_until(lambda: replicas(cluster) == 1, within_s=90.0)
        assert not cluster.observer.violations


def test_less_load_gives_tasks_up_after_the_window() -> None:
    with SimulatedCluster(managers=3, workers=2, seed=2) as cluster:
        spread_load(cluster, lambda _: 0.4)
        cluster.create(autoscaled(2, 10, replicas=8, down_after="2m"))
        pass_time(cluster, 115.0)
        assert replicas(cluster) == 8
        cluster.run_until(lambda: replicas(cluster) == 2, within_s=60.0)
        cluster.run_until(lambda: cluster.containers("web") == 2, within_s=30.0)
        pass_time(cluster, 10.0)
        cluster.check_invariants()


def test_a_number_set_by_hand_outside_of_the_range_is_brought_back_without_any_data() -> None:
    with SimulatedCluster(seed=3) as cluster:
        cluster.create(autoscaled(2, 5, replicas=9))
        cluster.run_until(lambda: replicas(cluster) == 5, within_s=30.0)
        service = cluster.service("web")
        assert service is not None
        assert service.autoscaled is not None
        assert service.autoscaled.reason == "9 is outside the range 2 to 5"


def test_a_service_whose_decision_fails_holds_up_neither_the_leader_nor_the_others() -> None:
    with SimulatedCluster(managers=3, workers=2, seed=4) as cluster:
        leader = cluster.leader
        cluster.poisoned.add("bad")
        cluster.create(replace(autoscaled(2, 5, replicas=9), name="bad"))
        cluster.create(autoscaled(2, 5, replicas=9))
        cluster.run_until(lambda: replicas(cluster) == 5, within_s=30.0)
        assert cluster.leader == leader
        cluster.poisoned.clear()
        cluster.run_until(lambda: cluster.service("bad").spec.replicas == 5, within_s=30.0)  # type: ignore[union-attr]


def queried(least: int, most: int, **labels: str) -> ServiceSpec:
    named = {f"skep.autoscale.{name.replace('_', '-')}": value for name, value in labels.items()}
    spec = autoscaled(least, most, replicas=least, down_after="30s")
    kept = {name: text for name, text in spec.labels.items() if name != "skep.autoscale.cpu"}
    return replace(spec, labels={**kept, **named})


PROMETHEUS = {"prometheus": "http://prometheus", "query": "sum(x)", "query_target": "10"}


@pytest.mark.parametrize("seed", SEEDS)
def test_the_figure_of_a_query_decides_and_a_query_that_fails_removes_no_task(seed: int) -> None:
    with SimulatedCluster(managers=3, workers=2, seed=seed) as cluster:
        figure: list[float | None] = [20.0]
        cluster.network.figure = lambda asked, now: figure[0]
        cluster.create(queried(1, 12, **PROMETHEUS))
        cluster.run_until(lambda: replicas(cluster) == 2, within_s=3 * PERIOD_S)
        figure[0] = 75.0
        cluster.run_until(lambda: replicas(cluster) == 8, within_s=4 * PERIOD_S)
        figure[0] = None
        pass_time(cluster, 300.0)
        assert replicas(cluster) == 8
        service = cluster.service("web")
        assert service is not None
        assert service.autoscaling_problem == "query not known: connection refused"
        cluster.depose(quietly=False)
        pass_time(cluster, 120.0)
        service = cluster.service("web")
        assert service is not None
        assert service.autoscaling_problem, "the next leader has not asked with success"
        figure[0] = 0.0
        cluster.run_until(lambda: replicas(cluster) == 1, within_s=180.0)
        service = cluster.service("web")
        assert service is not None
        assert service.autoscaling_problem == ""
        pass_time(cluster, 60.0)
        cluster.check_invariants()


def test_a_failed_query_is_no_problem_of_a_service_without_autoscaling() -> None:
    with SimulatedCluster(managers=1, workers=1, seed=1) as cluster:
        cluster.network.figure = lambda asked, now: None
        cluster.create(queried(1, 12, **PROMETHEUS))

        def problem() -> str:
            service = cluster.service("web")
            assert service is not None
            return service.autoscaling_problem

        cluster.run_until(lambda: bool(problem()), within_s=180.0)
        cluster.update("web", lambda spec: replace(spec, labels={}))
        cluster.run_until(lambda: not problem(), within_s=3 * PERIOD_S)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_command_decides_while_a_task_of_its_service_runs(seed: int) -> None:
    with SimulatedCluster(managers=3, workers=2, seed=seed) as cluster:
        cluster.network.figure = lambda asked, now: 60.0 if asked.query.command else None
        command = {"queue.exec": "llen jobs", "queue.exec-in": "queue", "queue_target": "20"}
        cluster.create(queried(1, 6, **command))
        cluster.run_until(lambda: bool(problem_of(cluster)), within_s=180.0)
        assert "services without a stack has no service queue" in problem_of(cluster)
        assert replicas(cluster) == 1
        cluster.create(replace(a_service_spec(replicas=1), name="queue"))
        cluster.run_until(lambda: replicas(cluster) == 3 and not problem_of(cluster), within_s=180.0)
        cluster.update("queue", lambda spec: with_replicas(spec, 0))
        cluster.network.figure = lambda asked, now: 0.0
        pass_time(cluster, 300.0)
        assert replicas(cluster) == 3, "an unknown length removes no task"
        assert "no task of service queue runs" in problem_of(cluster)
        cluster.check_invariants()


def problem_of(cluster: SimulatedCluster) -> str:
    service = cluster.service("web")
    assert service is not None
    return service.autoscaling_problem


@pytest.mark.parametrize("seed", SEEDS)
def test_a_query_that_fails_keeps_neither_other_measures_nor_other_services_from_scaling(seed: int) -> None:
    with SimulatedCluster(managers=3, workers=2, seed=seed) as cluster:
        cluster.network.figure = lambda asked, now: 60.0 if asked.query.host == "queue" else None
        cluster.create(queried(1, 6, **PROMETHEUS, queue="http://queue", queue_target="20"))
        cluster.create(replace(queried(1, 6, queue="http://queue", queue_target="15"), name="other"))
        cluster.run_until(lambda: replicas(cluster) == 3, within_s=5 * PERIOD_S)
        other = cluster.service("other")
        assert other is not None
        assert other.spec.replicas == 4
        cluster.check_invariants()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_schedule_raises_and_lowers_the_number_at_its_times(seed: int) -> None:
    with SimulatedCluster(managers=3, workers=2, seed=seed) as cluster:
        spread_load(cluster, lambda _: 1.0)
        cluster.create(queried(1, 9, schedule="*/10 * * * * 6..9; 5-59/10 * * * * 1..3"))
        seen = set()
        for _ in range(80):
            cluster.run_for(PERIOD_S)
            seen.add(replicas(cluster))
        assert {6, 3} <= seen
        assert max(seen) == 6
        cluster.check_invariants()


IDLE_S = 30.0
HELD_S = 30.0
"""For as long as a node holds a request."""


def with_door(cluster: SimulatedCluster) -> None:
    """Run the front door on every worker, and a service behind it that may be scaled to zero."""
    mode = ServiceMode(global_=GlobalService())
    door = replace(a_service_spec("door"), mode=mode, labels={"skep.door": "true"})
    cluster.create(door)
    labels = {"skep.autoscale": "0..3", "skep.autoscale.idle-after": f"{IDLE_S:g}s", "skep.http": "a.example"}
    cluster.create(replace(a_service_spec(replicas=1), labels=labels))
    cluster.run_until(lambda: cluster.containers("web") == 1 and cluster.containers("door") == 3, within_s=30)
    for node in cluster.nodes.values():
        node.door.request(ServiceId("web"), is_served=True)


def ask(cluster: SimulatedCluster, at: NodeId) -> None:
    """Send a request through a node, and wait until a task serves it."""
    door = cluster.nodes[at].door
    door.request(ServiceId("web"), is_served=bool(cluster.containers("web")))
    cluster.run_until(lambda: bool(cluster.containers("web")), within_s=HELD_S)
    door.release(ServiceId("web"))


@pytest.mark.parametrize("seed", SEEDS)
def test_an_idle_service_has_no_task_and_each_request_is_served_whatever_happens(seed: int) -> None:
    with SimulatedCluster(managers=3, workers=3, seed=seed) as cluster:
        random = cluster.random
        with_door(cluster)
        for _ in range(12):
            cluster.run_for(random.choice((0.1, 5.0, IDLE_S, 90.0)))
            action = random.choice(("ask", "ask", "ask", "depose", "update"))
            if action == "depose":
                cluster.depose(quietly=random.random() < 0.5)
            elif action == "update":
                image = random.choice(("app:2", "app:3"))
                cluster.update("web", lambda spec, image=image: with_image(spec, image))  # type: ignore[misc]
            ask(cluster, random.choice(sorted(cluster.workers)))
            assert cluster.service("web").spec.replicas  # type: ignore[union-attr]
        cluster.run_until(lambda: replicas(cluster) == 0, within_s=IDLE_S + 2 * PERIOD_S + 120.0)
        cluster.run_until(lambda: not cluster.containers("web"), within_s=30.0)
        cluster.run_until(lambda: not cluster.rest_violations(), within_s=15.0)
        cluster.check_invariants()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_websocket_that_begins_right_before_the_last_task_would_end_keeps_it(seed: int) -> None:
    with SimulatedCluster(workers=3, seed=seed) as cluster:
        with_door(cluster)
        door = cluster.nodes[sorted(cluster.workers)[0]].door
        for _ in range(8):
            cluster.run_for(cluster.random.uniform(IDLE_S, IDLE_S + PERIOD_S))
            if not replicas(cluster):
                ask(cluster, sorted(cluster.workers)[1])
                continue
            door.open.add(ServiceId("web"))
            cluster.run_for(2 * PERIOD_S)
            assert replicas(cluster) == 1, "no report has the WebSocket yet"
            door.open.clear()
            door.request(ServiceId("web"), is_served=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_silent_door_keeps_the_last_task_until_its_node_is_down(seed: int) -> None:
    with SimulatedCluster(workers=3, seed=seed) as cluster:
        with_door(cluster)
        silent = cluster.nodes[sorted(cluster.workers)[0]].door
        silent.requested_at.clear()
        cluster.run_for(4 * IDLE_S)
        assert replicas(cluster) == 1, "a node does not know whether it has requests"
        silent.request(ServiceId("web"), is_served=True)
        cluster.run_until(lambda: replicas(cluster) == 0, within_s=IDLE_S + 2 * PERIOD_S + 15.0)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_door_with_requests_keeps_the_last_task(seed: int) -> None:
    with SimulatedCluster(workers=3, seed=seed) as cluster:
        with_door(cluster)
        for _ in range(12):
            cluster.run_for(IDLE_S / 2)
            ask(cluster, sorted(cluster.workers)[0])
            assert replicas(cluster) == 1
