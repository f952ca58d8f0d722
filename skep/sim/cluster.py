"""A whole cluster on virtual time: managers with the real control loops, simulated nodes, and one seed.

::

    with SimulatedCluster(managers=3, workers=5, seed=seed) as cluster:
        cluster.create(spec)
        cluster.run_until(lambda: cluster.running("web") == 20, within_s=60)
        cluster.crash(cluster.leader)
        cluster.check_invariants()

The same seed gives the same run, to the last commit.
"""

import asyncio
from collections.abc import Callable, Coroutine
from random import Random
from types import TracebackType
from typing import Any, Self, TypeVar

from msgspec.structs import replace

from skep.errors import SkepError
from skep.manager.loops import loops
from skep.model.ids import NodeId, ServiceId, base36
from skep.model.node import Availability, Node, NodeDescription, NodeSpec, NodeState, NodeStatus
from skep.model.service import Resources, Service, ServiceSpec
from skep.model.task import Task, TaskState
from skep.model.times import timestamp
from skep.sim.faults import PoisonedState
from skep.sim.invariants import Observer, rest_violations
from skep.sim.node import Durations, SimulatedNode, write_node_state
from skep.sim.time import VirtualClock, VirtualLoop
from skep.store.interface import NotLeader, Term, Transaction
from skep.store.memory import MemoryCluster, MemoryStore

T = TypeVar("T")

DOWN_AFTER_S = 3.0
"""How long a silent node is believed alive."""
STEP_S = 0.05
"""How often ``run_until`` looks."""


