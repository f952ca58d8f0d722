"""Services that wait for others before their tasks are given nodes (label ``skep.depends-on``).

A task that waits holds nothing, so it takes no room from what it waits for.  Only a service without a running task
waits: one that runs is scaled, and its crashed tasks are replaced, whatever becomes of what it depends on.  An update
waits with its first task, which is why a migration that is deployed together with a service comes before it.

After a loss of power the store still says that everything runs.  What a task's status says counts only when it was
written after its node's last registration, or when the node has had the time to report otherwise (``Confirmed``).

A job that has completed counts as long as the services that it depends on itself satisfy its conditions: after a
loss of power a web service that depends on a migration, which depends on a database, waits for the database.  A job
with a time to live stays as long as a service requires it (``dependents.requiring``).
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Final, TypeAlias

import msgspec
from msgspec.structs import replace

from skep.manager.dependents import circle, is_same_task, reached
from skep.manager.heartbeats import configured_grace_s
from skep.manager.job_runs import COMPLETED, is_going, outcome
from skep.model.constraints import is_satisfied
from skep.model.dependencies import (
    DOES_NOT_EXIST,
    HAS_ENDED,
    HAS_FAILED,
    WAITS_FOR,
    Condition,
    Dependency,
    dependencies_of,
)
from skep.model.ids import NodeId, ServiceId, TaskId
from skep.model.meta import Version
from skep.model.node import Availability, Node, NodeState
from skep.model.service import Placement, RestartCondition, Service, ServiceMode, TaskSpec
from skep.model.slot_volumes import has_other_properties
from skep.model.task import Task, TaskState
from skep.store.interface import Commit, Created, Deleted, Event, Updated, View
from skep.store.kinds import has_unreadable_run

REPORTED_S: Final = 10.0
"""A node that has registered reports the states of its tasks within this time."""
RETURNED_S: Final = 12.0
"""Longest time in which a node finds a manager again; with a grace of its own, that counts twice."""


class Waiting(msgspec.Struct, frozen=True):
    """Why a service waits, and which changes can end that."""

    reason: str
    services: frozenset[ServiceId] = frozenset()
    """Services whose tasks count."""
    names: frozenset[str] = frozenset()
    """Names of the service and of all that it depends on, directly or not, whether they exist or not."""
    nodes: tuple[frozenset[NodeId], ...] = ()
    """Nodes whose return or change counts, by service."""
    until: float | None = None
    """When the service is checked again, at the latest."""


_Key: TypeAlias = tuple[ServiceId, Version | None]
Looked: TypeAlias = dict[_Key, Waiting | None]
"""By service and version, what its tasks wait for."""


class Confirmed:
    """What the cluster's nodes have said in this term."""

    def __init__(self, began: float) -> None:
        self._began = began
        self._registered: dict[NodeId, float] = {}
        self._reported: dict[TaskId, float] = {}

    def record(self, commit: Commit, now: float) -> None:
        """Take note of registrations, and of what nodes report."""
        for event in commit.events:
            match event:
                case Updated(Task() as old, Task() as task) if old.status is not task.status:
                    if task.status.state.is_terminal:
                        self._reported.pop(task.id, None)
                    elif old.status.state != task.status.state and task.status.state >= TaskState.STARTING:
                        self._reported[task.id] = now
                case Updated(Node() as before, Node() as node) if before.session != node.session:
                    self._registered[node.id] = now
                case Deleted(Task() as task):
                    self._reported.pop(task.id, None)
                case Deleted(Node() as node):
                    self._registered.pop(node.id, None)

    def at(self, task: Task, view: View) -> float | None:
        """When the task's status counts as confirmed; None: not before its node is back."""
        node = view.lookup(Node, task.node_id)
        if node is None or node.status.state is not NodeState.READY:
            return None
        registered = self._registered.get(task.node_id)
        reported = self._reported.get(task.id)
        if reported is not None and (registered is None or reported >= registered):
            return reported
        if registered is not None:
            return registered + REPORTED_S
        return self._began + max(2 * configured_grace_s(view), RETURNED_S)


