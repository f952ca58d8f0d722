"""A whole cluster on virtual time: production managers and nodes on a simulated etcd and network, from one seed.

::

    with SimulatedCluster(managers=3, workers=5, seed=seed) as cluster:
        cluster.create(spec)
        cluster.run_until(lambda: cluster.running("web") == 20, within_s=60)
        cluster.crash(cluster.leader)
        cluster.check_invariants()

The same seed gives the same run, to the last commit.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import combinations
from math import inf
from random import Random
from types import TracebackType
from typing import Any, Self, TypeVar

from msgspec.structs import replace

from sim.etcd.client import SimulatedClient
from sim.etcd.raft import Raft
from sim.initial_state import CLUSTER, address_of, joined, labels_behind_nat
from sim.invariants.bookkeeping import leftovers
from sim.invariants.nodes.volumes import OnlyCopiesStay, Stored
from sim.invariants.observer import Observer
from sim.invariants.quiescence import rest_violations
from sim.invariants.services.removals import DisruptionsRemoveNoNode
from sim.trace import Trace
from sim.world.addresses import AddressTruth, SimulatedAddresses
from sim.world.certificates import Certificates, first_certificate
from sim.world.committed import CommittedState
from sim.world.images import image_of
from sim.world.links import Isolation, Links, Machine, Port, Uptime
from sim.world.manager import SimulatedManager
from sim.world.network import Network
from sim.world.node import SimulatedNode
from sim.world.storage import DRIVER, SimulatedStorage
from sim.world.time import VirtualClock, VirtualLoop
from sim.world.versions import UnknownFieldsAreKept
from skep.agent.executor.simulated import Behavior
from skep.agent.session.managers import KnownManager
from skep.errors import Unavailable
from skep.model.node import (
    Availability,
    CSIInfo,
    EngineDescription,
    EnginePlugin,
    Node,
    NodeDescription,
    NodeRole,
    NodeState,
)
from skep.model.permissions.rights import ALLOW_LABEL, Right
from skep.model.service import Resources, Service, ServiceSpec
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId, ServiceId, base36
from skep.model.values.times import timestamp
from skep.security.identity import NodeIdentity
from skep.store.etcd.encryption.cipher import Cipher
from skep.store.etcd.initialize import cluster_in, initialize_on
from skep.store.etcd.requests import PREFIX, etcd_key
from skep.store.interface import Transaction, View

T = TypeVar("T")

ENGINE = EngineDescription(
    plugins=(EnginePlugin(type="Network", name="overlay"),), labels={ALLOW_LABEL: Right.PROCESSES.value}
)
"""Engine that every worker reports, with the overlay driver and the right to run plain processes."""
LOOK_S = 2.0
"""Longest interval in seconds between two checks of durations, such as the time without a leader."""
STEP_S = 0.05
"""Interval at which ``run_until`` tests its condition."""
WRAPPING_KEY = bytes(32)
LED_S = 10.0
"""Time within which a majority of healthy managers elects a leader."""
SKEW_S, EXTENDED_SKEW_S = 1.0, 20.0
"""Largest error of a machine's wall clock.  The larger value exposes code that compares timestamps of two machines."""
SLOW_S = 0.2
TIMERS_MAX = 25
"""Timers that one idle machine may have, for its loops, streams and deadlines."""
WRITE_S = 30.0
"""Time limit of ``create`` and of the other writes."""


