"""A service of 100,000 tasks is created while others, which need a few tasks, do not wait for it."""

import asyncio
from collections.abc import Iterator, Sequence
from random import Random

import pytest
from msgspec.structs import replace

from sim.world.time import VirtualClock, VirtualLoop
from skep.manager.allocator.loop import Allocator
from skep.manager.control_loops.loops import loops
from skep.manager.orchestrator.loop import Orchestrator
from skep.model.network import Network
from skep.model.service import NetworkAttachmentConfig, Service
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId, ServiceId
from skep.store.interface import Term
from skep.store.memory import MemoryStore
from skep.store.transactions.updates import batched
from tests.support.builders import a_node, a_service, a_task, an_overlay

LARGE = 100_000
WRITE_S = 0.01
"""How long each write takes, of which ten are made at a time: all tasks of the large service take 100 s."""
SOON_S = 5.0


class Leader:
    """The control loops of a leader with three nodes, whose store takes ``WRITE_S`` for each write."""

    def __init__(self) -> None:
        self.loop = VirtualLoop()
        self.clock = VirtualClock(self.loop)
        self.store = MemoryStore(self.clock)
        self._running: list[asyncio.Task[None]] = []
        self.put([a_node(f"n{number}") for number in range(3)])

    def put(self, objects: Sequence[Service | Task | Network | object]) -> None:
        for some in batched(objects, 100):
            self.loop.run_until_complete(
                self.store.update(lambda tx, some=some: [tx.put(one) for one in some])
            )

    def start(self, only: type | None = None) -> None:
        """Start all control loops, or one."""
        self.store.faults.delay_s = lambda: WRITE_S
        numbers = iter(range(10_000_000))
        term: Term = self.loop.run_until_complete(
            anext(aiter(self.store.terms(NodeId("m1"), "127.0.0.1:2377")))
        )
        made = loops(term, self.clock, lambda: f"id{next(numbers):08}", Random(1))
        chosen = [one for one in made if only is None or isinstance(one, only)]
        assert chosen
        self._running = [self.loop.create_task(one.run()) for one in chosen]

    def tasks(self, service: str) -> Sequence[Task]:
        return self.store.view().find(Task, service_id=ServiceId(service))

    def seconds_until(self, service: str, state: TaskState, tasks: int = 1) -> float:
        """Seconds of virtual time until so many of the service's tasks have reached ``state``."""
        began = self.clock.monotonic()
        while sum(task.status.state >= state for task in self.tasks(service)) < tasks:
            assert self.clock.monotonic() - began < SOON_S, f"{service} waits"
            self.run_for(0.05)
        return self.clock.monotonic() - began

    def run_for(self, seconds: float) -> None:
        self.loop.run_until_complete(self.clock.sleep(seconds))

    def close(self) -> None:
        for running in self._running:
            running.cancel()
        self.loop.run_until_complete(asyncio.gather(*self._running, return_exceptions=True))
        self.loop.close()


@pytest.fixture
def leader() -> Iterator[Leader]:
    leader = Leader()
    yield leader
    leader.close()


def test_a_service_gets_its_task_while_a_hundred_thousand_tasks_are_created(leader: Leader) -> None:
    leader.start()
    leader.put([a_service("large", replicas=LARGE)])
    for number in range(2):
        leader.run_for(0.5)
        leader.put([a_service(f"small{number}", replicas=1)])
        leader.seconds_until(f"small{number}", TaskState.ASSIGNED)
    assert 0 < len(leader.tasks("large")) < LARGE, "the large service makes progress, and is not ready"


def test_a_large_service_that_shrinks_stops_growing_at_once(leader: Leader) -> None:
    leader.start(only=Orchestrator)
    leader.put([a_service("large", replicas=LARGE)])
    leader.run_for(0.5)
    small = a_service("large", replicas=5)
    large = leader.store.view().get(Service, ServiceId("large"))
    leader.put([replace(large, spec=small.spec)])
    leader.run_for(SOON_S)
    tasks = leader.tasks("large")
    assert 5 < len(tasks) < 3000
    assert sum(task.desired_state <= TaskState.RUNNING for task in tasks) == 5


def test_new_tasks_of_a_large_service_do_not_delay_another_service(leader: Leader) -> None:
    """As after a change of the leader, when the tasks exist already."""
    services = [a_service("large", replicas=LARGE), a_service("small", replicas=1)]
    new = [a_task(f"l{n:06}", slot=n, service=services[0], state=TaskState.NEW) for n in range(1, 20_000)]
    leader.put([*services, *new])
    leader.start(only=Allocator)
    leader.run_for(0.5)
    leader.put([a_task("s1", slot=1, service=services[1], state=TaskState.NEW)])
    leader.seconds_until("small", TaskState.PENDING)


def test_all_new_tasks_are_checked_although_the_first_ones_have_to_wait(leader: Leader) -> None:
    network = an_overlay("net1", subnet="10.0.1.0/24", plane="skep")
    service = a_service("large", replicas=3000)
    template = replace(service.spec.task_template, networks=(NetworkAttachmentConfig(target=network.id),))
    service = replace(service, spec=replace(service.spec, task_template=template))
    new = [a_task(f"l{n:06}", slot=n, service=service, state=TaskState.NEW) for n in range(1, 3001)]
    leader.put([network, service, *new])
    leader.start(only=Allocator)
    leader.run_for(SOON_S)
    states = [task.status.state for task in leader.tasks("large")]
    assert 240 < states.count(TaskState.PENDING) < 254
    waiting = [task for task in leader.tasks("large") if task.status.state is TaskState.NEW]
    assert all(task.status.err for task in waiting)
    leader.run_for(1)
    written = leader.store.view().revision
    leader.run_for(SOON_S)
    assert leader.store.view().revision == written, "nothing is left to do"
