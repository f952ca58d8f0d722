"""What must hold in every state of every run, written once and watched all the time.

``Observer`` follows the cluster's commits as one more replica and notes each violation with its time; ``settled``
compares a cluster at rest with what was asked for.
"""

from collections import Counter
from collections.abc import Iterable

from skep.model.ids import NodeId, ServiceId
from skep.model.node import Node
from skep.model.service import Resources, Service, UpdateConfig, UpdateOrder
from skep.model.task import Task, TaskState
from skep.sim.truth import Change, Truth
from skep.store.interface import Created, Updated, View


class Observer:
    """Checks every commit of a run."""

    def __init__(self, truth: Truth) -> None:
        self.violations: list[str] = []
        self.created: Counter[ServiceId] = Counter()
        """How many tasks each service has been given."""
        truth.watchers.append(self._check)

    def _check(self, change: Change, view: View) -> None:
        self._now = change.time_s
        for event in change.events:
            match event:
                case Created(Task() as task):
                    self.created[task.service_id] += 1
                    self._note(slot_violations(view, task))
                case Updated(Task() as old, Task() as new):
                    self._note(transition_violations(old, new))
                    self._note(slot_violations(view, new))
                    if new.node_id != old.node_id:
                        self._note(node_violations(view, new))

    def _note(self, violations: Iterable[str]) -> None:
        self.violations += [f"{self._now:.3f} s: {violation}" for violation in violations]


def transition_violations(old: Task, new: Task) -> Iterable[str]:
    """States only move forward; a task is placed once."""
    if new.status.state < old.status.state:
        yield f"task {new.id} went back from {old.status.state.value} to {new.status.state.value}"
    if new.desired_state < old.desired_state:
        yield f"task {new.id}: desired state went back to {new.desired_state.value}"
    if old.node_id and new.node_id != old.node_id:
        yield f"task {new.id} moved from {old.node_id} to {new.node_id}"
    if new.slot != old.slot or new.service_id != old.service_id:
        yield f"task {new.id} changed its slot"


def slot_violations(view: View, task: Task) -> Iterable[str]:
    """A slot has one wanted task; while an update starts the new one first, two."""
    slot = view.find(Task, slot=f"{task.service_id}/{task.slot or task.node_id}")
    wanted = [one for one in slot if one.desired_state <= TaskState.RUNNING]
    service = view.lookup(Service, task.service_id)
    if len(wanted) > (2 if service is not None and _may_start_first(service) else 1):
        yield f"slot {task.slot or task.node_id} of {task.service_id} is filled by {[one.id for one in wanted]}"


def node_violations(view: View, task: Task) -> Iterable[str]:
    """No node is over-committed, no node has more copies than allowed."""
    node = view.lookup(Node, task.node_id)
    if node is None:
        return
    here = [one for one in view.find(Task, node_id=node.id) if _holds(one)]
    has = node.description.resources
    held = [_reservations(one) for one in here]
    if sum(one.memory_bytes for one in held) > has.memory_bytes > 0:
        yield f"memory of {node.id} is over-committed"
    if sum(one.nano_cpus for one in held) > has.nano_cpus > 0:
        yield f"processors of {node.id} are over-committed"
    placement = task.spec.placement
    copies = [
        one for one in here if one.service_id == task.service_id and one.desired_state <= TaskState.RUNNING
    ]
    if placement is not None and placement.max_replicas and len(copies) > placement.max_replicas:
        yield f"{node.id} has {len(copies)} copies of {task.service_id}"


def rest_violations(view: View, containers: Iterable[tuple[NodeId, Task]]) -> Iterable[str]:
    """At rest: every container belongs to a task that is to run where it is, and the other way round."""
    running = {task.id: node_id for node_id, task in containers}
    for id, node_id in running.items():
        task = view.lookup(Task, id)
        if task is None or task.desired_state > TaskState.RUNNING or task.node_id != node_id:
            yield f"container of task {id} on {node_id} belongs to no task that is to run there"
    for task in view.find(Task):
        is_up = task.status.state is TaskState.RUNNING and task.desired_state is TaskState.RUNNING
        if is_up and task.id not in running:
            yield f"task {task.id} is said to run on {task.node_id} and does not"


def _may_start_first(service: Service) -> bool:
    specs = (service.spec, service.previous_spec or service.spec)
    configs = [config for spec in specs for config in (spec.update_config, spec.rollback_config)]
    return any((config or UpdateConfig()).order is UpdateOrder.START_FIRST for config in configs)


def _holds(task: Task) -> bool:
    return TaskState.ASSIGNED <= task.status.state <= TaskState.RUNNING


def _reservations(task: Task) -> Resources:
    resources = task.spec.resources
    return (resources.reservations if resources else None) or Resources()
