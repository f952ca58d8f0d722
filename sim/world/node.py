"""A simulated node: the production agent, worker and tasks on a simulated machine.

The machine (its processes and its disk) outlives the node process.  A power loss ends the processes and keeps the
disk.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from random import Random
from typing import Protocol, cast

from msgspec.structs import replace

from sim.world.addresses import SimulatedAddresses
from sim.world.certificates import Certificates
from sim.world.credentials import NoLogs, SimulatedCredentials
from sim.world.images import image_of
from sim.world.network import Network
from sim.world.storage import SimulatedVolumes
from sim.world.time import VirtualClock
from skep.agent.agent import Agent
from skep.agent.executor.interface import Controller, OnUnhealthy, Rejected, Running, TaskExit, ignored
from skep.agent.executor.simulated import (
    Behavior,
    SimulatedController,
    SimulatedExecutor,
    SimulatedMachine,
    container_id_of,
)
from skep.agent.session.address_stream import HeldAddresses
from skep.agent.session.last_seen import LastSeen
from skep.agent.session.managers import KnownManager, ManagerList
from skep.agent.session.reports import Reports
from skep.agent.session.revisions import SeenRevision
from skep.agent.session.session import NodeServices
from skep.agent.session.session_state import SessionState
from skep.agent.tasks.cluster_volumes import ClusterVolumes
from skep.agent.tasks.task_files import RememberedTask, TaskFiles
from skep.agent.tasks.worker import Worker
from skep.aio.clock import Clock
from skep.aio.event import Event
from skep.aio.race import wait_first
from skep.dataplane.tables.files import StoredTables
from skep.dataplane.tables.network_tables import NetworkTables
from skep.model.door.traffic import RouteTraffic
from skep.model.measures.readings import ServiceRequests
from skep.model.node import NodeDescription
from skep.model.node_reports.conditions import DISK_PRESSURE_LABEL
from skep.model.options.autoscaling import TaskUsage
from skep.model.options.slot_volumes import SLOT_VOLUMES_LABEL, SlotVolume, created_ms, slot_volumes_label
from skep.model.staging.updates import TaskRequests
from skep.model.task import AssignedTask, ContainerStatus, Task
from skep.model.task_end import EndCause, TaskEnd
from skep.model.values.ids import ContainerId, NodeId, ServiceId, TaskId
from skep.node.telemetry.task_usage import UsageReading, kept, usage_of
from skep.security.identity import NodeIdentity

SICK_S = 3.0
"""Seconds that an unhealthy container takes to stop, so that managers see it."""


class SimulatedNode:
    """One worker machine."""

    def __init__(
        self,
        identity: NodeIdentity,
        description: NodeDescription,
        network: Network,
        managers: tuple[KnownManager, ...],
        *,
        clock: VirtualClock,
        random: Random,
        behavior: Behavior,
        certificates: Certificates,
        renew: Callable[[], None],
    ) -> None:
        """``renew``: called when a manager requests a renewal of the certificate."""
        self.id = identity.node_id
        self.broken_images: set[str] = set()
        """Images whose preparation fails."""
        self.hanging_images: set[str] = set()
        """Images whose preparation does not end."""
        self.ending_images: dict[str, tuple[float, int]] = {}
        """Images whose containers end after a time in seconds, with an exit code."""
        self.sick_images: set[str] = set()
        """Those of which half of the containers become unhealthy, and take ``SICK_S`` seconds to stop."""
        self.machine = WatchedMachine(self)
        self.nano_cpus: Callable[[Task], int | None] = lambda _: None
        """Returns the current CPU use of a task's process, or None to not measure it."""
        self.door = SimulatedDoor(clock)
        self.watchers: list[ContainerWatcher] = []
        self.tasks: dict[TaskId, AssignedTask] = {}
        """The assignment of each process on the machine, for the observer."""
        self.disk = MemoryFiles()
        self._last_seen = LastSeen(clock.since_boot)
        self._seen = SeenRevision(None, identity.cluster_id)
        """Highest revision that the node has seen, which is also stored on the disk."""
        self._identity = identity
        self._description = description
        self._network = network
        self._managers = managers
        self._list: ManagerList | None = None
        """Manager list of the running process."""
        self.addresses: SimulatedAddresses | None = None
        """The machine's failover addresses, set by the cluster, or None if it cannot have any."""
        self.holds_addresses = False
        """Whether managers may name the machine for failover addresses."""
        self._held: HeldAddresses | None = None
        """The failover addresses of the running process."""
        self._clock = clock
        self._random = random
        self._behavior = behavior
        self._certificates = certificates
        self._renew = renew
        self._registered: asyncio.Event | None = None
        self.volumes = SimulatedVolumes(self._users_of_volumes, clock)
        """The cluster volumes of the running process."""
        self.has_full_disk = False
        """Whether containers have filled the node's disk, so that it requests no new tasks."""
        self.slot_volumes: dict[tuple[str, str, int], int] = {}
        """Creation time of the last task that used a local volume, by volume name, service and slot."""

    @property
    def has_session(self) -> bool:
        """Return whether the node process runs and is registered with a manager."""
        return self._registered is not None and self._registered.is_set()

    @property
    def containers(self) -> dict[TaskId, Task]:
        """Return the tasks whose process runs on this machine, reported or not."""
        return {
            id: self.tasks[id].task
            for id, process in self.machine.processes.items()
            if process.started and process.exit_code is None
        }

    @property
    def kept(self) -> list[TaskId]:
        """Return the tasks whose state the machine keeps: on its disk, or as a container that may have ended."""
        remembered = (one.assigned.task.id for one in self.disk.written())
        return sorted({*remembered, *self.machine.processes})

    @property
    def managers(self) -> tuple[KnownManager, ...]:
        """Return the managers in the node's list."""
        return self._list.peers if self._list is not None else self._managers

    def set_managers(self, managers: tuple[KnownManager, ...]) -> None:
        """Change the setting ``managers`` for the next start."""
        self._managers = managers

    async def run(self) -> None:
        """Run the node process until cancelled.  Its containers continue."""
        reports = Reports()
        executor = ImageExecutor(self, self._clock, self._random, self._behavior)
        session_state = SessionState(self._clock, self._last_seen)
        self.volumes = SimulatedVolumes(self._users_of_volumes, self._clock)
        worker = Worker(
            executor=executor,
            files=self.disk,
            reports=reports,
            clock=self._clock,
            session_state=session_state,
            volumes=cast("ClusterVolumes", self.volumes),  # it has the methods that are called
        )
        tables = NetworkTables(
            StoredTables(None, self._clock), (), session_state, self._clock, self._random.random
        )
        managers = self._list = ManagerList(self._managers)
        # Its ``run`` would drop the addresses at the end, which a process does not do that crashes.
        kernel = self.addresses
        self._held = HeldAddresses(kernel, self._clock.since_boot) if kernel is not None else None
        if self._held is not None:
            self._held.want(self.holds_addresses)
        agent = Agent(
            credentials=SimulatedCredentials(self._identity, self._network, self._certificates, self._renew),
            managers=managers,
            describe=self._describe,
            services=NodeServices(
                sink=worker,
                reports=reports,
                logs=NoLogs(),
                seen=self._seen,
                tables=tables,
                usages=SimulatedUsages(self, self._clock),
                addresses=self._held,
                door=self.door,
                volumes=self.volumes,
            ),
            clock=self._clock,
            random=self._random,
            session_state=session_state,
        )
        self._registered = agent.registered
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(worker.run(), name=f"{self.id} worker")
                group.create_task(tables.run(), name=f"{self.id} tables")
                group.create_task(agent.run(), name=f"{self.id} agent")
        finally:
            self._registered = None
            self._managers = managers.peers  # a node keeps the last list of managers
            self._list = None
            self._held = None

    def hold_addresses(self) -> None:
        """Let managers name the machine for failover addresses from now on."""
        self.holds_addresses = True
        if self._held is not None:
            self._held.want(True)

    def note_local_volumes(self, assigned: AssignedTask) -> None:
        """Record that a task of a slot has used its local volumes here, as a node's engine does."""
        task, container = assigned.task, assigned.task.spec.container_spec
        for mount in container.mounts if container is not None and task.slot else ():
            if mount.type == "volume":
                name = mount.source.replace("{{.Task.Slot}}", str(task.slot))
                key = name, assigned.service_name, task.slot
                self.slot_volumes[key] = max(self.slot_volumes.get(key, 0), created_ms(task))

    def add_labels(self, labels: Mapping[str, str]) -> None:
        """Add engine labels to the node's description, from the next session on."""
        engine = self._description.engine
        labelled = replace(engine, labels={**engine.labels, **labels})
        self._description = replace(self._description, engine=labelled)

    def remove_label(self, name: str) -> None:
        """Remove an engine label from the node's description."""
        engine = self._description.engine
        kept = {label: value for label, value in engine.labels.items() if label != name}
        self._description = replace(self._description, engine=replace(engine, labels=kept))

    def _describe(self) -> NodeDescription:
        if not self.slot_volumes and not self.has_full_disk:
            return self._description
        found = [SlotVolume(*key, at_ms) for key, at_ms in self.slot_volumes.items()]
        engine = self._description.engine
        labels = dict(engine.labels)
        if found:
            labels[SLOT_VOLUMES_LABEL] = slot_volumes_label(found)
        if self.has_full_disk:
            labels[DISK_PRESSURE_LABEL] = "the disk is full"
        return replace(self._description, engine=replace(engine, labels=labels))

    def _users_of_volumes(self) -> Iterable[Task]:
        for id, process in self.machine.processes.items():
            if process.exit_code is None:
                yield self.tasks[id].task

    def lose_power(self) -> None:
        """End every process, and keep the disk."""
        self._last_seen.forget()
        self.machine.lose_power()


