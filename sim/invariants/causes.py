"""Rules on reasons: no update stops without a cause, and the history records why each task was replaced."""

from collections.abc import Collection, Iterable

from sim.world.committed import Change
from skep.manager.journal.changes import entries_of
from skep.manager.orchestrator.changes import ROLLED_BACK
from skep.manager.orchestrator.replacement.early_failures import step_seconds_max
from skep.manager.orchestrator.unplaceable import UNPLACEABLE_S
from skep.model.node import Node, is_lost
from skep.model.options.labels import PROGRESS_DEADLINE
from skep.model.service import (
    UNDER_WAY,
    Service,
    ServiceSpec,
    UpdateConfig,
    UpdateFailureAction,
    UpdateState,
    UpdateStatus,
)
from skep.model.task import Task, TaskState
from skep.model.values.ids import ServiceId, TaskId
from skep.store.interface import Created, Deleted, Updated, View

STOPPED = (ROLLED_BACK, "update paused", "rollback paused")
"""Prefixes of the leader's messages.  The messages of users' rollbacks differ."""
TOLERANCE = 0.99
"""Clocks of machines run at different rates."""
BY_ITSELF = (TaskState.COMPLETE, TaskState.FAILED, TaskState.REJECTED)


class UpdateEndsHaveCauses:
    """The leader pauses an update or rolls it back only after a committed failure or the progress deadline.

    An update that tolerates no failure completes only if one of its tasks has run.
    """

    def __init__(self) -> None:
        self._begun: dict[tuple[ServiceId, int], float] = {}
        """Time at which the first task of a version was created."""
        self._failed: set[tuple[ServiceId, int]] = set()
        """Versions with a task that ended by itself."""
        self._ran: set[tuple[ServiceId, int]] = set()
        """Versions with a task that ran."""

    def __call__(self, change: Change, view: View) -> Iterable[str]:
        for event in change.events:
            match event:
                case Created(Task() as task) if task.spec_version is not None:
                    self._begun.setdefault((task.service_id, task.spec_version.index), change.time_s)
                case Updated(_, Task() as task) if task.spec_version is not None:
                    if task.status.state in BY_ITSELF:
                        self._failed.add((task.service_id, task.spec_version.index))
                    if task.status.state is TaskState.RUNNING:
                        self._ran.add((task.service_id, task.spec_version.index))
                case Deleted(Service() as service):
                    self._begun = {key: at for key, at in self._begun.items() if key[0] != service.id}
                    self._failed = {key for key in self._failed if key[0] != service.id}
                    self._ran = {key for key in self._ran if key[0] != service.id}
                case Updated(Service() as before, Service() as after):
                    if _is_stopped(before, after) and not self._has_cause(before, change.time_s):
                        assert after.update_status is not None
                        yield f"{after.id}: {after.update_status.message}, though no task of it has failed"
                    if _has_completed(before, after) and self._never_ran(after, view, _created(change)):
                        yield f"{after.id}: the update has completed, though no task of it has run"

    def _never_ran(self, service: Service, view: View, created: Collection[TaskId]) -> bool:
        """Return whether the service has tasks of its current version, and none of them has run.

        Tasks of removed nodes do not count, because they are retired next.  If the service is global, the same holds
        for nodes that are down.  Tasks that are ``created`` in the same commit do not count either: they replace a task
        of an earlier version with the same template, which has ended.
        """
        version, config = service.spec_version, service.spec.update_config or UpdateConfig()
        if (
            version is None
            or config.failure_action is UpdateFailureAction.CONTINUE
            or config.max_failure_ratio
        ):
            return False
        tasks = view.find(Task, service_id=service.id)
        is_made = any(
            task.is_wanted
            and task.id not in created
            and task.spec_version == version
            and (not task.node_id or _keeps_tasks(service, view.lookup(Node, task.node_id)))
            for task in tasks
        )
        return is_made and (service.id, version.index) not in self._ran

    def _has_cause(self, service: Service, now: float) -> bool:
        if service.spec_version is None:
            return False
        # A staged update continues with the tasks of earlier specs that run the same containers.
        versions = {
            service.spec_version.index,
            *(service.split.versions if service.split is not None else ()),
        }
        keys = [(service.id, version) for version in versions]
        begun = min(self._begun.get(key, now) for key in keys)
        is_late = now - begun >= TOLERANCE * shortest_deadline_s(service.spec)
        return is_late or not self._failed.isdisjoint(keys)


def _keeps_tasks(service: Service, node: Node | None) -> bool:
    """Return whether the service's tasks on the node are not retired next."""
    return node is not None if service.spec.mode.global_ is None else not is_lost(node)


def _created(change: Change) -> frozenset[TaskId]:
    return frozenset(
        event.object.id
        for event in change.events
        if isinstance(event, Created) and isinstance(event.object, Task)
    )


def shortest_deadline_s(spec: ServiceSpec) -> float:
    """Return after how many seconds an update may fail without progress, at the earliest."""
    seconds = step_seconds_max(spec)
    return seconds if PROGRESS_DEADLINE in spec.labels else min(seconds, UNPLACEABLE_S)


def replacements_are_recorded(change: Change, view: View) -> Iterable[str]:
    """Check that each task which replaces an earlier one has an entry with its reason."""
    for event in change.events:
        if (
            not isinstance(event, Created)
            or not isinstance(task := event.object, Task)
            or not task.service_id
        ):
            continue
        slot = view.find(Task, slot=f"{task.service_id}/{task.slot or task.node_id}")
        earlier = [
            one
            for one in slot
            if one.created_at < task.created_at and one.job_iteration == task.job_iteration
        ]
        found = [one for one in entries_of(event, view) if one.action == "replace"]
        if len(found) != bool(earlier) or not all(
            one.message.partition(" is replaced: ")[2] for one in found
        ):
            yield f"{task.id} in slot {task.slot}: {len(earlier)} tasks before it, history: {found}"


def _has_completed(before: Service, after: Service) -> bool:
    was, now = before.update_status or UpdateStatus(), after.update_status or UpdateStatus()
    return now.state is UpdateState.COMPLETED and was.state in UNDER_WAY


def _is_stopped(before: Service, after: Service) -> bool:
    """Return whether the leader has stopped the update just now.

    An earlier stop does not count if only its message is shown again, after the error of a decision was shown with it.
    """
    was, now = before.update_status or UpdateStatus(), after.update_status or UpdateStatus()
    is_new = (before.spec_version, was.state) != (after.spec_version, now.state)
    return is_new and now.message.startswith(STOPPED)
