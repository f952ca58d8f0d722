"""A rule on updates: the number of slots out of service is at most the parallelism, whatever interrupts the update."""

from collections import defaultdict
from collections.abc import Iterable

from sim.invariants.nodes.placement import constraints_of, meets
from sim.world.committed import Change
from skep.manager.orchestrator.replacement.early_failures import step_seconds_max
from skep.manager.services.disruption_budget import ROLLBACKS
from skep.model.node import Availability, Node, NodeState
from skep.model.service import Service, UpdateConfig
from skep.model.task import Task, TaskState
from skep.model.values.ids import ServiceId, TaskId
from skep.model.values.meta import Version
from skep.store.interface import Created, Deleted, Updated, View


class UpdateParallelism:
    """Updates never take more slots out of service than their parallelism allows.

    A slot is out of service while its running task is retired for a task of another spec, and no other task runs in it.
    A slot whose new task has failed or missed the progress deadline no longer counts.  A slot that is retried after a
    tolerated failure does not count either.
    """

    def __init__(self) -> None:
        self._out: defaultdict[ServiceId, dict[int, float]] = defaultdict(dict)
        """Slots out of service, with the creation times of their new tasks, at which the deadline begins.
        """
        self._created: dict[TaskId, float] = {}
        self._failed: dict[ServiceId, tuple[Version | None, set[int]]] = {}
        """Last version with a failed task, and the slots in which tasks failed."""

    def __call__(self, change: Change, view: View) -> Iterable[str]:
        for event in change.events:
            match event:
                case Created(Task() as task):
                    self._created[task.id] = change.time_s
                case Deleted(Task() as task):
                    self._created.pop(task.id, None)
                case Updated(Task() as old, Task() as new) if new.slot:
                    if _is_taken_out(old, new, view):
                        yield from self._take_out(new, view, change.time_s)
                    elif (
                        new.is_wanted
                        and (new.status.state is TaskState.RUNNING or new.status.state.is_terminal)
                    ) or new.desired_state is TaskState.REMOVE:
                        self._out[new.service_id].pop(new.slot, None)
                        if new.is_wanted and new.status.state.is_terminal:
                            self._note_failed(new)
                case Deleted(Service() as service):
                    self._out.pop(service.id, None)
                    self._failed.pop(service.id, None)

    def _note_failed(self, task: Task) -> None:
        version, slots = self._failed.get(task.service_id, (None, set()))
        if version != task.spec_version:
            slots = set()
        self._failed[task.service_id] = task.spec_version, slots | {task.slot}

    def _take_out(self, task: Task, view: View, now: float) -> Iterable[str]:
        service = view.get(Service, task.service_id)
        version, failed = self._failed.get(service.id, (None, set()))
        if version == service.spec_version and task.slot in failed:
            return
        before, deadline_s = self._out[service.id], step_seconds_max(service.spec)
        out = {slot: since for slot, since in before.items() if now - since < deadline_s}
        out[task.slot] = min((self._created.get(one.id, now) for one in _successors(task, view)), default=now)
        self._out[service.id] = out
        parallelism = config_of(service).parallelism
        if parallelism and len(out) > parallelism:
            yield f"slots {sorted(out)} of {service.spec.name} are out of service, {parallelism} may be"


def _is_taken_out(old: Task, new: Task, view: View) -> bool:
    """Return whether only an update explains that the slot's only running task was just retired."""
    is_retired = old.is_wanted and new.desired_state is TaskState.SHUTDOWN
    if not is_retired or new.status.state is not TaskState.RUNNING or new.preemption is not None:
        return False
    service, node = view.lookup(Service, new.service_id), view.lookup(Node, new.node_id)
    if service is None or service.removed_at is not None or node is None:
        return False
    if node.status.state is not NodeState.READY or node.spec.availability is not Availability.ACTIVE:
        return False
    if not meets(constraints_of(service.spec), node):
        return False
    wanted = [one for one in view.find(Task, slot=f"{service.id}/{new.slot}") if one.is_wanted]
    runs_on = any(one.status.state is TaskState.RUNNING for one in wanted)
    return not runs_on and bool(_successors(new, view))


def _successors(task: Task, view: View) -> list[Task]:
    """Return the desired tasks of another spec in the slot."""
    slot = view.find(Task, slot=f"{task.service_id}/{task.slot}")
    return [one for one in slot if one.is_wanted and one.spec != task.spec]


def config_of(service: Service) -> UpdateConfig:
    """Return the settings of the service's update, or of its rollback during one."""
    status, spec = service.update_status, service.spec
    is_rollback = status is not None and status.state in ROLLBACKS
    return (spec.rollback_config if is_rollback else spec.update_config) or UpdateConfig(parallelism=1)