class SimulatedHeld:
    """The requests that a front door holds."""

    def __init__(self) -> None:
        self.changed = Event()
        """Set when a service gets its first held request."""
        self.waiting: dict[ServiceId, None] = {}
        """Services for which the node holds a request."""
        self.served: set[ServiceId] = set()
        """Services whose held requests a task has got."""

    def take_served(self) -> set[ServiceId]:
        """Return the services that have been served since the last call."""
        found, self.served = self.served, set()
        return found

    def held(self) -> list[ServiceId]:
        """Return the services with held requests."""
        return list(self.waiting)


class SimulatedDoor:
    """The requests at the front door of a node, for the services that are known to it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.held = SimulatedHeld()
        self.requested_at: dict[ServiceId, float] = {}
        """When each known service last had a request."""
        self.open: set[ServiceId] = set()
        """Services with an open WebSocket."""

    def request(self, id: ServiceId, *, is_served: bool) -> None:
        """Note a request, which is held unless a task serves it."""
        self.requested_at[id] = self._clock.monotonic()
        if not is_served:
            self.held.waiting[id] = None
            self.held.changed.set()

    def release(self, id: ServiceId) -> None:
        """Note that a task serves the held requests."""
        if self.held.waiting.pop(id, self) is None:
            self.held.served.add(id)
            self.requested_at[id] = self._clock.monotonic()

    def requests(self) -> Mapping[TaskId, TaskRequests]:
        """Return nothing: no simulated update looks at requests."""
        return {}

    def recent_routes(self) -> Sequence[RouteTraffic]:
        """Return nothing: no route is shown."""
        return ()

    def service_requests(self) -> Mapping[ServiceId, ServiceRequests]:
        """Return nothing: no simulated service is autoscaled by its requests."""
        return {}

    def idle(self) -> Mapping[ServiceId, float]:
        """Return the seconds without a request."""
        now = self._clock.monotonic()
        used = self.open.union(self.held.waiting)
        return {id: 0.0 if id in used else now - at for id, at in self.requested_at.items()}


class SimulatedUsages:
    """Averages of counters, as the production meter computes them.  The counters are read with each heartbeat."""

    def __init__(self, node: SimulatedNode, clock: Clock) -> None:
        self._node = node
        self._clock = clock
        self._wanted: Sequence[TaskId] = ()
        self._readings: dict[TaskId, tuple[UsageReading, ...]] = {}

    def measure(self, task_ids: Sequence[TaskId]) -> None:
        """Measure these tasks from now on, and no others."""
        self._wanted = task_ids

    def present(self) -> Mapping[TaskId, TaskUsage]:
        """Return the latest usage of the measured tasks."""
        now, containers = self._clock.monotonic(), self._node.containers
        readings = {
            id: kept(self._readings.get(id, ()), reading)
            for id in self._wanted
            if id in containers and (reading := self._reading(containers[id], now)) is not None
        }
        self._readings = readings
        found = ((id, usage_of(readings[id], now)) for id in readings)
        return {id: usage for id, usage in found if usage is not None}

    def _reading(self, task: Task, now: float) -> UsageReading | None:
        used = self._node.nano_cpus(task)
        if used is None:
            return None
        last = self._readings.get(task.id, ())
        counted = last[-1].cpu_ns + round(used * (now - last[-1].at)) if last else 0
        return UsageReading(container=ContainerId(task.id), at=now, cpu_ns=counted, memory_bytes=0)


class ContainerWatcher(Protocol):
    """Receives the events of containers."""

    def container_started(self, node_id: NodeId, task: Task) -> None: ...

    def container_stopped(self, node_id: NodeId, task_id: TaskId) -> None:
        """Called before the node stops a container."""

    def container_ended(self, node_id: NodeId, task_id: TaskId) -> None:
        """Called when a container has ended, for whatever reason."""


class WatchedMachine(SimulatedMachine):
    """A machine that reports the events of its processes to the watchers."""

    def __init__(self, node: SimulatedNode) -> None:
        super().__init__()
        self._node = node
        self.interrupted: set[TaskId] = set()
        """Tasks whose processes a power loss ended."""

    def has_started(self, id: TaskId) -> None:
        for watcher in self._node.watchers:
            watcher.container_started(self._node.id, self._node.tasks[id].task)

    def is_stopping(self, id: TaskId) -> None:
        """Notify the watchers before the node stops a process, if it runs."""
        process = self.processes.get(id)
        if process is not None and process.started and process.exit_code is None:
            for watcher in self._node.watchers:
                watcher.container_stopped(self._node.id, id)

    def has_ended(self, id: TaskId) -> None:
        for watcher in self._node.watchers:
            watcher.container_ended(self._node.id, id)

    def crash(self, id: TaskId, exit_code: int = 137) -> None:
        super().crash(id, exit_code)
        self.has_ended(id)

    def lose_power(self) -> None:
        """End every process."""
        for id in list(self.processes):
            self.has_ended(id)
        self.interrupted |= self.processes.keys()
        self.processes.clear()


class ImageExecutor(SimulatedExecutor):
    """An executor whose containers behave as the node's settings for their image say."""

    def __init__(self, node: SimulatedNode, clock: Clock, rng: Random, behavior: Behavior) -> None:
        super().__init__(clock, rng, node.machine, behavior)
        self.node = node

    def controller(self, task: AssignedTask, registry_auth: str = "") -> Controller:
        self.node.tasks[task.task.id] = task
        return _ImageController(self, task)

    async def discard(self, task_id: TaskId) -> None:
        self.node.machine.is_stopping(task_id)
        await super().discard(task_id)
        self.node.machine.has_ended(task_id)
        self.node.machine.interrupted.discard(task_id)
        self.node.tasks.pop(task_id, None)