class _State(msgspec.Struct, frozen=True):
    """What the tasks of a service say about a dependency on it."""

    is_met: bool = False
    has_completed: bool = False
    """All its runs have completed: the dependency is met if those of the service itself are."""
    nodes: frozenset[NodeId] = frozenset()
    until: float | None = None
    why_in_vain: str = ""
    """Why it is not met unless somebody acts, or an empty string if it may be met."""


_States: TypeAlias = dict[Dependency, _State]
"""Those found in one state of the cluster.  Many services depend on the same one, which may have thousands of tasks."""


class _Look:
    """One look at a service and what it depends on."""

    def __init__(
        self,
        name: str,
        view: View,
        confirmed: Callable[[Task, View], float | None],
        now: float,
        states: _States,
    ) -> None:
        self._name = name
        self._view = view
        self._confirmed = confirmed
        self._now = now
        self._states = states
        self.services: set[ServiceId] = set()
        self.nodes: list[frozenset[NodeId]] = []
        self.until: list[float] = []

    def serves(self, tasks: Iterable[Task], least: TaskState, spec: TaskSpec | None = None) -> _State:
        """Whether one of the tasks (made from ``spec``) is known to be that far."""
        nodes: set[NodeId] = set()
        until: list[float] = []
        for task in tasks:
            if (
                task.is_wanted
                and least <= task.status.state <= TaskState.RUNNING
                and (spec is None or is_same_task(task.spec, spec))
            ):
                at = self._confirmed(task, self._view)
                if at is not None and at <= self._now:
                    return _State(is_met=True)
                nodes.add(task.node_id)
                if at is not None:
                    until.append(at)
        return _State(nodes=frozenset(nodes), until=min(until, default=None))

    def note(self, state: _State) -> bool:
        """Note what can change a state; return whether it is met."""
        if state.nodes:
            self.nodes.append(state.nodes)
        if state.until is not None:
            self.until.append(state.until)
        return state.is_met

    def unmet(self, dependencies: Iterable[Dependency], path: Collection[str]) -> str:
        """What is waited for; empty: nothing.  ``path``: services that are being looked at."""
        for one in dependencies:
            if one.service in path or not (reason := self._unmet(one, path)):
                continue
            # Two transactions at a time may close a circle, or a rollback by the leader.
            if not circle(self._view, self._name, [one]):
                return reason
        return ""

    def _unmet(self, one: Dependency, path: Collection[str]) -> str:
        found = [each for each in self._view.find(Service, name=one.service) if each.removed_at is None]
        if not found:
            return f"{WAITS_FOR}{one.service}{DOES_NOT_EXIST}" if one.is_required else ""
        service = found[0]
        self.services.add(service.id)
        if _wants_none(service.spec.mode):  # as Compose
            return ""
        if one not in self._states:
            self._states[one] = self._state(one, service)
        state = self._states[one]
        if self.note(state):
            return ""
        if state.has_completed and one.condition is not Condition.HEALTHY:
            return self.unmet(dependencies_of(service.spec.labels), {*path, one.service})
        return f"{WAITS_FOR}{one.service} {one.condition.words}{state.why_in_vain}"

    def _state(self, one: Dependency, service: Service) -> _State:
        tasks = self._view.find(Task, service_id=service.id)
        if not one.is_required and _has_failed(tasks):
            return _State(is_met=True)
        if one.restarts:
            tasks = [task for task in tasks if is_same_task(task.spec, service.spec.task_template)]
        if _has_completed(service, tasks, self._view) and one.condition is not Condition.HEALTHY:
            return _State(has_completed=True)
        # What failed on a node is not missing once the node may not run it.
        failed = frozenset(task.node_id for task in tasks if task.has_failed)
        if one.condition is Condition.COMPLETED:
            return _State(nodes=failed, why_in_vain=_why_in_vain(service, tasks, self._view))
        least = TaskState.STARTING if one.condition is Condition.STARTED else TaskState.RUNNING
        state = self.serves(tasks, least)
        if state.is_met:
            return state
        why = _why_in_vain(service, tasks, self._view)
        return replace(state, nodes=state.nodes | failed, why_in_vain=why)


