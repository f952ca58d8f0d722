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

from skep.model.ids import ClusterId, NodeId, ServiceId, base36
from skep.model.node import (
    Availability,
    ManagerStatus,
    Node,
    NodeDescription,
    NodeRole,
    NodeSpec,
    NodeState,
    NodeStatus,
    Reachability,
)
from skep.model.service import Resources, Service, ServiceSpec
from skep.model.swarm import DEFAULT_SWARM_SPEC, Swarm
from skep.model.task import Task, TaskState
from skep.model.times import timestamp
from skep.node.executor.simulated import Behaviour
from skep.node.local import Peer
from skep.security.identity import Identity
from skep.sim.invariants import Observer, rest_violations
from skep.sim.manager import SimulatedManager
from skep.sim.network import Network
from skep.sim.node import SimulatedNode, image_of
from skep.sim.time import VirtualClock, VirtualLoop
from skep.store.interface import Transaction, View
from skep.store.memory import MemoryCluster, MemoryStore

T = TypeVar("T")

CLUSTER = ClusterId("sim")
STEP_S = 0.05
"""How often ``run_until`` looks."""


class SimulatedCluster:
    """Managers m1, m2, ... and workers w1, w2, ...; to be used as a context manager.

    Managers are drained: tasks run on workers only.
    """

    def __init__(
        self,
        *,
        managers: int = 1,
        workers: int = 3,
        seed: int = 0,
        behaviour: Behaviour | None = None,
        capacity: Resources | None = None,
        latency_s: float = 0.002,
    ) -> None:
        """``capacity``: of each worker; ``latency_s``: what a write to the store takes, on average."""
        self.random = Random(seed)
        self.loop = VirtualLoop()
        self.clock = VirtualClock(self.loop)
        self.poisoned: set[str] = set()
        """Services whose decisions raise."""
        self._latency_s = latency_s
        self._network = Network()
        self._keys = MemoryCluster(choose=lambda ready: self.random.choice(sorted(ready)))
        self.managers = tuple(NodeId(f"m{number}") for number in range(1, managers + 1))
        self.workers = tuple(NodeId(f"w{number}") for number in range(1, workers + 1))
        peers = tuple(Peer(id, _address(id)) for id in self.managers)
        resources = capacity or Resources(nano_cpus=4_000_000_000, memory_bytes=8 << 30)
        self.nodes = {
            id: SimulatedNode(
                Identity(node_id=id, cluster_id=CLUSTER, role=NodeRole.WORKER),
                NodeDescription(hostname=id, resources=resources),
                self._network,
                peers,
                clock=self.clock,
                random=self.random,
                behaviour=behaviour or Behaviour(),
            )
            for id in self.workers
        }
        self._stores: dict[NodeId, MemoryStore] = {}
        self._processes: dict[NodeId, asyncio.Task[None]] = {}

    def __enter__(self) -> Self:
        asyncio.set_event_loop(self.loop)
        self._client = MemoryStore(self.clock, self._keys)
        self._observer = Observer(MemoryStore(self.clock, self._keys), self.loop.time)
        self._observing = self.loop.create_task(self._observer.run(), name="observer")
        self._do(self._client.update(self._found))
        for id in self.managers:
            self.start_manager(id)
        for id in self.workers:
            self.start_node(id)
        self.run_until(lambda: all(map(self.is_ready, self.workers)), within_s=5)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        tasks = [*self._processes.values(), self._observing]
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
        store = self._stores[id] = MemoryStore(self.clock, self._keys)
        store.faults.delay_s = lambda: self.random.uniform(0.5, 1.5) * self._latency_s
        manager = SimulatedManager(
            id,
            _address(id),
            store,
            self._network,
            clock=self.clock,
            new_id=self._new_id,
            random=self.random,
            poisoned=self.poisoned,
        )
        self._processes[id] = self.loop.create_task(manager.run(), name=id)

    def crash(self, id: NodeId) -> None:
        """kill -9 of a manager: its nodes find another one, and another one leads."""
        self._stop(id)
        self._keys.withdraw(id)
        self._keys.stores.remove(self._stores.pop(id))

    def depose(self, *, quietly: bool = False) -> None:
        """Another manager leads from now on.  ``quietly``: the old leader finds out by a write that is refused."""
        others = sorted(self._stores.keys() - {self.leader})
        if others:
            self._keys.elect(self.random.choice(others), quietly=quietly)

    def start_node(self, id: NodeId) -> None:
        """Start a worker's node process."""
        self._processes[id] = self.loop.create_task(self.nodes[id].run(), name=id)

    def kill_node(self, id: NodeId, *, keeps_containers: bool = False) -> None:
        """Power loss of a worker, or (``keeps_containers``) only the end of its node process."""
        self._stop(id)
        if not keeps_containers:
            self.nodes[id].lose_power()

    def kill_container(self, task: Task, exit_code: int = 137) -> None:
        """The process of a running task ends."""
        self.nodes[task.node_id].machine.crash(task.id, exit_code)

    # -- looking -----------------------------------------------------------------------------------------------

    @property
    def view(self) -> View:
        """The cluster's objects as users see them."""
        return self._client.view()

    def is_ready(self, id: NodeId) -> bool:
        """Whether the managers believe the node to be there."""
        node = self._client.view().lookup(Node, id)
        return node is not None and node.status.state is NodeState.READY

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
            1 for node in self.nodes.values() for task in node.containers.values() if task.service_id == name
        )

    def check_invariants(self, *, at_rest: bool = True) -> None:
        """Raise AssertionError for anything that was ever wrong; ``at_rest``: for leftovers too."""
        violations = list(self._observer.violations)
        if at_rest:
            containers = [
                (node.id, task) for node in self.nodes.values() for task in node.containers.values()
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
        for task in (*self._processes.values(), self._observing):
            if task.done() and not task.cancelled():
                task.result()  # a part that failed fails the run
        return result

    def _found(self, tx: Transaction) -> None:
        """What an init and the joins leave in the store."""
        tx.put(Swarm(id=CLUSTER, spec=DEFAULT_SWARM_SPEC))
        for id in self.managers:
            tx.put(
                Node(
                    id=id,
                    spec=NodeSpec(role=NodeRole.MANAGER, availability=Availability.DRAIN),
                    description=NodeDescription(hostname=id),
                    status=NodeStatus(state=NodeState.READY),
                    manager_status=ManagerStatus(reachability=Reachability.REACHABLE, addr=_address(id)),
                )
            )
        for id in self.workers:
            tx.put(Node(id=id))

    def _stop(self, id: NodeId) -> None:
        process = self._processes.pop(id, None)
        if process is not None:
            process.cancel()
            self.loop.run_until_complete(asyncio.gather(process, return_exceptions=True))

    def _new_id(self) -> str:
        return base36(self.random.getrandbits(128), 25)


def _address(id: NodeId) -> str:
    return f"{id}:2377"
