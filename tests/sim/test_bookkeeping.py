"""Rules on what managers remember reject what they should, and nothing else."""

from collections.abc import Callable, Iterator

import pytest

from sim.cluster import TIMERS_MAX, SimulatedCluster
from sim.invariants.bookkeeping import cache_differences
from sim.world.manager import SimulatedManager
from skep.manager.allocator.loop import Allocator
from skep.manager.orchestrator.loop import Orchestrator
from skep.manager.scheduler.loop import Scheduler
from skep.model.network import Network
from skep.model.service import PortConfig
from skep.model.values.ids import NodeId, ServiceId, TaskId
from tests.support.builders import a_service_spec

M1 = NodeId("m1")


@pytest.fixture(scope="module")
def cluster() -> Iterator[SimulatedCluster]:
    """A service with a published port runs, and another one that was scaled down is gone."""
    with SimulatedCluster(managers=1, workers=2, seed=1) as cluster:
        cluster.create(
            a_service_spec("web", replicas=3, ports=(PortConfig(target_port=80, published_port=8080),))
        )
        cluster.create(a_service_spec("app", replicas=2))
        cluster.run_until(lambda: cluster.running("web") == 3 and cluster.running("app") == 2, within_s=30)
        cluster.remove("app")
        cluster.run_until(lambda: cluster.service("app") is None, within_s=30)
        cluster.run_for(5.0)
        yield cluster


def reported(cluster: SimulatedCluster) -> list[str]:
    manager = cluster.running_managers[M1]
    return list(cache_differences(manager.loops, cluster.view))


def test_indexes_at_rest_are_as_the_store_has_them_and_nothing_is_left_over(
    cluster: SimulatedCluster,
) -> None:
    assert reported(cluster) == []
    assert cluster.leftovers() == []
    assert cluster.observer.violations == []


def a_loop(cluster: SimulatedCluster, kind: type) -> object:
    return next(loop for loop in cluster.running_managers[M1].loops if isinstance(loop, kind))


def an_address_too_many(cluster: SimulatedCluster) -> Callable[[], object]:
    loop = a_loop(cluster, Allocator)
    assert isinstance(loop, Allocator)
    network = next(one for one in cluster.view.find(Network) if one.spec.ingress)
    loop.state.allocations.allocate("gone", network)
    return lambda: loop.state.allocations.addresses.release("gone")


def a_place_too_many(cluster: SimulatedCluster) -> Callable[[], object]:
    loop = a_loop(cluster, Scheduler)
    assert isinstance(loop, Scheduler)
    task = cluster.wanted("web")[0]
    loop.state.accounting.remove(task.id)
    return lambda: loop.state.accounting.add(task, ())


def a_service_forgotten(cluster: SimulatedCluster) -> Callable[[], object]:
    loop = a_loop(cluster, Orchestrator)
    assert isinstance(loop, Orchestrator)
    loop.state.global_services.add(ServiceId("gone"))
    return lambda: loop.state.global_services.discard(ServiceId("gone"))


def a_stamp_too_many(cluster: SimulatedCluster) -> Callable[[], object]:
    loop = a_loop(cluster, Orchestrator)
    assert isinstance(loop, Orchestrator)
    loop.state.seen.created_times[TaskId("gone")] = 1.0
    return lambda: loop.state.seen.created_times.pop(TaskId("gone"))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (an_address_too_many, "allocator: addresses are not as in the store"),
        (a_place_too_many, "scheduler: copies are not as in the store"),
        (a_service_forgotten, "orchestrator: global are not as in the store"),
        (a_stamp_too_many, "orchestrator: keeps when task gone, which is gone, was created"),
    ],
)
def test_indexes_that_differ_are_rejected_at_the_second_check(
    cluster: SimulatedCluster, spoil: Callable[[SimulatedCluster], Callable[[], object]], words: str
) -> None:
    undo = spoil(cluster)
    cluster.label(NodeId("w1"), changed=words)  # books are looked at when something was written
    try:
        cluster.run_for(0.1)
        assert cluster.observer.violations == []
        cluster.run_for(0.1)
        assert any(words in violation for violation in cluster.observer.violations)
    finally:
        undo()
        cluster.observer.violations.clear()
        cluster.run_for(0.1)
    assert cluster.observer.violations == []


def a_stop_that_is_delayed(manager: SimulatedManager) -> Callable[[], object]:
    assert manager.dispatcher is not None
    delayed = manager.dispatcher.stops.delayed
    delayed[TaskId("t1")] = None
    return delayed.clear


def an_absence_of_a_node_that_is_gone(manager: SimulatedManager) -> Callable[[], object]:
    assert manager.dispatcher is not None
    sessions = manager.dispatcher.sessions
    sessions.expect(NodeId("w9"), next(iter(sessions.all())).id, last_seen=0.0, grace_s=1e9)
    return lambda: sessions.absent.pop(NodeId("w9"))


def a_waiter_for_a_revision(manager: SimulatedManager) -> Callable[[], object]:
    assert manager.store is not None
    waiting = manager.store.replica.waiting
    waiting.append((1, 10**9, None))  # type: ignore[arg-type]
    return waiting.clear


@pytest.mark.parametrize(
    ("leave", "words"),
    [
        (a_stop_that_is_delayed, "m1 delays the stop of ['t1']"),
        (an_absence_of_a_node_that_is_gone, "m1 has a session of w9, which is gone"),
        (a_waiter_for_a_revision, "m1 keeps 1 tasks that wait for a revision"),
    ],
)
def test_what_is_left_over_is_rejected(
    cluster: SimulatedCluster, leave: Callable[[SimulatedManager], Callable[[], object]], words: str
) -> None:
    clear = leave(cluster.running_managers[M1])
    found = cluster.leftovers()
    clear()
    assert found == [words]
    assert cluster.leftovers() == []


def test_leaked_timers_are_rejected(cluster: SimulatedCluster) -> None:
    timers = [cluster.loop.call_later(1000.0, print) for _ in range(4 * TIMERS_MAX)]
    assert "timers run" in cluster.leftovers()[0]
    for timer in timers:
        timer.cancel()
    assert cluster.leftovers() == []
