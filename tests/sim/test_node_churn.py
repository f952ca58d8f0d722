"""Months in which nodes come and go: what is stored is bounded by what is there.

The loops of a leader on an in-memory store and on virtual time; the nodes are played by the test.
"""

import asyncio
from collections.abc import Iterator
from itertools import count
from random import Random

import pytest
from msgspec.structs import replace

from sim.invariants.objects import unbounded_objects
from sim.world.time import VirtualClock, VirtualLoop
from skep.manager.orchestrator.loop import Orchestrator
from skep.manager.orchestrator.reaper.loop import Reaper
from skep.model.node import Availability, Node, NodeState
from skep.model.service import (
    GlobalJob,
    JobStatus,
    RestartPolicy,
    Service,
    ServiceMode,
    ServiceSpec,
)
from skep.model.swarm import Swarm
from skep.model.task import Task, TaskState, TaskStatus
from skep.model.values.ids import ClusterId, NodeId, ServiceId
from skep.model.values.times import timestamp
from skep.store.interface import Transaction
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_service_spec

DAYS = 60
DAY_S = 240.0
"""Long enough for every delay: the loops look twice a second for disruptions, so that a true day takes a minute."""
NODES = 4
ENDS = (TaskState.RUNNING, TaskState.RUNNING, TaskState.FAILED, TaskState.COMPLETE)


class Churn:
    """A cluster in which a machine is replaced each day."""

    def __init__(self, seed: int) -> None:
        self.loop = VirtualLoop()
        self.clock = VirtualClock(self.loop)
        self.store = MemoryStore(self.clock)
        self.random = Random(seed)
        self.found: list[str] = []
        numbers = count(1)
        self.new_id = lambda: f"t{next(numbers):06}"

    async def live(self) -> None:
        await self.store.update(self._begin)
        loops = [
            asyncio.create_task(kind(self.store, self.clock, self.new_id, Random(1)).run())
            for kind in (Orchestrator, Reaper)
        ]
        for day in range(DAYS):
            await self.store.update(self._replace_a_node, day)
            if day % 5 == 0:
                await self.store.update(self._scale, 2 + day % 3)
            for _ in range(4):
                await asyncio.sleep(DAY_S / 4)
                await self.store.update(self._work)
            await asyncio.sleep(60)
            await self.store.update(self._stop)
            await asyncio.sleep(60)
            self.found += unbounded_objects(self.store.view())
        for loop in loops:
            loop.cancel()
        await asyncio.gather(*loops, return_exceptions=True)

    def _begin(self, tx: Transaction) -> None:
        tx.put(Swarm(id=ClusterId("c")))
        for spec in self._specs():
            is_job = spec.mode.global_job is not None
            job = JobStatus(last_execution=timestamp(self.clock.now_ns())) if is_job else None
            tx.put(Service(id=ServiceId(spec.name), spec=spec, job_status=job))
        for number in range(NODES):
            tx.put(a_node(f"n{number:03}"))

    def _specs(self) -> Iterator[ServiceSpec]:
        restart = RestartPolicy(max_attempts=2, delay=0)
        yield a_service_spec("agent", is_global=True)
        yield a_service_spec("twice", is_global=True, restart=restart)
        yield a_service_spec("web", replicas=3)
        yield replace(a_service_spec("once"), mode=ServiceMode(global_job=GlobalJob()))

    def _replace_a_node(self, tx: Transaction, day: int) -> None:
        """It leaves in order, is lost first, or is removed by force with all that runs there."""
        old = self.random.choice(tx.find(Node))
        match self.random.choice(("drained", "down", "removed", "removed")):
            case "drained":
                tx.put(replace(old, spec=replace(old.spec, availability=Availability.DRAIN)))
            case "down":
                tx.put(replace(old, status=replace(old.status, state=NodeState.DOWN)))
            case _:
                tx.delete(Node, old.id)
        for gone in tx.find(Node):
            is_ready = gone.status.state is NodeState.READY
            if gone.id != old.id and not (is_ready and gone.spec.availability is Availability.ACTIVE):
                tx.delete(Node, gone.id)
        tx.put(a_node(f"d{day:03}"))

    def _scale(self, tx: Transaction, replicas: int) -> None:
        web = tx.get(Service, "web")
        tx.put(replace(web, spec=a_service_spec("web", replicas=replicas), previous_spec=web.spec))

    def _work(self, tx: Transaction) -> None:
        """The nodes run what they are to run; some of it ends."""
        nodes = [node.id for node in tx.find(Node)]
        for task in tx.find(Task):
            if task.is_active:
                node = task.node_id or self.random.choice(nodes)
                if node in nodes:
                    state = self.random.choice(ENDS)
                    state = max(state, task.status.state, key=lambda one: one.number)
                    tx.put(replace(task, node_id=NodeId(node), status=TaskStatus(state=state)))

    def _stop(self, tx: Transaction) -> None:
        for task in tx.find(Task):
            is_idle = task.status.state.is_terminal or task.status.state < TaskState.ASSIGNED
            if not task.is_wanted and not is_idle and tx.lookup(Node, task.node_id) is not None:
                tx.put(replace(task, status=TaskStatus(state=TaskState.SHUTDOWN)))


@pytest.mark.parametrize("seed", range(3))
def test_machines_that_are_replaced_every_day_leave_nothing_behind(seed: int) -> None:
    churn = Churn(seed)
    churn.loop.run_until_complete(churn.live())
    assert churn.found == []
