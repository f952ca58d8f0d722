"""Finds services that must wait for other services before their tasks are assigned (label ``skep.depends-on``).

A waiting task holds nothing, so it takes no resources from the services that it waits for.  Only a service without a
running task waits.  A running service can be scaled, and its crashed tasks are replaced, whatever happens to its
dependencies.  An update waits before its first task, so a migration that is deployed together with a service runs
first.

After a power loss the store still says that everything runs.  A task's status counts only if it was written after its
node's last registration, or if the node has had enough time to report another one (``Confirmed``).

A completed job counts while the services that it depends on satisfy its own conditions: after a power loss a web
service that depends on a migration, which depends on a database, waits for the database.  It does not wait for services
that were removed since the job completed.  A job with a time to live stays while a service requires it
(``dependents.requiring``).
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Final, TypeAlias

import msgspec
from msgspec.structs import replace

from skep.manager.nodes.heartbeats import configured_grace_s
from skep.manager.services.dependent_services import circle, is_same_task, reached
from skep.manager.services.job_runs import COMPLETED, FAILED, is_going, outcome
from skep.model.node import Availability, Node, NodeState, is_lost
from skep.model.options.constraints import is_satisfied
from skep.model.options.dependencies import (
    DOES_NOT_EXIST,
    HAS_ENDED,
    HAS_FAILED,
    IS_STOPPED,
    WAITS_FOR,
    Dependency,
    DependencyCondition,
    dependencies_of,
    endless_wait,
)
from skep.model.options.labels import is_stopped
from skep.model.options.slot_volumes import has_other_properties
from skep.model.service import Placement, RestartCondition, Service, ServiceMode, TaskSpec
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId, ServiceId, TaskId
from skep.model.values.meta import Version
from skep.store.interface import Commit, Created, Deleted, Event, Updated, View
from skep.store.kinds import has_unreadable_run

REPORTED_S: Final = 10.0
"""Seconds within which a node that has registered reports the states of its tasks."""
RETURNED_S: Final = 12.0
"""Maximum seconds until a node finds a manager again.  The alternative is twice the grace period, if longer."""


class WaitReason(msgspec.Struct, frozen=True):
    """The reason why a service waits, and the changes that can end the wait."""

    reason: str
    services: frozenset[ServiceId] = frozenset()
    """Services whose tasks count."""
    names: frozenset[str] = frozenset()
    """Names of the service and of its direct and indirect dependencies in lower case, even if they do not exist."""
    nodes: tuple[frozenset[NodeId], ...] = ()
    """Nodes whose return or change counts, by service."""
    until: float | None = None
    """Latest time of the next check of the service."""


_WHICH_WAITS: Final = f", which {WAITS_FOR}"


_Key: TypeAlias = tuple[ServiceId, Version | None]
FoundWaits: TypeAlias = dict[_Key, WaitReason | None]
"""The wait of each service and version's tasks, or None if they do not wait."""


class Confirmed:
    """Node registrations and task reports of this term, which confirm the task states in the store."""

    def __init__(self, began: float) -> None:
        self._began = began
        self._registered: dict[NodeId, float] = {}
        self._reported: dict[TaskId, float] = {}

    def record(self, commit: Commit, now: float) -> None:
        """Record the registrations and reports in ``commit``."""
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
        """Return the time at which the task's status counts as confirmed, or None as long as its node has not
        reconnected.
        """
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
    """State of a dependency, derived from the tasks of the service depended on."""

    is_met: bool = False
    has_completed: bool = False
    """Whether all its runs have completed.  The dependency is then met if that service's own dependencies are met."""
    nodes: frozenset[NodeId] = frozenset()
    until: float | None = None
    blocked_suffix: str = ""
    """Suffix for the reason if the dependency cannot be met without a user's action.  Empty if it may still be met."""


_States: TypeAlias = dict[Dependency, _State]
"""Dependency states as of one revision.  Many services may depend on one service with thousands of tasks."""


