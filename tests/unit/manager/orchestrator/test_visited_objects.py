"""What one event costs the orchestrator does not depend on the size of the cluster."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from random import Random

import pytest
from msgspec.structs import replace

from sim.world.time import VirtualClock, VirtualLoop
from skep.manager.control_loops.informer import BATCH
from skep.manager.orchestrator.loop import Orchestrator
from skep.manager.orchestrator.state import OrchestratorState
from skep.model.node import Availability, Node, NodeState
from skep.model.options.autoscaling import with_replicas
from skep.model.options.labels import DRAIN_NOW
from skep.model.options.slot_volumes import SLOT_VOLUMES_LABEL
from skep.model.service import GlobalJob, JobStatus, Service, ServiceMode
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId
from skep.store.interface import Commit, Created, Deleted, Transaction
from skep.store.memory import MemoryStore
from skep.store.transactions.updates import batched
from tests.support.builders import a_node, a_service, a_service_spec, a_task
from tests.support.managers.rollouts import AT_ONCE
from tests.support.managers.visited_objects import CountingStore

NODES, GLOBALS, REPLICATED = 300, 4, 3
OBJECTS_PER_NODE = 25 * (GLOBALS + 1 + REPLICATED)
"""At most so many objects for each service with a slot on a node."""


class Large:
    """An orchestrator that has converged a cluster in which every node has a task of every service."""

    def __init__(self, *, has_job: bool) -> None:
        self.loop = VirtualLoop()
        self.clock = VirtualClock(self.loop)
        self.store = MemoryStore(self.clock)
        self.counts = CountingStore(self.store)
        ids = iter(range(1, 1_000_000))
        self._fill(has_job)
        orchestrator = Orchestrator(self.counts, self.clock, lambda: f"t{next(ids):06}", Random(1))
        self._running = self.loop.create_task(orchestrator.run())
        self.loop.run_until_complete(self.clock.sleep(10))

    def _fill(self, has_job: bool) -> None:
        nodes = [a_node(f"n{number:03}") for number in range(NODES)]
        job = replace(a_service_spec("job"), mode=ServiceMode(global_job=GlobalJob()))
        services = (
            *(a_service(f"agent{n}", is_global=True, restart=AT_ONCE) for n in range(GLOBALS)),
            *([replace(a_service("job", spec=job), job_status=JobStatus())] if has_job else ()),
            *(a_service(f"web{n}", replicas=NODES, restart=AT_ONCE) for n in range(REPLICATED)),
        )
        self._write_all(nodes)
        self._write_all(services)
        for service in self.store.view().find(Service):
            self._write_all([_a_task_on(node, number, service) for number, node in enumerate(nodes, 1)])

    def _write_all(self, objects: Sequence[Node | Service | Task]) -> None:
        for some in batched(objects, 100):
            self.write(lambda tx, some=some: [tx.put(one) for one in some])

    def write(self, body: Callable[[Transaction], object]) -> None:
        self.loop.run_until_complete(self.store.update(body))

    def visited_by(self, body: Callable[[Transaction], object]) -> int:
        """Objects that the orchestrator visits after a commit."""
        self.counts.visited = 0
        self.write(body)
        self.loop.run_until_complete(self.clock.sleep(10))
        return self.counts.visited

    def close(self) -> None:
        self._running.cancel()
        with pytest.raises(asyncio.CancelledError):
            self.loop.run_until_complete(self._running)
        self.loop.close()


def _a_task_on(node: Node, number: int, service: Service) -> Task:
    slot = number if service.spec.mode.replicated is not None else 0
    task = a_task(f"{service.id}-{number - 1:03}", slot=slot, node=node.id, service=service)
    if service.job_status is None:
        return task
    iteration = service.job_status.job_iteration
    return replace(task, desired_state=TaskState.COMPLETE, job_iteration=iteration)


@pytest.fixture
def large() -> Iterator[Large]:
    it = Large(has_job=False)
    yield it
    it.close()


@pytest.fixture
def large_with_job() -> Iterator[Large]:
    """With a global job that runs on each node.  Where it ends on one, it may have ended on all."""
    it = Large(has_job=True)
    yield it
    it.close()


def change(node: str = "n007", **status: object) -> Callable[[Transaction], object]:
    def body(tx: Transaction) -> None:
        present = tx.get(Node, node)
        tx.put(replace(present, **status))

    return body


def wanted_on(large: Large, node: str) -> set[str]:
    on_it = large.store.view().find(Task, node_id=node)
    return {task.service_id for task in on_it if task.is_wanted and not task.status.state.is_terminal}


def test_a_node_that_describes_itself_anew_has_its_own_slots_decided(large_with_job: Large) -> None:
    node = large_with_job.store.view().get(Node, "n007")
    engine = replace(node.description.engine, labels={"disk": "full"})
    described = replace(node.description, engine=engine)
    assert 0 < large_with_job.visited_by(change(description=described)) <= OBJECTS_PER_NODE


def test_slots_that_used_volumes_of_a_node_have_nothing_decided(large_with_job: Large) -> None:
    node = large_with_job.store.view().get(Node, "n007")
    engine = replace(node.description.engine, labels={SLOT_VOLUMES_LABEL: "data=web0.7@1763894400000"})
    described = replace(node.description, engine=engine)
    assert large_with_job.visited_by(change(description=described)) <= 2


def test_a_node_that_goes_down_and_returns_has_its_own_slots_decided(large: Large) -> None:
    node = large.store.view().get(Node, "n007")
    down = replace(node.status, state=NodeState.DOWN)
    assert (
        large.visited_by(change(status=down)) <= 4 * OBJECTS_PER_NODE
    )  # each slot again after each of its changes
    assert wanted_on(large, "n007") == set()
    assert large.visited_by(change(status=node.status)) <= 4 * OBJECTS_PER_NODE
    assert {id for id in wanted_on(large, "n007") if id.startswith("agent")} == {
        f"agent{n}" for n in range(GLOBALS)
    }


def test_a_drained_node_has_its_own_slots_decided(large: Large) -> None:
    node = large.store.view().get(Node, "n007")
    drained = replace(node.spec, availability=Availability.DRAIN, labels={DRAIN_NOW: "true"})
    assert large.visited_by(change(spec=drained)) <= 6 * OBJECTS_PER_NODE
    assert wanted_on(large, "n007") == set()


def test_a_new_node_gets_a_task_of_each_global_service_without_a_look_at_other_nodes(
    large_with_job: Large,
) -> None:
    assert large_with_job.visited_by(lambda tx: tx.put(a_node("n999"))) <= 4 * OBJECTS_PER_NODE
    assert wanted_on(large_with_job, "n999") == {*(f"agent{n}" for n in range(GLOBALS)), "job"}


def test_a_removed_node_has_its_own_slots_decided(large: Large) -> None:
    assert large.visited_by(lambda tx: tx.delete(Node, "n007")) <= 6 * OBJECTS_PER_NODE
    assert wanted_on(large, "n007") == set()


def test_a_task_that_ends_has_its_own_slot_decided(large: Large) -> None:
    for id in ("web1-007", "agent1-007"):
        task = large.store.view().get(Task, id)
        failed = replace(task, status=replace(task.status, state=TaskState.FAILED))
        assert 0 < large.visited_by(lambda tx, failed=failed: tx.put(failed)) <= 200


def test_a_node_that_completes_its_run_of_a_job_has_its_own_slot_decided(large_with_job: Large) -> None:
    task = large_with_job.store.view().get(Task, "job-007")
    done = replace(task, status=replace(task.status, state=TaskState.COMPLETE))
    assert 0 < large_with_job.visited_by(lambda tx: tx.put(done)) <= OBJECTS_PER_NODE


def test_a_change_of_the_service_has_all_its_slots_decided(large: Large) -> None:
    def scale(tx: Transaction) -> None:
        service = tx.get(Service, "web0")
        tx.put(replace(service, spec=with_replicas(service.spec, NODES + 5)))

    assert large.visited_by(scale) >= NODES
    tasks = large.store.view().find(Task, service_id="web0")
    assert len([task for task in tasks if task.is_wanted]) == NODES + 5
    assert {task.node_id for task in tasks if task.slot > NODES} == {NodeId("")}


def test_a_snapshot_of_many_services_is_loaded_in_slices() -> None:
    """A service that is created or removed meanwhile is known as it is then."""
    loop = VirtualLoop()
    clock = VirtualClock(loop)
    store = MemoryStore(clock)

    def write(body: Callable[[Transaction], object]) -> int:
        loop.run_until_complete(store.update(body))
        return store.view().revision

    services = [a_service(f"s{number:04}", is_global=number % 2 == 0) for number in range(4 * BATCH)]
    for some in batched(services, 100):
        write(lambda tx, some=some: [tx.put(one) for one in some])
    counts = CountingStore(store)
    state = OrchestratorState(counts, clock, Random(1))
    first, last, added = services[0], services[-2], a_service("s9999", is_global=True)
    visited = []
    for number, _ in enumerate(state.start(counts.view())):
        visited.append(counts.visited)
        counts.visited = 0
        if number == 1:
            state.on_commit(Commit(write(lambda tx: tx.delete(Service, first.id)), (Deleted(first),)))
            state.on_commit(Commit(write(lambda tx: tx.delete(Service, last.id)), (Deleted(last),)))
            state.on_commit(Commit(write(lambda tx: tx.put(added)), (Created(added),)))
    assert len(visited) >= 5
    assert max(visited) <= 3 * BATCH, "each slice reads some services, and the priority of each"
    expected = {one.id for one in (*services, added) if one.spec.mode.global_ is not None}
    assert state.global_services == expected - {first.id, last.id}
    due = state.queue.take_due(10 * BATCH)
    assert {one.id for one in (*services, added)} == set(due)
    assert len(due) == len(set(due))
    loop.close()