def awaited(
    task: Task,
    view: View,
    confirmed: Callable[[Task, View], float | None],
    now: float,
    states: _States | None = None,
) -> Waiting | None:
    """What ``task`` waits for before it may have a node; None: nothing.

    Args:
        confirmed: when the status of a task counts as confirmed.
        now: on the same clock.
        states: of dependencies, found in ``view`` before; it gets further ones.
    """
    service = view.lookup(Service, task.service_id)
    if service is None or not (dependencies := dependencies_of(service.spec.labels)):
        return None
    look = _Look(service.spec.name, view, confirmed, now, states if states is not None else {})
    if look.note(look.serves(view.find(Task, service_id=service.id), TaskState.RUNNING, task.spec)):
        return None
    reason = look.unmet(dependencies, {service.spec.name})
    if not reason:
        return None
    return Waiting(
        reason,
        frozenset({service.id, *look.services}),
        frozenset({service.spec.name, *reached(view, dependencies)}),
        tuple(look.nodes),
        min(look.until, default=None),
    )


def _may_end_wait(old: Task, task: Task) -> bool:
    """Whether a change of a task can end the wait for its service: before it starts, it says nothing new."""
    if old.is_wanted != task.is_wanted:
        return True
    return old.status.state != task.status.state and task.status.state >= TaskState.STARTING


def _asks_for_the_same(before: Service, service: Service) -> bool:
    """Whether only its update or its addresses went on."""
    return (before.spec, before.removed_at, before.job_status) == (
        service.spec,
        service.removed_at,
        service.job_status,
    )


def _has_failed(tasks: Sequence[Task]) -> bool:
    """Whether it is in a crash loop, or was given up."""
    wanted = [task for task in tasks if task.is_wanted]
    if wanted:
        return any(task.restart is not None and task.restart.failures for task in wanted)
    return any(task.ended_in_failure for task in tasks)


def _why_in_vain(service: Service, tasks: Sequence[Task], view: View) -> str:
    """Why the service does not come to what is waited for unless somebody acts; empty: it may.

    A job with a schedule has a next run.
    """
    job = service.job_status
    if job is not None:
        if job.schedule is not None or is_going(view, service):
            return ""
        return HAS_ENDED if outcome(view, service) == COMPLETED else HAS_FAILED
    has_failed = any(task.ended_in_failure and task.spec_version == service.spec_version for task in tasks)
    return HAS_FAILED if has_failed and not any(task.is_wanted for task in tasks) else ""


def _has_completed(service: Service, tasks: Sequence[Task], view: View) -> bool:
    """Whether every run of a job, or of a service whose tasks are not started again, has completed."""
    mode, policy = service.spec.mode, service.spec.task_template.restart_policy
    if has_unreadable_run(view, service.id):
        return False
    if service.job_status is not None:
        if service.job_status.present_outcome == COMPLETED:
            return True  # of a global job, also if its nodes were removed since, and their tasks with them
        tasks = [task for task in tasks if task.job_iteration == service.job_status.job_iteration]
    elif policy is None or policy.condition in (None, RestartCondition.ANY):
        return False
    else:
        tasks = [task for task in tasks if is_same_task(task.spec, service.spec.task_template)]
    complete = [task for task in tasks if task.status.state is TaskState.COMPLETE]
    if mode.global_job is not None or mode.global_ is not None:
        done = {one.node_id for one in complete}
        # What was stopped, or failed, where it may not run any more, on a drained node say, is not missing.
        return bool(complete) and all(
            one.node_id in done
            for one in tasks
            if one.is_active or (one.has_failed and _may_run_there(one, service, view))
        )
    job = mode.replicated_job
    wanted = service.spec.replicas if job is None else job.total_completions or 0
    return bool(complete) and len({one.slot for one in complete}) >= wanted


def _may_run_there(task: Task, service: Service, view: View) -> bool:
    """Whether the node of a global service's task is one of the service's nodes, even if it is down at present."""
    node = view.lookup(Node, task.node_id)
    constraints = (service.spec.task_template.placement or Placement()).constraints
    return (
        node is not None
        and node.spec.availability is not Availability.DRAIN
        and is_satisfied(constraints, node)
    )