class _Check:
    """A check of one service and its dependencies."""

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
        self.confirmed = confirmed
        self._now = now
        self._states = states
        self.services: set[ServiceId] = set()
        self.nodes: list[frozenset[NodeId]] = []
        self.until: list[float] = []

    def serves(self, tasks: Iterable[Task], least: TaskState, spec: TaskSpec | None = None) -> _State:
        """Find whether one of the tasks (if made from ``spec``) has a confirmed state of at least ``least``."""
        nodes: set[NodeId] = set()
        until: list[float] = []
        for task in tasks:
            if (
                task.is_wanted
                and least <= task.status.state <= TaskState.RUNNING
                and (spec is None or is_same_task(task.spec, spec))
            ):
                at = self.confirmed(task, self._view)
                if at is not None and at <= self._now:
                    return _State(is_met=True)
                nodes.add(task.node_id)
                if at is not None:
                    until.append(at)
        return _State(nodes=frozenset(nodes), until=min(until, default=None))

    def note(self, state: _State) -> bool:
        """Record which changes can alter ``state``.  Returns whether it is met."""
        if state.nodes:
            self.nodes.append(state.nodes)
        if state.until is not None:
            self.until.append(state.until)
        return state.is_met

    def unmet(self, dependencies: Iterable[Dependency], path: Collection[str]) -> str:
        """Return the reason to wait, or an empty string.  ``path`` has the names that are already being checked."""
        for one in dependencies:
            if one.key in path or not (reason := self._unmet(one, path)):
                continue
            # Two concurrent transactions, or a rollback by a leader of an earlier version, may have created a cycle.
            if not circle(self._view, self._name, [one]):
                return reason
        return ""

    def _unmet(self, one: Dependency, path: Collection[str]) -> str:
        found = [each for each in self._view.find(Service, name=one.service) if each.removed_at is None]
        if not found:
            is_indirect = len(path) > 1  # through a completed job, which therefore no longer needs it
            return f"{WAITS_FOR}{one.service}{DOES_NOT_EXIST}" if one.is_required and not is_indirect else ""
        service = found[0]
        self.services.add(service.id)
        if _wants_none(service.spec.mode):  # the same as in Compose
            return ""
        if service.job_status is None and is_stopped(service.spec.labels):
            return f"{WAITS_FOR}{one.service} {one.condition.words}{IS_STOPPED}" if one.is_required else ""
        if one not in self._states:
            self._states[one] = self._state(one, service)
        state = self._states[one]
        if self.note(state):
            return ""
        if state.has_completed and one.condition is not DependencyCondition.HEALTHY:
            return self.unmet(dependencies_of(service.spec.labels), {*path, one.key})
        return f"{WAITS_FOR}{one.service} {one.condition.words}{state.blocked_suffix}"

    def _state(self, one: Dependency, service: Service) -> _State:
        tasks = self._view.find(Task, service_id=service.id)
        if not one.is_required and _has_failed(tasks, self._view):
            return _State(is_met=True)
        if one.restarts:
            tasks = [task for task in tasks if is_same_task(task.spec, service.spec.task_template)]
        if _has_completed(service, tasks, self._view) and one.condition is not DependencyCondition.HEALTHY:
            return _State(has_completed=True)
        # A failed task does not count once its node may no longer run it.
        failed = frozenset(task.node_id for task in tasks if task.has_failed)
        why = _blocked_suffix(service, tasks, self._view) or _own_wait(tasks)
        if not one.is_required and why.startswith(_WHICH_WAITS) and why.endswith(HAS_FAILED):
            return _State(is_met=True)
        if one.condition is DependencyCondition.COMPLETED:
            return _State(nodes=failed, blocked_suffix=why)
        least = TaskState.STARTING if one.condition is DependencyCondition.STARTED else TaskState.RUNNING
        state = self.serves(tasks, least)
        if state.is_met:
            return state
        return replace(state, nodes=state.nodes | failed, blocked_suffix=why)


def awaited(
    task: Task,
    view: View,
    confirmed: Callable[[Task, View], float | None],
    now: float,
    states: _States | None = None,
) -> WaitReason | None:
    """Return the reason why ``task`` may not be assigned yet, or None.

    Args:
        confirmed: Returns when the status of a task counts as confirmed.
        now: The time on the same clock.
        states: Dependency states found in ``view`` before.  New ones are added.
    """
    service = view.lookup(Service, task.service_id)
    if service is None or not (dependencies := dependencies_of(service.spec.labels)):
        return None
    look = _Check(service.spec.name, view, confirmed, now, states if states is not None else {})
    if look.note(look.serves(view.find(Task, service_id=service.id), TaskState.RUNNING, task.spec)):
        return None
    name = service.spec.name.lower()
    reason = look.unmet(dependencies, {name})
    if not reason:
        return None
    return WaitReason(
        reason,
        frozenset({service.id, *look.services}),
        frozenset({name, *reached(view, dependencies)}),
        tuple(look.nodes),
        min(look.until, default=None),
    )


