"""A service with its tasks and nodes, to which orchestration decisions are applied, without store, loop and clock."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import Any

from msgspec.structs import replace

from skep.manager.control.services import previous_after
from skep.manager.control_loops.loop_driver import Recheck
from skep.manager.orchestrator.changes import Change, Step, apply, decided_for
from skep.manager.orchestrator.convergence import next_steps
from skep.manager.orchestrator.decision_inputs import Situation
from skep.manager.orchestrator.observed_times import ObservedTimes
from skep.manager.orchestrator.replacement.enforcement import overcommitted
from skep.model.node import Node
from skep.model.permissions.user import User
from skep.model.service import Service, ServiceSpec
from skep.model.staging.updates import QueryVerdict, TaskRequests, status_after
from skep.model.swarm import Swarm
from skep.model.task import Task, TaskState
from skep.model.task_end import TaskEnd
from skep.model.values.ids import NodeId, TaskId, VolumeId
from skep.model.values.meta import Version
from skep.model.values.times import timestamp
from skep.model.volume import Volume
from skep.store.interface import Commit, Created, Event, Updated
from skep.store.keys import HEAD
from skep.store.kinds import Payload, SpecVersion, spec_version_id
from skep.store.level import LEVEL
from skep.store.schema import SCHEMA_BY_TYPE


class World:
    """Holds one service.  Time stands still unless ``now`` is changed."""

    level = LEVEL

    def __init__(self, service: Service, tasks: Iterable[Task] = (), nodes: Iterable[Node] = ()) -> None:
        self.service = service
        self.tasks = {task.id: task for task in tasks}
        self.nodes = {node.id: node for node in nodes}
        self.payloads: dict[str, Payload] = {}
        self.specs = {service.spec_version: service.spec}
        self.unread_versions: set[Version | None] = set()
        self.unknown: set[TaskId] = set()
        """Tasks whose status cannot be read."""
        self.seen = ObservedTimes(0.0)
        self.now = 0.0
        self.now_ns = 0
        self.silence_s = 0.0
        self.keeps_unfit = False
        self.requests = TaskRequests()
        self.query = QueryVerdict()
        self.volumes: dict[VolumeId, Volume] = {}
        self.held: set[TaskId] = set()
        """Tasks without reports."""
        self._numbers = count(1)

    # -- decisions ---------------------------------------------------------------------------------------------

    @property
    def situation(self) -> Situation:
        return Situation(
            service=self.service,
            tasks=tuple(self.tasks.values()),
            nodes=lambda: tuple(self.nodes[id] for id in sorted(self.nodes)),
            node=self.nodes.get,
            overcommitted=self._overcommitted,
            spec_of=self._spec_of,
            is_unknown=lambda task: task.spec_version in self.unread_versions,
            has_unknown_status=lambda task: task.id in self.unknown,
            volume=self.volumes.get,
            seen=self.seen,
            now=self.now,
            now_ns=self.now_ns,
            silence_s=self.silence_s,
            keeps_unfit=self.keeps_unfit,
            requests=self.requests,
            query=self.query,
        )

    def _overcommitted(self, node_id: NodeId) -> frozenset[TaskId]:
        tasks = [task for task in self.tasks.values() if task.node_id == node_id]
        return overcommitted(self.nodes[node_id], tasks)

    def steps(self) -> list[Step]:
        return next_steps(self.situation)

    def changes(self) -> list[Change]:
        steps = [decided_for(self.service, step) for step in self.steps()]
        return [step for step in steps if not isinstance(step, Recheck)]

    def apply(self, changes: Sequence[Change]) -> None:
        """Apply changes with the orchestrator's own transactions."""
        for change in changes:
            apply(
                self,
                change,
                lambda: f"new{next(self._numbers):04}",
                timestamp(2 * 10**18 + next(self._numbers)),
            )  # type: ignore[arg-type]

    def settle(self) -> int:
        """Decide and apply until nothing changes.  Return the number of rounds."""
        for rounds in range(50):
            changes = self.changes()
            if not changes:
                return rounds
            self.apply(changes)
        raise AssertionError("it never settles")

    # -- events ------------------------------------------------------------------------------------------------

    def report(self, task_id: str, state: TaskState, end: TaskEnd | None = None) -> None:
        """Report a state, as the task's agent does."""
        task = self.tasks[TaskId(task_id)]
        if task.id in self.held:
            return
        self.put(replace(task, status=replace(task.status, state=state, end=end)))

    def run_all(self) -> None:
        """Run every desired task that is allowed to run."""
        for task in list(self.tasks.values()):
            if task.desired_state is TaskState.RUNNING and not task.status.state.is_terminal:
                self.report(task.id, TaskState.RUNNING)

    def prepare_all(self) -> None:
        """Prepare every task whose desired state is ready."""
        for task in list(self.tasks.values()):
            if task.desired_state is TaskState.READY and task.status.state < TaskState.READY:
                self.report(task.id, TaskState.READY)

    def stop_all(self) -> None:
        """Stop every retired task."""
        for task in list(self.tasks.values()):
            if task.desired_state > TaskState.RUNNING and not task.status.state.is_terminal:
                self.report(task.id, TaskState.SHUTDOWN)

    def update(self, spec: ServiceSpec) -> None:
        """Update the service, as a user does."""
        service = self.service
        status = status_after(service, spec, service.updated_at)
        self.put(
            replace(service, previous_spec=previous_after(service, spec), spec=spec, update_status=status)
        )

    # -- the part of a transaction that changes need -------------------------------------------------------------

    def lookup(self, kind: type[Any], id: str) -> Any:
        match kind.__name__:
            case "Service":
                return self.service if self.service.id == id else None
            case "Task":
                return self.tasks.get(TaskId(id))
            case "SpecVersion":
                specs = {
                    spec_version_id(self.service.id, of): (of, one) for of, one in self.specs.items() if of
                }
                return (
                    SpecVersion(
                        id=id, service_id=self.service.id, index=specs[id][0].index, spec=specs[id][1]
                    )
                    if id in specs
                    else None
                )
            case "Payload":
                return self.payloads.get(id)
            case _:
                return self.nodes.get(NodeId(id))

    get = lookup

    def rely_on(self, kind: type[Any], id: str, *parts: str) -> Any:
        """Read an object.  Only one object is written at a time here, so nothing can change meanwhile."""
        assert {HEAD, *SCHEMA_BY_TYPE[kind].parts} >= {*parts}
        return self.lookup(kind, id)

    def unreadable(self, kind: type[Any]) -> Mapping[str, str]:
        return {}

    def why_unreadable(self, kind: type[Any], name: str) -> str:
        return ""

    def rely_on_all(self, kind: type[Any]) -> None:
        """Do nothing, for the same reason."""

    def damaged(self, kind: type[Any]) -> Mapping[str, Mapping[str, str]]:
        return {id: {"status": "damaged"} for id in self.unknown} if kind is Task else {}

    def find(self, kind: type[Any], slot: str = "", service_id: str = "") -> list[Any]:
        if kind is Service:
            return [self.service]
        if kind is Node:
            return [*self.nodes.values()]
        if kind in (User, Swarm):
            return []
        assert kind is Task
        if not slot:
            return [t for t in self.tasks.values() if t.service_id == service_id]
        return [t for t in self.tasks.values() if f"{t.service_id}/{t.slot or t.node_id}" == slot]

    def put(self, object: Any) -> Any:
        if isinstance(object, Service):
            if object.spec != self.service.spec:
                assert self.service.spec_version is not None
                version = Version(index=self.service.spec_version.index + 1)
                object = replace(object, spec_version=version)
                self.specs[version] = object.spec
            self.seen.record(Commit(1, (Updated(self.service, object),)), self.now)
            self.service = object
        elif isinstance(object, Payload):
            self.payloads[object.id] = object
        elif isinstance(object, Node):
            self.seen.record(Commit(1, (Updated(self.nodes[object.id], object),)), self.now)
            self.nodes[object.id] = object
        else:
            old = self.tasks.get(object.id)
            event: Event = Created(object) if old is None else Updated(old, object)
            self.tasks[object.id] = object
            self.seen.record(Commit(1, (event,)), self.now)
        return object

    def _spec_of(self, task: Task) -> ServiceSpec | None:
        return self.specs.get(task.spec_version)