class _ImageController(SimulatedController):
    def __init__(self, executor: ImageExecutor, task: AssignedTask) -> None:
        super().__init__(executor, task)
        self._node = executor.node
        self._task = task
        self._clock = executor.clock
        self._image = image_of(task.task)

    def observed(self) -> Running | None:
        if (running := super().observed()) is not None or self._id not in self._node.machine.interrupted:
            return running
        # A power loss ends the process, but the container with its ID stays on the disk.
        return Running(container=ContainerStatus(container_id=container_id_of(self._id)))

    async def prepare(self) -> None:
        if self._image in self._node.broken_images:
            await self._clock.sleep(0.01)
            raise Rejected(f"No such image: {self._image}")
        if self._image in self._node.hanging_images:
            await asyncio.Event().wait()
        self._node.tasks[self._task.task.id] = self._task  # it may have been removed before a retry
        if self._task.task.volumes:
            await self._node.volumes.wait_mounted(self._task.task)
        if self._id in self._node.machine.processes:
            await self._executor.take(
                self._executor.behavior.prepare_s
            )  # detecting a prepared image takes time, too
        await super().prepare()
        self._node.note_local_volumes(self._task)

    async def start(self) -> Running:
        process = self._require()
        was_started = process.started
        running = await super().start()
        if not was_started:
            self._node.machine.has_started(self._id)
        return running

    async def shutdown(self, drain_s: float = 0.0) -> None:
        self._node.machine.is_stopping(self._id)
        await super().shutdown(drain_s)
        self._node.machine.has_ended(self._id)

    async def terminate(self) -> None:
        self._node.machine.is_stopping(self._id)
        await super().terminate()
        self._node.machine.has_ended(self._id)

    async def wait(self, on_unhealthy: OnUnhealthy = ignored) -> TaskExit:
        if (end := self._node.ending_images.get(self._image)) is not None:
            lasts_s, exit_code = end
            process = self._require()
            await wait_first(self._clock.sleep(lasts_s), process.ended.wait())
            if self._image in self._node.sick_images and int(self._id, 36) % 2 and process.exit_code is None:
                on_unhealthy(TaskEnd(cause=EndCause.UNHEALTHY.value))
                await wait_first(self._clock.sleep(SICK_S), process.ended.wait())
            process.end(exit_code)
        ended = await super().wait()
        self._node.machine.has_ended(self._id)
        return ended

    async def fetch_end(self) -> TaskEnd | None:
        was_interrupted = self._id in self._node.machine.interrupted
        return TaskEnd(cause=EndCause.NODE_RESTARTED.value) if was_interrupted else None