def _may_end_wait(old: Task, task: Task) -> bool:
    """Return whether a change of a task can end the wait for its service, or change the reason.  Changes before its
    start cannot, unless it begins or ends to wait for a service that cannot become ready.
    """
    if old.is_wanted != task.is_wanted or endless_wait(old.status.err) != endless_wait(task.status.err):
        return True
    return old.status.state != task.status.state and task.status.state >= TaskState.STARTING


def _wants_same_tasks(before: Service, service: Service) -> bool:
    """Return whether only the service's update or addresses changed."""
    return (before.spec, before.removed_at, before.job_status) == (
        service.spec,
        service.removed_at,
        service.job_status,
    )


def _has_failed(tasks: Sequence[Task], view: View) -> bool:
    """Return whether the service is in a crash loop, or its restarts have ended."""
    wanted = [task for task in tasks if task.is_wanted]
    if wanted:
        return any(task.restart is not None and task.restart.failures for task in wanted)
    return any(_ended_undone(task, view) for task in tasks)


def _ended_undone(task: Task, view: View) -> bool:
    """Return whether the task failed, or was stopped for good before it had done its work."""
    if task.status.state.is_terminal or not task.was_stopped_for_good:
        return task.ended_in_failure or task.was_stopped_for_good
    return is_lost(view.lookup(Node, task.node_id))


def _blocked_suffix(service: Service, tasks: Sequence[Task], view: View) -> str:
    """Return why the service cannot meet the condition without a user's action, or an empty string if it may.

    A scheduled job has a next run.
    """
    job = service.job_status
    if job is not None:
        if job.schedule is not None or is_going(view, service):
            return ""
        return {COMPLETED: HAS_ENDED, FAILED: HAS_FAILED}.get(outcome(view, service), "")
    if any(task.is_wanted for task in tasks):
        return ""
    has_failed = any(
        task.spec_version == service.spec_version and _ended_undone(task, view) for task in tasks
    )
    return HAS_FAILED if has_failed else ""


def _own_wait(tasks: Iterable[Task]) -> str:
    """Return a suffix with the last service of the chain that the ``tasks`` wait for, if it cannot become ready."""
    waits = (endless_wait(task.status.err) for task in tasks if task.status.state <= TaskState.PENDING)
    found = next(filter(None, waits), "")
    return f"{_WHICH_WAITS}{found.rpartition(WAITS_FOR)[2]}" if found else ""


def _has_completed(service: Service, tasks: Sequence[Task], view: View) -> bool:
    """Return whether every run of a job, or of a service whose tasks are not restarted, has completed."""
    mode, policy = service.spec.mode, service.spec.task_template.restart_policy
    if has_unreadable_run(view, service.id):
        return False
    if service.job_status is not None:
        if service.job_status.present_outcome == COMPLETED:
            return True  # The outcome of a global job stays, even if its nodes and their tasks have been removed since.
        tasks = [task for task in tasks if task.job_iteration == service.job_status.job_iteration]
    elif policy is None or policy.condition in (None, RestartCondition.ANY):
        return False
    else:
        tasks = [task for task in tasks if is_same_task(task.spec, service.spec.task_template)]
    complete = [task for task in tasks if task.status.state is TaskState.COMPLETE]
    if mode.global_job is not None or mode.global_ is not None:
        done = {one.node_id for one in complete}
        # A stopped or failed task does not count if its node, for example a drained one, may no longer run it.
        return bool(complete) and all(
            one.node_id in done
            for one in tasks
            if one.is_active or (one.has_failed and _may_run_on_its_node(one, service, view))
        )
    job = mode.replicated_job
    wanted = service.spec.replicas if job is None else job.total_completions or 0
    return bool(complete) and len({one.slot for one in complete}) >= wanted


