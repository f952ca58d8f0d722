"""Keeps as many filled slots as a replicated service has replicas."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from itertools import count, islice

from skep.aio.time_slices import STEP, SlicedWork, run_at_once
from skep.errors import InvalidArgument
from skep.manager.orchestrator.changes import Change, FillSlot, RetireTask
from skep.manager.orchestrator.observed_times import ObservedTimes
from skep.manager.orchestrator.replacement.restart import should_restart
from skep.manager.orchestrator.slots import (
    Slot,
    first_state,
    group_by_slot,
    has_unread_end,
    history,
    is_present,
    last_of,
    wanted,
)
from skep.model.service import REPLICAS_MAX, Service, UpdateState
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId


def reconcile(service: Service, tasks: Iterable[Task], seen: ObservedTimes | None = None) -> list[Change]:
    """Return the changes that bring ``service`` to its desired number of slots.

    Fills free slots from the lowest number up.  Removes surplus slots from the nodes that run most tasks of the
    service, so the remaining ones stay evenly spread.  A slot stays filled if its last task ended and the restart
    policy allows no successor.  Idempotent: after the changes are applied, the next call returns ``[]``.

    Raises:
        InvalidArgument: The spec has more replicas than allowed.  The API rejects such a spec, so something else
            wrote it.

    Source: swarmkit, manager/orchestrator/replicated/services.go.
    """
    return run_at_once(reconciling(service, group_by_slot(tasks), seen or ObservedTimes(0.0)))


def reconciling(
    service: Service, slots: Mapping[int, Slot], seen: ObservedTimes, converged: Collection[int] = ()
) -> SlicedWork[list[Change]]:
    """Run ``reconcile`` on tasks grouped by slot, with pauses.

    Args:
        converged: Numbers of further slots, all of them filled.  Together with ``slots`` they are at most the number of
            replicas.
    """
    check_number(service.spec.replicas)
    filled: dict[int, Slot] = {}
    for number, slot in slots.items():
        if is_filled(slot, service, seen):
            filled[number] = slot
        if number % STEP == 0:
            yield
    missing = service.spec.replicas - len(filled) - len(converged)
    kept = set(filled)
    changes: list[Change] = []
    if missing >= 0:
        free = (number for number in count(1) if number not in filled and number not in converged)
        added = list(islice(free, missing))
        kept.update(added)
        changes += [FillSlot(service, n, desired=first_state(slots.get(n, ()))) for n in added]
    else:
        kept -= set(in_eviction_order(filled)[missing:])
    yield
    # A removed slot's history is removed too.
    changes += [
        RetireTask(task, TaskState.REMOVE)
        for number, slot in slots.items()
        if number not in kept
        for task in history(slot)
    ]
    return changes


def check_number(tasks: int) -> None:
    """Raise InvalidArgument if a service has more tasks than Skep can decide about."""
    if tasks > REPLICAS_MAX:
        raise InvalidArgument(f"a service can have at most {REPLICAS_MAX} tasks, not {tasks}")


def retire_all(tasks: Iterable[Task]) -> list[Change]:
    """Return the changes that end every task of a removed service."""
    return [RetireTask(task, TaskState.REMOVE) for task in tasks if task.desired_state < TaskState.REMOVE]


def in_eviction_order(slots: Mapping[int, Slot]) -> list[int]:
    """Return the slot numbers in order of importance.  The last ones are removed first.

    Slots that have no node, or are in the middle of an update, are removed first.  Each other slot counts as the n-th
    copy of the service on its node.  Higher copies are removed before lower ones, so that no node keeps more than its
    share.  Among equals, slots that do not run are removed before running ones, and then high numbers before low ones,
    because the first replica of a stateful service is often its primary.

    Source: swarmkit, manager/orchestrator/replicated/slot.go.
    """
    copies: Counter[NodeId] = Counter()

    def rank(number: int) -> tuple[bool, int]:
        slot = wanted(slots[number]) or history(slots[number])[-1:]
        node_id = slot[0].node_id
        if len(slot) > 1 or not node_id:
            return True, 0
        copies[node_id] += 1
        return False, copies[node_id]

    by_state = sorted(slots, key=lambda number: (not _is_running(slots[number]), number))
    ranks = {number: rank(number) for number in by_state}
    return sorted(by_state, key=ranks.__getitem__)


def is_filled(slot: Slot, service: Service, seen: ObservedTimes) -> bool:
    """Return whether the slot (or node of a global service) has a desired task, or a last task that ended for good.

    A rollback refills slots that ended for good, so that it always reaches the state before the update.  A one-shot
    task that has done its work by the spec of that time does not run again, as it would by swarmkit.
    """
    if wanted(slot) or has_unread_end(slot):
        return True
    last = last_of(slot)
    if last is None:
        return False
    status = service.update_status
    if status is not None and status.state is UpdateState.ROLLBACK_STARTED:
        return last.is_done and is_present(last, service)
    return not should_restart(last, slot, seen)


def _is_running(slot: Slot) -> bool:
    return any(task.status.state is TaskState.RUNNING for task in slot)