class SimulatedCluster:
    """A context manager for a cluster of managers m1, m2, ... and workers w1, w2, ..., each on its own machine.

    Managers are drained: tasks run on workers only.
    """

    def __init__(
        self,
        *,
        managers: int = 1,
        workers: int = 3,
        seed: int = 0,
        behavior: Behavior | None = None,
        capacity: Resources | None = None,
        latency_s: float = 0.002,
        skew: bool = False,
        turns_max: int | None = None,
        history_limit: int | None = None,
        storage: SimulatedStorage | None = None,
    ) -> None:
        """Start the managers of a new cluster.

        Args:
            capacity: resources of each worker.
            latency_s: average duration of a write to the store.
            skew: whether the machines' clocks disagree.
            turns_max: limit of iterations of the event loop, for a run that may not terminate.
            history_limit: see ``joined``.
            storage: the storage of cluster volumes, or None.  With storage, managers also keep a journal, evict nodes
                and have a root.
        """
        self.storage = storage
        self.random = Random(seed)
        self.loop = VirtualLoop(turns_max, seed)
        self._history_limit = history_limit
        self.poisoned: set[str] = set()
        """Services for which every decision raises an error."""
        self.links = Links()
        self.network = Network(self.loop, self.links)
        self.raft = Raft(self.loop, self.random, self.links, latency_s)
        self.committed = CommittedState(self.loop.time)
        self.raft.committed.append(self.committed.take)
        self.trace = Trace(self.loop.time)
        self._output = ExitStack()
        self.disturbances = 0
        """Number of faults that are active."""
        self._disturbed_at = 0.0
        self._led_at = 0.0
        """The last time at which there was a leader, or at which there could be none because most managers were
        unhealthy.
        """
        self._uptime = Uptime(self.loop.time, self.links, lambda: self.raft.requested_at)
        self._manager_uptime = Uptime(self.loop.time, self.links, lambda: self.raft.requested_at)
        self.managers = tuple(NodeId(f"m{number}") for number in range(1, managers + 1))
        self.workers = tuple(NodeId(f"w{number}") for number in range(1, workers + 1))
        self._isolation = Isolation(self.loop.time, self.links, lambda: self.nodes, lambda: self.managers)
        self.removals: set[NodeId] = set()
        """Nodes that operators are removing."""
        self.observer = self._observer()
        self.addresses = AddressTruth(
            self.loop, lambda violation: self.observer.note(self.loop.time(), [violation])
        )
        """The machines that have failover addresses in truth, whatever the store says."""
        self._has_addresses = False
        self.newer: set[NodeId] = set()
        """Managers that run a newer version than the others from their next start."""
        self.observer.rules += [
            UnknownFieldsAreKept(self._cannot_read),
            OnlyCopiesStay(self._stored_on, self.removals.__contains__),
            DisruptionsRemoveNoNode(self.removals.__contains__),
        ]
        self.changing: set[NodeId] = set()
        """Machines that join, leave or change their role.  No other fault is injected into them meanwhile."""
        self.certificates = Certificates()
        """The certificates of all machines, in a cluster with storage."""
        self.network.accepts = self._trust_each_other
        self.network.idle_at = self._idle_at
        self.renew: Callable[[NodeId], None] = lambda _: None
        """Called when a manager orders a node to renew its certificate."""
        self._skew = skew
        self._skew_s = SKEW_S if storage is None else EXTENDED_SKEW_S
        self._capacity = capacity or Resources(nano_cpus=4_000_000_000, memory_bytes=8 << 30)
        self._behavior = behavior or Behavior()
        self.nano_cpus: Callable[[Task], int | None] = lambda _: None
        """Returns a task's current CPU use, or None if its node does not measure it."""
        self.clocks: dict[NodeId, VirtualClock] = {}
        self.nodes: dict[NodeId, SimulatedNode] = {}
        for id in self.managers:
            self.add_machine(id)
        for id in self.workers:
            self.add_node(id)
        self.links.changed.append(self.disturb)
        self.running_managers: dict[NodeId, SimulatedManager] = {}
        self._processes: dict[str, asyncio.Task[None]] = {}
        """Node processes by node id, manager processes by ``_manager(id)``."""

    def __enter__(self) -> Self:
        self._output.enter_context(self.trace.with_output_of_commands())
        asyncio.set_event_loop(self.loop)
        for id in self.managers:
            self.raft.add(id)
            self.raft.start(id)
        self.do(self._initialize())
        for id in self.managers:
            self.start_manager(id)
        for id in self.workers:
            self.start_node(id)
        self.run_until(lambda: all(map(self.is_ready, self.workers)), within_s=15)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.links.restore()
        tasks = [*self._processes.values(), *(asyncio.all_tasks(self.loop) - set(self._processes.values()))]
        for task in tasks:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self.loop.close()
        asyncio.set_event_loop(None)
        self._output.close()

    # -- what users do -----------------------------------------------------------------------------------------

    def create(self, spec: ServiceSpec) -> ServiceId:
        """Create a service whose id is its name."""
        id = ServiceId(spec.name)
        self.write(lambda tx: tx.put(Service(id=id, spec=spec)))
        return id

    def update(self, name: str, change: Callable[[ServiceSpec], ServiceSpec]) -> None:
        """Update the spec as a client would, which makes the old spec the previous one."""

        def body(tx: Transaction) -> None:
            service = tx.get(Service, name)
            spec = change(service.spec)
            tx.put(replace(service, spec=spec, previous_spec=service.spec, update_status=None))

        self.write(body)

    def remove(self, name: str) -> None:
        """Remove a service, as ``service rm`` does."""
        now = timestamp(self.clocks[self.managers[0]].now_ns())
        self.write(lambda tx: tx.put(replace(tx.get(Service, name), removed_at=now)))

    def set_availability(self, id: NodeId, availability: Availability) -> None:
        """Set a node's availability, as ``node update --availability`` does."""

        def body(tx: Transaction) -> None:
            node = tx.get(Node, id)
            tx.put(replace(node, spec=replace(node.spec, availability=availability)))

        self.write(body)

    def label(self, id: NodeId, **labels: str) -> None:
        """Add node labels, as ``node update --label-add`` does."""

        def body(tx: Transaction) -> None:
            node = tx.get(Node, id)
            tx.put(replace(node, spec=replace(node.spec, labels={**node.spec.labels, **labels})))

        self.write(body)

    def hold_addresses(self) -> None:
        """Let managers name the nodes for failover addresses from now on."""
        self._has_addresses = True
        for node in self.nodes.values():
            node.hold_addresses()

    def forget(self, id: NodeId) -> None:
        """Remove a node, as ``node rm --force`` does."""
        self.removals.add(id)
        self.write(lambda tx: tx.delete(Node, id))

    def write(self, body: Callable[[Transaction], object]) -> None:
        """Commit ``body`` through any manager that accepts it."""
        self.do(self._write(body))

    async def write_probe(self, name: str) -> None:
        """Advance the store by one revision without changing an object.  Retry until that succeeds."""
        while True:
            member = self.random.choice(list(self.raft.members.values()))
            try:
                client = SimulatedClient(self.raft, member, self.links, self.random)
                await client.put(etcd_key(f"probe/{name}"), b"")
            except Unavailable:
                await asyncio.sleep(STEP_S)
            else:
                return

    # -- machines ----------------------------------------------------------------------------------------------

    def add_machine(self, id: NodeId) -> None:
        """Add a machine on which nothing runs."""
        self.clocks[id] = self._clock(id, self._skew)

    def add_node(self, id: NodeId) -> SimulatedNode:
        """Add a machine that can be a worker; its node process is not started."""
        self.add_machine(id)
        node = self.nodes[id] = SimulatedNode(
            NodeIdentity(node_id=id, cluster_id=CLUSTER, role=NodeRole.WORKER),
            NodeDescription(
                hostname=id,
                resources=self._capacity,
                engine=ENGINE,
                csi_info=(CSIInfo(plugin_name=DRIVER, node_id=id),) if self.storage is not None else (),
            ),
            self.network,
            tuple(KnownManager(manager, address_of(manager)) for manager in self.managers),
            clock=self.clocks[id],
            random=self.random,
            behavior=self._behavior,
            certificates=self.certificates,
            renew=lambda: self.renew(id),
        )
        node.nano_cpus = self._nano_cpus_of
        node.addresses = SimulatedAddresses(id, self.addresses, self.clocks[id], Random(f"addresses of {id}"))
        node.holds_addresses = self._has_addresses
        node.watchers.append(self.observer)
        return node

    def put_behind_nat(self, id: NodeId, address: str = "203.0.113.1") -> None:
        """Let others see a worker's machine under the address of a NAT.  Call this before the cluster starts."""
        self.network.outside[id] = address
        self.nodes[id].add_labels(labels_behind_nat(id))

    def _trust_each_other(self, source: Machine, target: Machine) -> bool:
        def view_of(id: Machine) -> View | None:
            manager = self.running_managers.get(NodeId(id))
            return manager.store.view() if manager is not None and manager.store is not None else None

        return self.certificates.accepts(source, target, view_of)

    def _stored_on(self, id: NodeId) -> Stored:
        return set(self.nodes[id].slot_volumes) if id in self.nodes else set()

    def _idle_at(self, id: NodeId) -> Mapping[ServiceId, float] | None:
        node = self.nodes.get(id)
        return node.door.idle() if node is not None and node.has_session else None

    def _nano_cpus_of(self, task: Task) -> int | None:
        return self.nano_cpus(task)

    async def end_node(self, id: NodeId) -> None:
        """Remove a worker's machine and its containers permanently."""
        await self.cut_power(id)
        del self.nodes[id]
        self.disturb()

    async def cut_power(self, id: NodeId) -> None:
        """Cut the power of a worker, like ``kill_node``, while the simulation runs."""
        self.disturb()
        process = self._processes.pop(id, None)
        if process is not None:
            process.cancel()
            await asyncio.wait([process])
        self._uptime.stop(id)
        self.nodes[id].lose_power()

    async def end_manager(self, id: NodeId) -> None:
        """End a manager process and its etcd member permanently, whether or not the member is still a voter."""
        self.disturb()
        process = self._processes.pop(_manager(id), None)
        self.running_managers.pop(id, None)
        if id in self.raft.members:
            self.raft.crash(id)
        if process is not None:
            process.cancel()
            await asyncio.wait([process])
        self.disturb()

    # -- faults ------------------------------------------------------------------------------------------------

    @property
    def leader(self) -> NodeId:
        """Return the manager that leads."""
        assert self.raft.current is not None, "no leader"
        return self.raft.current.member.id

    def start_manager(self, id: NodeId) -> None:
        """Start a stopped manager with its etcd member."""
        self.disturb()
        if not self.raft.members[id].is_running:
            self.raft.start(id)
        manager = self.running_managers[id] = SimulatedManager(
            id,
            address_of(id),
            SimulatedClient(self.raft, self.raft.members[id], self.links, self.random),
            WRAPPING_KEY,
            self.network,
            clock=self.clocks[id],
            new_id=self.new_id,
            random=self.random,
            poisoned=self.poisoned,
            is_newer=id in self.newer,
            find_driver=self.storage.find if self.storage is not None else None,
        )
        self._processes[_manager(id)] = self.loop.create_task(manager.run(), name=_manager(id))
        self._manager_uptime.start(id)

    def crash(self, id: NodeId) -> None:
        """Kill a manager and its etcd member with SIGKILL. Its nodes reconnect, and the others elect a leader."""
        self.disturb()
        self.raft.crash(id)
        self._stop(_manager(id))
        self.running_managers.pop(id, None)

    def kill_manager(self, id: NodeId) -> asyncio.Task[None]:
        """Kill a manager and its etcd member from within the loop.  The process writes nothing after that.

        Return the process's task, which must be done before another process is started.
        """
        self.disturb()
        self.raft.crash(id)
        self.running_managers.pop(id, None)
        self._processes[_manager(id)].cancel()
        return self._processes[_manager(id)]

    def supervise(self, task: asyncio.Task[None]) -> None:
        """Let a failure of ``task`` fail the run."""
        self._processes[task.get_name()] = task

    def depose(self, *, quietly: bool = False) -> None:
        """Move leadership to another manager.  ``quietly``: the old leader is notified late."""
        self.disturb()
        if self.raft.current is None:
            return  # an election is in progress
        old = self.leader
        voters = self.raft.voters
        others = [
            voter.id for voter in voters if voter.id in self.managers and voter.id != old and voter.is_running
        ]
        if others and self.raft.transfer(self.random.choice(others)) and quietly:
            self.raft.members[old].stale_until = self.loop.time() + self.random.uniform(0.2, 2.0)

    def start_node(self, id: NodeId) -> None:
        """Start a worker's node process."""
        self.disturb()
        self._processes[id] = self.loop.create_task(self.nodes[id].run(), name=id)
        self._uptime.start(id)

    def start_all(self) -> None:
        """Start the node process of every worker that has none."""
        for id in self.workers:
            if id not in self._processes:
                self.start_node(id)

    def kill_node(self, id: NodeId, *, keeps_containers: bool = False) -> None:
        """Cut the power of a worker.  With ``keeps_containers``, kill only its node process."""
        self.disturb()
        self._stop(id)
        self._uptime.stop(id)
        if not keeps_containers:
            self.nodes[id].lose_power()

    def give_managers(self) -> None:
        """Set current managers on nodes that know none of them, and restart their processes, as an operator would.

        Such a node was away while every manager that it knew was replaced.  Its log tells the operator to do this.
        """
        for id in self.workers:
            node = self.nodes[id]
            if not {peer.node_id for peer in node.managers}.intersection(self.managers):
                self.trace.add(f"operator: {id} is given the managers")
                self.kill_node(id, keeps_containers=True)
                node.set_managers(
                    tuple(KnownManager(manager, address_of(manager)) for manager in self.managers)
                )
                self.start_node(id)

    def kill_container(self, task: Task, exit_code: int = 137) -> None:
        """End the process of a running task."""
        self.disturb()
        self.nodes[task.node_id].machine.crash(task.id, exit_code)

    # -- observation -------------------------------------------------------------------------------------------

    @property
    def view(self) -> View:
        """Return the committed objects of the cluster."""
        return self.committed.view

    def is_ready(self, id: NodeId) -> bool:
        """Return whether the node's status is ready."""
        node = self.committed.view.lookup(Node, id)
        return node is not None and node.status.state is NodeState.READY

    def service(self, name: str) -> Service | None:
        """Return the service, removed or not, or None if its record was deleted."""
        return self.committed.view.lookup(Service, name)

    def tasks(self, name: str) -> list[Task]:
        """Return all tasks of a service, including its history."""
        return list(self.committed.view.find(Task, service_id=name))

    def wanted(self, name: str) -> list[Task]:
        """Return a service's tasks whose desired state is at most running."""
        return [task for task in self.tasks(name) if task.desired_state <= TaskState.RUNNING]

    def running(self, name: str, image: str | None = None) -> int:
        """Return the number of a service's tasks (with this image) that run and have the desired state running."""
        return sum(
            1
            for task in self.wanted(name)
            if task.status.state is TaskState.RUNNING and image in (None, image_of(task))
        )

    def created(self, name: str) -> int:
        """Return the number of tasks that were ever created for the service."""
        return self.observer.created[ServiceId(name)]

    def containers(self, name: str) -> int:
        """Return the number of running containers of a service."""
        return sum(
            1 for node in self.nodes.values() for task in node.containers.values() if task.service_id == name
        )

    def check_invariants(self, *, at_rest: bool = True) -> None:
        """Raise AssertionError if an invariant was violated.  ``at_rest``: also check the invariants of a cluster at
        rest.
        """
        violations = list(self.observer.violations)
        if at_rest:
            violations += self.rest_violations()
        assert not violations, "\n".join(violations)

    def rest_violations(self) -> list[str]:
        """Return violations at rest: containers without a task, and tasks that are reported as running but do not
        run.
        """
        nodes = self.nodes.values()
        containers = [(node.id, task) for node in nodes for task in node.containers.values()]
        kept = [(node.id, task_id) for node in nodes for task_id in node.kept]
        return list(rest_violations(self.committed.view, containers, kept))

    def leftovers(self) -> list[str]:
        """Return state that managers keep of finished work, and surplus timers, in a cluster at rest."""
        found = [
            f"{id} {text}" for id, manager in self.running_managers.items() for text in leftovers(manager)
        ]
        if self.loop.timers() > TIMERS_MAX * (len(self.managers) + len(self.workers)):
            found.append(f"more than {TIMERS_MAX} timers run for each machine")
        return found

    def observe_with(self, kind: type[Observer]) -> None:
        """Replace the observer by a new one without the history of the old one."""
        before = self.observer
        self.committed.watchers.remove(before._check)
        self.observer = self._observer(kind)
        self.observer.violations, self.observer.traced = before.violations, before.traced
        for node in self.nodes.values():
            node.watchers = [self.observer]

    def disturb(self) -> None:
        """Record that a fault began or ended, so that invariants that need a calm period count from now."""
        self._disturbed_at = self.loop.time()

    # -- time --------------------------------------------------------------------------------------------------

    def run_for(self, seconds: float) -> None:
        """Let virtual time pass, and check the rules on durations at intervals."""
        until = self.loop.time() + seconds
        self.do(asyncio.sleep(min(seconds, LOOK_S)))
        self._look()
        while (left_s := until - self.loop.time()) > 0:
            self.do(asyncio.sleep(min(left_s, LOOK_S)))
            self._look()

    def _look(self) -> None:
        self.observer.check_durations()
        self.observer.note(self.loop.time(), self._leaderless())
        for id, manager in self.running_managers.items():
            is_asked = manager.loops and not manager.writes and not self.links.is_frozen(id)
            if is_asked and manager.store is not None:
                self.observer.note(
                    self.loop.time(), self.observer.caches(id, manager.loops, manager.store.view())
                )

    def run_until(self, condition: Callable[[], bool], *, within_s: float) -> float:
        """Let time pass until ``condition``, and return the seconds.  Raises: AssertionError: not met within
        ``within_s``.
        """
        began = self.loop.time()
        while not condition():
            waited_s = self.loop.time() - began
            assert waited_s < within_s, f"not within {within_s} s"
            self.run_for(STEP_S)
        return self.loop.time() - began

    def new_id(self) -> str:
        """Return a random id of the production length, derived from the seed."""
        return base36(self.random.getrandbits(128), 25)

    # -- inside ------------------------------------------------------------------------------------------------

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Let time pass until ``work`` is done.  Raises: its error, or the error of a process that failed meanwhile."""
        result = self.loop.run_until_complete(work)
        for task in self._processes.values():
            if task.done() and not task.cancelled():
                task.result()  # a failed process fails the run
        return result

    def _observer(self, kind: type[Observer] = Observer) -> Observer:
        observer = kind(
            self.committed,
            self.trace,
            self._calm_since,
            self._uptime,
            self._manager_uptime,
            self._isolation,
            self.unreadable_nodes,
        )
        observer.volumes.given_up = self.removals
        return observer

    def unreadable_nodes(self) -> set[NodeId]:
        """Return nodes whose values are damaged on some manager's disk."""
        names = {
            key.removeprefix(PREFIX).decode()
            for member in self.raft.members.values()
            for key in member.corrupted
        }
        return {
            NodeId(name.removeprefix("o/node/").split(".")[0]) for name in names if name.startswith("o/node/")
        }

    def _cannot_read(self, id: NodeId) -> bool:
        return id in self.raft.members and bool(self.raft.members[id].corrupted)

    def _leaderless(self) -> Iterable[str]:
        """Check that a majority of healthy managers has a leader within ``LED_S``, unless the raft leader's disk
        hangs.
        """
        now, leads = self.loop.time(), self.raft.current
        is_led = (
            leads is None or leads.member.held is None
        )  # A member whose disk hangs stays the leader in the simulation.
        if (
            is_led
            and self._is_majority_healthy()
            and not any(one.leads for one in self.running_managers.values())
        ):
            if now - self._led_at > LED_S:
                self._led_at = inf  # so that it is reported once
                yield f"no leader, although a majority of managers has been healthy for {LED_S} s"
        else:
            self._led_at = now

    def _is_majority_healthy(self) -> bool:
        healthy = [
            id
            for id, member in self.raft.members.items()
            if id in self.running_managers
            and not self.links.is_frozen(id)
            and member.is_running
            and member.held is None
            and max(member.stall_s, member.lag_s, member.watch_lag_s) < SLOW_S
        ]
        return any(
            all(self.links.is_joined(one, other, Port.PEER) for one, other in combinations(some, 2))
            for some in combinations(healthy, self.raft.majority)
        )

    def _calm_since(self) -> float:
        """Return the time at which the last fault ended, or infinity while a fault is active."""
        is_intact = self.links.is_intact and self._processes.keys() >= {
            *map(_manager, self.managers),
            *self.workers,
        }
        return self._disturbed_at if is_intact and not self.disturbances else inf

    async def _write(self, body: Callable[[Transaction], object]) -> None:
        async with asyncio.timeout(WRITE_S):
            while True:
                stores = [manager.store for manager in self.running_managers.values() if manager.store]
                if stores:
                    try:
                        await self.random.choice(stores).update(body)
                    except Unavailable:
                        pass
                    else:
                        return
                await asyncio.sleep(STEP_S)

    async def _initialize(self) -> None:
        """Write the state that an init and the joins leave in the store."""
        first = self.managers[0]
        client = SimulatedClient(self.raft, self.raft.members[first], self.links, self.random)
        self.raft.committed.remove(
            self.committed.take
        )  # The entries are read below, once the data keys are known.
        await self.raft.wait_readable(self.raft.members[first])
        has_root = self.storage is not None
        if has_root:
            self.certificates.held |= dict.fromkeys((*self.managers, *self.workers), first_certificate())
        await initialize_on(
            client,
            WRAPPING_KEY,
            self.clocks[first],
            partial(joined, has_root=has_root),
            self.managers,
            self.workers,
            self._history_limit,
        )
        self.committed.begin(Cipher((await cluster_in(client)).ring, WRAPPING_KEY))
        self.committed.take(first, self.raft.kv.revision, self.raft.kv.events(2, self.raft.kv.revision))
        self.raft.committed.append(self.committed.take)

    def _stop(self, name: str) -> None:
        process = self._processes.pop(name, None)
        if process is not None:
            process.cancel()
            self.loop.run_until_complete(asyncio.gather(process, return_exceptions=True))

    def _clock(self, id: NodeId, skew: bool) -> VirtualClock:
        rng = self.random.uniform if skew else lambda low, high: (low + high) / 2
        return VirtualClock(
            self.loop,
            drift=rng(0.998, 1.002),
            began_s=rng(-1000.0, 1000.0),
            wall_off_s=rng(-self._skew_s, self._skew_s),
            wait_running=partial(self.links.wait_thawed, id),
        )


def _manager(id: NodeId) -> str:
    """Return the name of a manager process.  A machine may also have a node process."""
    return f"manager {id}"
