"""The slots of a service, each of which one task after another fills.

A replicated service has numbered slots, a global one has a slot per node.  A slot holds its retired and ended tasks
(its history) and at most one wanted task.  A start-first update has two wanted tasks for a short time.
"""

from collections.abc import Iterable, Iterator
from typing import TypeAlias

from skep.aio.time_slices import SlicedWork, run_at_once
from skep.model.node import Availability, Node, NodeState, is_lost
from skep.model.service import Service
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId, ServiceId
from skep.store.schema import UNREAD_STATUS

PAUSE = 1000
"""Number of tasks that are sorted between two pauses.  Each takes a few tenths of a microsecond."""

Slot: TypeAlias = tuple[Task, ...]
"""The tasks of one slot, oldest first."""


def group_by_slot(tasks: Iterable[Task]) -> dict[int, Slot]:
    """Group tasks by slot number, in ascending order."""
    return run_at_once(grouping_by_slot(tasks))


def grouping_by_slot(tasks: Iterable[Task]) -> SlicedWork[dict[int, Slot]]:
    """Run ``group_by_slot`` with pauses."""
    slots: dict[int, list[Task]] = {}
    for number, task in enumerate(tasks):
        slots.setdefault(task.slot, []).append(task)
        if number % PAUSE == 0:
            yield
    grouped: dict[int, Slot] = {}
    for slot in sorted(slots):
        grouped[slot] = _by_age(slots[slot])
        if slot % PAUSE == 0:
            yield
    return grouped


def group_by_node(tasks: Iterable[Task]) -> dict[NodeId, Slot]:
    """Group the tasks of a global service by node, in order of node id."""
    slots: dict[NodeId, list[Task]] = {}
    for task in tasks:
        slots.setdefault(task.node_id, []).append(task)
    return {node_id: _by_age(slots[node_id]) for node_id in sorted(slots)}


def _by_age(tasks: list[Task]) -> Slot:
    return tuple(sorted(tasks, key=age)) if len(tasks) > 1 else tuple(tasks)


def age(task: Task) -> tuple[str, str]:
    """Return a sort key that orders tasks by creation, oldest first.

    RFC 3339 timestamps compare as text without the trailing Z.
    """
    return task.created_at.rstrip("Z"), task.id


def wanted(slot: Slot) -> Slot:
    """Return the slot's tasks that are meant to run."""
    if len(slot) == 1:  # the usual case, and this runs in every decision
        return slot if slot[0].is_wanted else ()
    return tuple([task for task in slot if task.is_wanted])  # a list is faster than a generator


def history(slot: Slot) -> Slot:
    """Return the slot's tasks, except for the ones being removed."""
    if len(slot) == 1 and slot[0].is_wanted:
        return slot
    return tuple([task for task in slot if task.desired_state < TaskState.REMOVE])


def last_of(slot: Slot) -> Task | None:
    """Return the task that decides whether a slot without wanted tasks is filled again.

    It is the youngest task, without surplus tasks: an older task ran on after them.
    """
    past = history(slot)
    return next((task for task in reversed(past) if not task.was_surplus), past[-1] if past else None)


def is_present(task: Task, service: Service) -> bool:
    """Return whether the task has the service's current spec."""
    return task.spec_version == service.spec_version or task.spec == service.spec.task_template


class DoneSlots:
    """Finds the slots of one-shot services whose last task (``last_of``) is done (``Task.is_done``)."""

    def __init__(self) -> None:
        self._youngest: dict[tuple[ServiceId, int | NodeId], Task] = {}

    def add(self, task: Task) -> None:
        """Add a task of a service whose tasks end on success.  Surplus and tasks that are being removed are ignored."""
        if task.desired_state < TaskState.REMOVE and not task.was_surplus:
            key = task.service_id, task.slot or task.node_id
            before = self._youngest.get(key)
            if before is None or age(before) < age(task):
                self._youngest[key] = task

    def done(self) -> Iterator[tuple[ServiceId, int | NodeId]]:
        """Iterate over the slots that are done: service, and slot number (or node of a global service)."""
        return (key for key, task in self._youngest.items() if task.is_done)


def has_reported_end(task: Task) -> bool:
    """Return whether the node reported that the task ended.

    This is False for an orphaned task, whose node was removed, because nobody knows whether such a task has ended.
    """
    return task.status.state.is_terminal and task.status.state is not TaskState.ORPHANED


def has_unread_end(slot: Slot) -> bool:
    """Return whether a past task of the slot has an unreadable status, so that it may have ended for good."""
    return any(task.status == UNREAD_STATUS for task in slot if task.desired_state < TaskState.REMOVE)


def first_state(slot: Slot) -> TaskState:
    """Return the desired state of a new task.  It is READY, which makes the task wait, while a task of the slot is
    stopping.
    """
    return TaskState.READY if any(task.is_stopping for task in slot) else TaskState.RUNNING


def is_unusable(node: Node | None) -> bool:
    """Return whether tasks must leave this node because it is removed, down or drained.

    Source: swarmkit, manager/orchestrator/task.go (InvalidNode).
    """
    return node is None or is_lost(node) or node.spec.availability is Availability.DRAIN


def is_unknown(node: Node) -> bool:
    """Return whether the node's description is unknown: it has not registered yet, or the store's value is unreadable.

    Without a description, constraints and resources cannot be checked, so the node keeps its tasks but receives no new
    ones.
    """
    return node.status.state is NodeState.UNKNOWN
