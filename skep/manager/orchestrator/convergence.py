"""The next steps for one service: scaling, restarts, update and starts, each on the slots that the earlier ones left
alone.

The order is the order of precedence.  A removed service is only stopped.  A slot that is created or removed is
skipped by the later rules.  A slot whose task ended is restarted before it is updated: the successor is made from the
present spec anyway.  Starts come last, because all other rules decide which task of a slot is to be started.
"""

from collections.abc import Collection, Mapping
from typing import Any

from skep.aio.time_slices import STEP, SlicedWork, run_at_once
from skep.manager.orchestrator import global_services, jobs, replicated
from skep.manager.orchestrator.changes import FillSlot, ReplaceTask, RetireTask, StartTask, Step
from skep.manager.orchestrator.converged_slots import converged_slots
from skep.manager.orchestrator.dirty import is_dirty
from skep.manager.orchestrator.restart import refill, restart_steps, start_steps
from skep.manager.orchestrator.situation import Situation
from skep.manager.orchestrator.slots import (
    Slot,
    group_by_node,
    grouping_by_slot,
    history,
    wanted,
)
from skep.manager.orchestrator.update import is_outdated, update_steps
from skep.model.ids import NodeId
from skep.model.task import TaskState


def next_steps(situation: Situation) -> list[Step]:
    """What to do for the service now, and when to decide again.

    Applying the changes and deciding again, with no other event, creates and retires no further task; a start that
    had to wait for a retirement may follow.
    """
    return run_at_once(deciding(situation))


def deciding(situation: Situation) -> SlicedWork[list[Step]]:
    """``next_steps`` with pauses: a decision about 20,000 tasks takes a tenth of a second."""
    service, tasks = situation.service, situation.tasks
    if service.removed_at is not None:
        return list(replicated.retire_all(tasks))
    slots: Mapping[Any, Slot]
    paused: Mapping[Any, Slot] = {}
    match service.spec.mode.name:
        case "replicated":
            slots, converged = yield from _slots(situation)
            if converged and not slots and len(converged) == service.spec.replicas:
                return []
            changes = yield from replicated.reconciling(service, slots, situation.seen, converged)
            steps: list[Step] = [*changes]
        case "global":
            every = group_by_node(tasks)
            slots = _on_active_nodes(every, situation)
            paused = {node_id: slot for node_id, slot in every.items() if node_id not in slots}
            present = [task for task in tasks if not situation.keeps_slot(task)]
            steps = [*global_services.reconcile(service, present, situation.nodes(), situation.seen)]
        case "replicated-job" | "global-job":
            return jobs.next_steps(situation)
    yield
    steps = [_refilled(step, slots, situation) for step in steps]
    changed = set(map(_slot_of, steps))
    kept = {key: slot for key, slot in slots.items() if key not in changed}
    yield
    for number, slot in enumerate(kept.values()):
        steps += restart_steps(slot, situation)
        if number % STEP == 0:
            yield
    # With paused nodes whose task has just ended, which is retired: it may fail the update.
    updatable = _updatable({**kept, **paused}, situation)
    kept |= {key: slot for key, slot in paused.items() if key not in changed}
    changed.update(map(_slot_of, steps))
    updates = yield from update_steps(updatable, situation)
    steps += [step for step in updates if _slot_of(step) is None or _slot_of(step) not in changed]
    changed.update(map(_slot_of, steps))
    yield
    for number, (key, slot) in enumerate(kept.items()):
        if key not in changed:
            steps += start_steps(slot, situation)
        if number % STEP == 0:
            yield
    return steps


def _refilled(step: Step, slots: Mapping[Any, Slot], situation: Situation) -> Step:
    if not isinstance(step, FillSlot):
        return step
    return refill(step, slots.get(step.slot or step.node_id, ()), situation)


def _slots(situation: Situation) -> SlicedWork[tuple[dict[int, Slot], Collection[int]]]:
    """The slots of a replicated service that need a decision, and the numbers of those that do not."""
    tasks = situation.tasks
    converged = yield from converged_slots(situation)
    if converged:
        others = yield from grouping_by_slot([task for task in tasks if task.slot not in converged])
        has_surplus = len(converged) + len(others) > situation.service.spec.replicas
        if not has_surplus and not any(is_outdated(slot, situation) for slot in others.values()):
            return others, converged
    return (yield from grouping_by_slot(tasks)), ()


def _updatable(slots: Mapping[Any, Slot], situation: Situation) -> list[Slot]:
    """The slots an update applies to.  For a global service, only those of nodes that may run its tasks.

    Of nodes that take no new tasks only those that have one: it takes the place of the old one, but none is begun.
    """
    service = situation.service
    if service.spec.mode.name != "global":
        return list(slots.values())
    eligible = {node.id: node for node in situation.nodes() if global_services.is_eligible(node, service)}
    return [
        slot
        for node_id, slot in slots.items()
        if (node := eligible.get(node_id)) is not None
        and (global_services.takes_new_tasks(node) or _is_begun(slot, situation))
    ]


def _is_begun(slot: Slot, situation: Situation) -> bool:
    """Whether the node has a task of the present spec, or had one that ended by itself, which may fail the update.

    One that was not assigned before the pause waits for its end.
    """
    version = situation.service.spec_version
    last = history(slot)[-1:]
    return any(
        task.status.state >= TaskState.ASSIGNED and not is_dirty(task, situation) for task in wanted(slot)
    ) or any(task.ended_by_itself and task.spec_version == version for task in last)


def _on_active_nodes(slots: Mapping[NodeId, Slot], situation: Situation) -> dict[NodeId, Slot]:
    """Slots on nodes that take new tasks.  On a paused node nothing is restarted, and no update begun."""
    active = {}
    for node_id, slot in slots.items():
        node = situation.node(node_id)
        if node is not None and global_services.takes_new_tasks(node):
            active[node_id] = slot
    return active


def _slot_of(step: Step) -> int | NodeId | None:
    """The slot that a change is about: its number, or the node of a global service; None: not about one slot."""
    match step:
        case FillSlot(_, slot, node_id):
            return slot or node_id
        case RetireTask(task) | ReplaceTask(task) | StartTask(task):
            return task.slot or task.node_id
    return None