class MemoryFiles(TaskFiles):
    """The disk of a simulated machine.

    While it is full, files can be removed but not written.  Writes are retried until there is space or the node
    process ends.
    """

    def __init__(self) -> None:
        self._tasks: dict[TaskId, RememberedTask] = {}
        self._unwritten: dict[TaskId, RememberedTask] = {}
        self._is_full = False

    def load(self) -> list[RememberedTask]:
        """Return the written files at the start of a node process.  Pending writes are lost."""
        self._unwritten.clear()
        return self.written()

    def written(self) -> list[RememberedTask]:
        return [self._tasks[id] for id in sorted(self._tasks)]

    def remember(self, task: RememberedTask) -> None:
        files = self._unwritten if self._is_full else self._tasks
        files[task.assigned.task.id] = task

    def forget(self, id: TaskId) -> None:
        self._unwritten.pop(id, None)
        self._tasks.pop(id, None)

    def fill(self) -> None:
        """Make every write wait for ``make_room``."""
        self._is_full = True

    def make_room(self) -> None:
        """Carry out the waiting writes."""
        self._is_full = False
        self._tasks |= self._unwritten
        self._unwritten.clear()

    async def run(self) -> None:
        """Run until cancelled.  Writes are immediate, so there is nothing to do."""
        await asyncio.Event().wait()