class SimulatedCluster:
    """Managers m1, m2, ... and workers w1, w2, ...; to be used as a context manager."""

    def __init__(
        self,
        *,
        managers: int = 1,
        workers: int = 3,
        seed: int = 0,
        durations: Durations | None = None,
        capacity: Resources | None = None,
        latency_s: float = 0.002,
    ) -> None:
        """``capacity``: of each worker; ``latency_s``: what a write to the store takes, on average."""
        self.random = Random(seed)
        self.loop = VirtualLoop()
        self.clock = VirtualClock(self.loop)
        self.poisoned: set[str] = set()
        """Services whose decisions raise."""
        self._capacity = capacity or Resources(nano_cpus=4_000_000_000, memory_bytes=8 << 30)
        self._latency_s = latency_s
        self._durations = durations or Durations()
        self._keys = MemoryCluster(choose=lambda ready: self.random.choice(sorted(ready)))
        self.managers = tuple(NodeId(f"m{number}") for number in range(1, managers + 1))
        self.workers = tuple(NodeId(f"w{number}") for number in range(1, workers + 1))
        self.nodes = {id: SimulatedNode(id, self.clock, self.random, self._durations) for id in self.workers}
        self._stores: dict[NodeId, MemoryStore] = {}
        self._tasks: dict[NodeId, asyncio.Task[None]] = {}
        self._sessions: dict[NodeId, NodeId] = {}

    def __enter__(self) -> Self:
        asyncio.set_event_loop(self.loop)
        self._client = MemoryStore(self.clock, self._keys)
        self._observer = Observer(MemoryStore(self.clock, self._keys), self.loop.time)
        self._observing = self.loop.create_task(self._observer.run(), name="observer")
        for id in self.managers:
            self.start_manager(id)
        for id in self.workers:
            self._do(self._client.update(self._register, id))
            self.start_node(id)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        tasks = [*self._tasks.values(), self._observing]
        for task in tasks:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self.loop.close()
        asyncio.set_event_loop(None)

    # -- what users do -----------------------------------------------------------------------------------------

    def create(self, spec: ServiceSpec) -> ServiceId:
        """Create a service whose id is its name."""
        id = ServiceId(spec.name)
        self._do(self._client.update(lambda tx: tx.put(Service(id=id, spec=spec))))
        return id

    def update(self, name: str, change: Callable[[ServiceSpec], ServiceSpec]) -> None:
        """Update the spec as a client would: the old one becomes the previous one."""

        def body(tx: Transaction) -> None:
            service = tx.get(Service, name)
            spec = change(service.spec)
            tx.put(replace(service, spec=spec, previous_spec=service.spec, update_status=None))

        self._do(self._client.update(body))

    def remove(self, name: str) -> None:
        """``service rm``."""
        now = timestamp(self.clock.now_ns())
        self._do(self._client.update(lambda tx: tx.put(replace(tx.get(Service, name), removed_at=now))))

    def set_availability(self, id: NodeId, availability: Availability) -> None:
        """``node update --availability``."""

        def body(tx: Transaction) -> None:
            node = tx.get(Node, id)
            tx.put(replace(node, spec=replace(node.spec, availability=availability)))

        self._do(self._client.update(body))

    def label(self, id: NodeId, **labels: str) -> None:
        """``node update --label-add``."""

        def body(tx: Transaction) -> None:
            node = tx.get(Node, id)
            tx.put(replace(node, spec=replace(node.spec, labels={**node.spec.labels, **labels})))

        self._do(self._client.update(body))

    def forget(self, id: NodeId) -> None:
        """``node rm --force``."""
        self._do(self._client.update(lambda tx: tx.delete(Node, id)))

    # -- faults ------------------------------------------------------------------------------------------------

    @property
    def leader(self) -> NodeId:
        """The manager that leads."""
        leader = self._keys.leader
        assert leader is not None, "nobody leads"
        return leader

    def start_manager(self, id: NodeId) -> None:
        """Start a manager that does not run."""
        store = MemoryStore(self.clock, self._keys)
        store.faults.delay_s = lambda: self.random.uniform(0.5, 1.5) * self._latency_s
        self._stores[id] = store
        self._tasks[id] = self.loop.create_task(self._manager(id, store), name=id)

    def crash(self, id: NodeId) -> None:
        """kill -9 of a manager: its nodes find another one, and another one leads."""
        self._stop(id)
        store = self._stores.pop(id)
        self._keys.withdraw(id)
        self._keys.stores.remove(store)
        for node_id in [node_id for node_id, owner in self._sessions.items() if owner == id]:
            self._stop(node_id)
            if self._stores:
                self.start_node(node_id)

    def start_node(self, id: NodeId) -> None:
        """Start a node's agent, with a session at some manager."""
        owner = self._sessions[id] = self.random.choice(sorted(self._stores))
        self._tasks[id] = self.loop.create_task(self._agent(id, self._stores[owner]), name=id)

    def kill_node(self, id: NodeId, *, keeps_containers: bool = False) -> None:
        """Power loss, or (``keeps_containers``) only the loss of its agent; the managers notice after the grace."""
        self._stop(id)
        self._sessions.pop(id, None)
        if not keeps_containers:
            self.nodes[id].lose_power()
        self.loop.call_later(DOWN_AFTER_S, self._mark_down, id)

    def kill_container(self, task: Task, exit_code: int = 137) -> None:
        """The process of a running task ends."""
        self.nodes[task.node_id].containers[task.id].exit(exit_code)

    # -- looking -----------------------------------------------------------------------------------------------

    def service(self, name: str) -> Service | None:
        """The service, or None when even its hidden record is gone."""
        return self._client.view().lookup(Service, name)

    def tasks(self, name: str) -> list[Task]:
        """All tasks of a service, history included."""
        return list(self._client.view().find(Task, service_id=name))

    def wanted(self, name: str) -> list[Task]:
        """Tasks of a service that are meant to run."""
        return [task for task in self.tasks(name) if task.desired_state <= TaskState.RUNNING]

    def running(self, name: str, image: str | None = None) -> int:
        """How many tasks of a service run and are meant to (of one image)."""
        return sum(
            1
            for task in self.wanted(name)
            if task.status.state is TaskState.RUNNING and image in (None, image_of(task))
        )

    def created(self, name: str) -> int:
        """How many tasks the service has been given in all."""
        return self._observer.created[ServiceId(name)]

    def containers(self, name: str) -> int:
        """How many containers of a service run anywhere."""
        return sum(
            1
            for node in self.nodes.values()
            for container in node.containers.values()
            if container.task.service_id == name
        )

    def check_invariants(self, *, at_rest: bool = True) -> None:
        """Raise AssertionError for anything that was ever wrong; ``at_rest``: for leftovers too."""
        violations = list(self._observer.violations)
        if at_rest:
            containers = [
                (node.id, container.task)
                for node in self.nodes.values()
                for container in node.containers.values()
            ]
            violations += rest_violations(self._client.view(), containers)
        assert not violations, "\n".join(violations)

    # -- time --------------------------------------------------------------------------------------------------

    def run_for(self, seconds: float) -> None:
        """Let virtual time pass."""
        self._do(asyncio.sleep(seconds))

    def run_until(self, condition: Callable[[], bool], *, within_s: float) -> float:
        """Let time pass until ``condition``; the seconds it took.  AssertionError: it did not come."""
        began = self.loop.time()
        while not condition():
            waited_s = self.loop.time() - began
            assert waited_s < within_s, f"not within {within_s} s"
            self.run_for(STEP_S)
        return self.loop.time() - began

    # -- inside ------------------------------------------------------------------------------------------------

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        result = self.loop.run_until_complete(work)
        for task in (*self._tasks.values(), self._observing):
            if task.done() and not task.cancelled():
                task.result()  # a part that failed fails the run
        return result

    def _register(self, tx: Transaction, id: NodeId) -> None:
        description = NodeDescription(hostname=id, resources=self._capacity)
        status = NodeStatus(state=NodeState.READY, addr="127.0.0.1")
        tx.put(Node(id=id, spec=NodeSpec(), description=description, status=status))

    async def _manager(self, id: NodeId, store: MemoryStore) -> None:
        """Stand for election; run the loops for each term won."""
        async for term in store.terms(id, addr=f"{id}:2377"):
            try:
                await self._lead(term)
            except* NotLeader:
                pass  # the next term, if there is one

    async def _lead(self, term: Term) -> None:
        state = PoisonedState(term, self.poisoned)
        async with asyncio.TaskGroup() as group:
            running = [
                group.create_task(loop.run(), name=type(loop).__name__)
                for loop in loops(state, self.clock, self._new_id, self.random)
            ]
            await term.wait_lost()
            for task in running:
                task.cancel()

    async def _agent(self, id: NodeId, store: MemoryStore) -> None:
        await self.nodes[id].run(store)

    def _mark_down(self, id: NodeId) -> None:
        if id in self._sessions:
            return  # it came back meanwhile
        store = self._client

        async def write() -> None:
            try:
                await store.update(write_node_state, id, NodeState.DOWN)
            except SkepError:
                self.loop.call_later(1.0, self._mark_down, id)

        self._tasks[id] = self.loop.create_task(write(), name=f"down-{id}")

    def _stop(self, id: NodeId) -> None:
        task = self._tasks.pop(id, None)
        if task is not None:
            task.cancel()
            self.loop.run_until_complete(asyncio.gather(task, return_exceptions=True))

    def _new_id(self) -> str:
        return base36(self.random.getrandbits(128), 25)


def image_of(task: Task) -> str:
    """The image a task runs."""
    container = task.spec.container_spec
    return container.image if container else ""