def _wants_none(mode: ServiceMode) -> bool:
    """Whether the service is scaled to no task at all."""
    job, replicated = mode.replicated_job, mode.replicated
    return (job is not None and not job.total_completions) or (
        replicated is not None and replicated.replicas == 0
    )


class Waits:
    """The groups of tasks that wait for services, and what they wait for."""

    def __init__(self, began: float) -> None:
        self._confirmed = Confirmed(began)
        self._waiting: dict[_Key, Waiting] = {}
        self._groups: dict[_Key, dict[str, None]] = {}
        self._key_of: dict[str, _Key] = {}
        self._states: _States = {}
        self._states_at: tuple[int, float] | None = None
        """Revision and time at which the states were found."""

    def record(self, commit: Commit, now: float) -> Mapping[str, float]:
        """Take note of what changed; return the groups to decide again, and when."""
        self._confirmed.record(commit, now)
        self._states_at = None
        due: dict[str, float] = {}
        if not self._waiting:
            return due
        for event in commit.events:
            for key, at in self._affected(event, now):
                due.update((group, min(at, due.get(group, at))) for group in self._groups[key])
        return due

    def _affected(self, event: Event, now: float) -> Iterator[tuple[_Key, float]]:
        """What waits for something that the event changes, and when to check it again."""
        match event:
            case Updated(Task() as old, Task() as task) if not _may_end_wait(old, task):
                return
            case Created(Task() as task) | Deleted(Task() as task) | Updated(_, Task() as task):
                yield from (
                    (key, now) for key, one in self._waiting.items() if task.service_id in one.services
                )
            case Updated(Service() as before, Service() as service) if _asks_for_the_same(before, service):
                return
            case (
                Created(Service() as service)
                | Deleted(Service() as service)
                | Updated(_, Service() as service)
            ):
                name = service.spec.name
                yield from ((key, now) for key, one in self._waiting.items() if name in one.names)
            case Updated(Node() as before, Node() as node):
                if (at := self._again_at(before, node, now)) is not None:
                    yield from self._on_node(node.id, at)
            case Deleted(Node() as node):
                yield from self._on_node(node.id, now)

    def _again_at(self, before: Node, node: Node, now: float) -> float | None:
        """When to check what waits for tasks on a node that changed; None: the change cannot end a wait."""
        if before.spec != node.spec or has_other_properties(before, node):
            return now
        if node.status.state is not NodeState.READY:
            return None
        if before.session != node.session:
            return now + REPORTED_S  # what it reports until then is an event of its task
        return now if before.status.state is not NodeState.READY else None

    def _on_node(self, id: NodeId, at: float) -> Iterator[tuple[_Key, float]]:
        for key, one in self._waiting.items():
            if any(id in nodes for nodes in one.nodes) and (one.until is None or at < one.until):
                self._waiting[key] = replace(one, until=at)
                yield key, at

    def of(self, group: str, task: Task, view: View, now: float, found: Looked) -> Waiting | None:
        """What the group of ``task`` waits for; None: nothing.

        ``found``: what was found in ``view`` before.  Each task of a global service is a group: a look at all tasks of
        its service, for each of them, would be quadratic.
        """
        key = task.service_id, task.spec_version
        if self._states_at != (view.revision, now):
            self._states, self._states_at = {}, (view.revision, now)
        if key not in found:
            found[key] = awaited(task, view, self._confirmed.at, now, self._states)
        waiting = found[key]
        self.forget(group)
        if waiting is not None:
            self._waiting[key] = waiting
            self._groups.setdefault(key, {})[group] = None
            self._key_of[group] = key
        return waiting

    def forget(self, group: str) -> None:
        """The group has no pending task, or waits no more."""
        key = self._key_of.pop(group, None)
        if key is None:
            return
        groups = self._groups[key]
        del groups[group]
        if not groups:
            del self._groups[key], self._waiting[key]