def _may_run_on_its_node(task: Task, service: Service, view: View) -> bool:
    """Return whether the node of a global service's task is one of the service's nodes, even if it is down now."""
    node = view.lookup(Node, task.node_id)
    constraints = (service.spec.task_template.placement or Placement()).constraints
    return (
        node is not None
        and node.spec.availability is not Availability.DRAIN
        and is_satisfied(constraints, node)
    )


def _wants_none(mode: ServiceMode) -> bool:
    """Return whether the service is scaled to zero tasks."""
    job, replicated = mode.replicated_job, mode.replicated
    return (job is not None and not job.total_completions) or (
        replicated is not None and replicated.replicas == 0
    )


class Waits:
    """Groups of tasks that wait for services, and the reasons."""

    def __init__(self, began: float) -> None:
        self.confirmed = Confirmed(began)
        self._waiting: dict[_Key, WaitReason] = {}
        self._groups: dict[_Key, dict[str, None]] = {}
        self._key_of: dict[str, _Key] = {}
        self._states: _States = {}
        self._states_at: tuple[int, float] | None = None
        """Revision and time at which ``_states`` was computed."""

    def record(self, commit: Commit, now: float) -> Mapping[str, float]:
        """Record a commit.  Returns the groups that must be decided again, with the times for that."""
        self.confirmed.record(commit, now)
        self._states_at = None
        due: dict[str, float] = {}
        if not self._waiting:
            return due
        for event in commit.events:
            for key, at in self._affected(event, now):
                due.update((group, min(at, due.get(group, at))) for group in self._groups[key])
        return due

    def _affected(self, event: Event, now: float) -> Iterator[tuple[_Key, float]]:
        """Yield the keys that wait for something that the event changes, and when to check them again."""
        match event:
            case Updated(Task() as old, Task() as task) if not _may_end_wait(old, task):
                return
            case Created(Task() as task) | Deleted(Task() as task) | Updated(_, Task() as task):
                yield from (
                    (key, now) for key, one in self._waiting.items() if task.service_id in one.services
                )
            case Updated(Service() as before, Service() as service) if _wants_same_tasks(before, service):
                return
            case (
                Created(Service() as service)
                | Deleted(Service() as service)
                | Updated(_, Service() as service)
            ):
                name = service.spec.name.lower()
                yield from ((key, now) for key, one in self._waiting.items() if name in one.names)
            case Updated(Node() as before, Node() as node):
                if (at := self._again_at(before, node, now)) is not None:
                    yield from self._on_node(node.id, at)
            case Deleted(Node() as node):
                yield from self._on_node(node.id, now)

    def _again_at(self, before: Node, node: Node, now: float) -> float | None:
        """Return when to check the waits for tasks on a changed node, or None if the change cannot end a wait."""
        if before.spec != node.spec or has_other_properties(before, node):
            return now
        if node.status.state is not NodeState.READY:
            return None
        if before.session != node.session:
            return now + REPORTED_S  # earlier reports cause events of their own
        return now if before.status.state is not NodeState.READY else None

    def _on_node(self, id: NodeId, at: float) -> Iterator[tuple[_Key, float]]:
        for key, one in self._waiting.items():
            if any(id in nodes for nodes in one.nodes) and (one.until is None or at < one.until):
                self._waiting[key] = replace(one, until=at)
                yield key, at

    def of(self, group: str, task: Task, view: View, now: float, found: FoundWaits) -> WaitReason | None:
        """Return the reason why the group of ``task`` waits, or None.

        Args:
            found: Earlier results for the same ``view``.  Each task of a global service is a group, so without them,
                checking all tasks of the service for each group would be quadratic.
        """
        key = task.service_id, task.spec_version
        if self._states_at != (view.revision, now):
            self._states, self._states_at = {}, (view.revision, now)
        if key not in found:
            found[key] = awaited(task, view, self.confirmed.at, now, self._states)
        waiting = found[key]
        self.forget(group)
        if waiting is not None:
            self._waiting[key] = waiting
            self._groups.setdefault(key, {})[group] = None
            self._key_of[group] = key
        return waiting

    def forget(self, group: str) -> None:
        """Forget a group that has no pending task or no longer waits."""
        key = self._key_of.pop(group, None)
        if key is None:
            return
        groups = self._groups[key]
        del groups[group]
        if not groups:
            del self._groups[key], self._waiting[key]
