"""Decides the next steps for one service: scaling, restarts, update and starts.

The rules have an order of precedence, and each applies to the slots that earlier rules did not change.  A removed
service is only stopped.  Later rules skip a slot that is created or removed.  Restarts precede the update, because the
successor of an ended task gets the current spec anyway.  Starts come last, because all other rules decide which task of
a slot should start.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from skep.aio.time_slices import STEP, SlicedWork, run_at_once
from skep.manager.control_loops.loop_driver import Recheck
from skep.manager.orchestrator import global_services, jobs, replicated
from skep.manager.orchestrator.changes import (
    FillSlot,
    RemoveService,
    ReplaceTask,
    RetireTask,
    SettleRun,
    SetUpdateStatus,
    StartTask,
    Step,
)
from skep.manager.orchestrator.converged_slots import converged_slots
from skep.manager.orchestrator.decision_inputs import Situation
from skep.manager.orchestrator.due_slots import Settled, SlotKey, slot_key
from skep.manager.orchestrator.replacement.allowance import within_budget
from skep.manager.orchestrator.replacement.evacuation import evacuation_steps
from skep.manager.orchestrator.replacement.outdated_tasks import is_dirty
from skep.manager.orchestrator.replacement.restart import refill, restart_steps, start_steps
from skep.manager.orchestrator.replacement.slot_views import is_outdated
from skep.manager.orchestrator.slots import (
    Slot,
    group_by_node,
    group_by_slot,
    grouping_by_slot,
    history,
    wanted,
)
from skep.manager.orchestrator.update import update_steps
from skep.manager.services.job_runs import COMPLETED, of_present_run
from skep.model.options.labels import JOB_TTL
from skep.model.service import ENDED, PAUSED, UNDER_WAY
from skep.model.staging.updates import is_undecided
from skep.model.task import TaskState
from skep.model.values.ids import NodeId


def next_steps(situation: Situation) -> list[Step]:
    """Return the steps for the service now, and when to decide again.

    After the changes are applied, the next decision creates and retires no further task, unless something else happens
    meanwhile.  It may start a task that had to wait for a retirement.
    """
    return run_at_once(deciding(situation))


def deciding(situation: Situation) -> SlicedWork[list[Step]]:
    """Run ``next_steps`` with pauses, because a decision about 20,000 tasks takes a tenth of a second."""
    steps, _ = yield from deciding_all(situation)
    return steps


def deciding_all(situation: Situation) -> SlicedWork[tuple[list[Step], Settled | None]]:
    """Run ``deciding``, and also return whether the service is settled, so that ``deciding_some`` can follow."""
    service, tasks = situation.service, situation.tasks
    if service.removed_at is not None:
        return list(replicated.retire_all(tasks)), None
    match service.spec.mode.name:
        case "replicated":
            slots, converged = yield from _slots(situation)
            if converged and not slots and len(converged) == service.spec.replicas:
                return [], Settled(len(tasks), _numbers(converged))
            changes = yield from replicated.reconciling(service, slots, situation.seen, converged)
            steps, updatable = yield from _deciding_slots(changes, slots, {}, situation)
        case "global":
            steps, updatable = yield from _deciding_nodes(situation)
            slots, converged = {}, ()
        case "replicated-job" | "global-job":
            steps = jobs.next_steps(situation)
            running = _running_slot(situation)
            return steps, Settled(len(tasks), running=running) if _is_job_settled(steps, situation) else None
    allowed = within_budget(steps, situation)
    steps = allowed.steps
    if steps or allowed.is_held or (yield from _is_update_due(updatable, situation)):
        return steps, None
    filled = set(converged)
    for number, slot in slots.items():
        if history(slot):
            filled.add(number)
        if number % STEP == 0:
            yield
    return steps, Settled(len(tasks), _numbers(filled))


def deciding_some(
    situation: Situation, due: Collection[SlotKey], settled: Settled
) -> SlicedWork[list[Step] | None]:
    """Return the next steps for the ``due`` slots of a settled service, or None if the steps depend on other slots.

    ``situation`` has only the tasks and nodes of these slots.
    """
    match situation.service.spec.mode.name:
        case "replicated":
            slots: Mapping[Any, Slot] = group_by_slot(situation.tasks)
            if not all(_is_as_settled(slots.get(number, ()), number, situation, settled) for number in due):
                return None
            steps, updatable = yield from _deciding_slots([], slots, {}, situation)
        case "global":
            steps, updatable = yield from _deciding_nodes(situation)
        case "replicated-job" | "global-job":
            return _deciding_some_of_job(situation, due, settled)
    allowed = within_budget(steps, situation)
    return None if allowed.is_limited or (yield from _is_update_due(updatable, situation)) else allowed.steps


def _is_update_due(updatable: Iterable[Slot], situation: Situation) -> SlicedWork[bool]:
    """Return whether the update has work in one of the slots.  If so, the amount that it does at a time depends on all
    slots.

    A paused update starts with no further slot, and only finishes the slots it has started with.  Drains continue.
    """
    status = situation.service.update_status
    if status is not None and status.state in UNDER_WAY:
        return True
    is_paused = status is not None and status.state in PAUSED
    for number, slot in enumerate(updatable):
        if is_outdated(slot, situation) and (
            not is_paused
            or any(
                not is_dirty(task, situation) or situation.moves_start_first(task) for task in wanted(slot)
            )
        ):
            return True
        if number % STEP == 0:
            yield
    return False


def _is_as_settled(slot: Slot, number: SlotKey, situation: Situation, settled: Settled) -> bool:
    """Return whether the slot is still filled, or still empty, as when the service settled."""
    if number in settled.filled:
        return replicated.is_filled(slot, situation.service, situation.seen)
    return not history(slot)


def _numbers(filled: Collection[int]) -> Collection[int]:
    """Return the slot numbers as a range if possible, which saves memory.  Nearly always they are 1 to the number of
    replicas.
    """
    is_dense = bool(filled) and min(filled) == 1 and max(filled) == len(filled)
    return range(1, len(filled) + 1) if is_dense else frozenset(filled)


def _is_job_settled(steps: Sequence[Step], situation: Situation) -> bool:
    """Return whether a job has nothing to do before one of its tasks changes or its time to live ends."""
    return not _before_end(steps, situation) and not _has_earlier_run(situation)


def _deciding_some_of_job(
    situation: Situation, due: Collection[SlotKey], settled: Settled
) -> list[Step] | None:
    """Run ``deciding_some`` for a job.

    In a global job, the nodes are independent of each other, but whether the whole run has ended depends on all of
    them.  A replicated job has a limited number of tasks at a time, so if one ends or moves, all slots are decided.
    """
    if _has_earlier_run(situation):
        return None
    if situation.service.spec.mode.replicated_job is None:
        every = jobs.next_steps(situation)
        if _may_settle(every, situation, due, settled):
            return None
        own = [step for step in every if not isinstance(step, SettleRun)]
        if not own:
            return []
        # The end of a time to live depends on all tasks.
        return [*_before_end(own, situation)] or None
    slots = group_by_slot(of_present_run(situation.service, situation.tasks)).values()
    is_changed = any(
        restart_steps(slot, situation) or [*start_steps(slot, situation)]
        for slot in slots
        if not jobs.is_done(slot)
    )
    return None if is_changed else []


def _may_settle(
    steps: Sequence[Step], situation: Situation, due: Collection[SlotKey], settled: Settled
) -> bool:
    """Return whether the due slots and the others together may change the outcome of a global job's run."""
    job = situation.service.job_status
    if job is not None and job.present_outcome:
        is_changed = job.present_outcome != COMPLETED and not situation.tasks
        return is_changed or any(isinstance(step, SettleRun) for step in steps)
    if settled.running is None:
        return True
    return settled.running in due and not any(
        task.is_active and slot_key(task) == settled.running for task in situation.tasks
    )


def _running_slot(situation: Situation) -> SlotKey | None:
    iteration = jobs.iteration_of(situation.service)
    active = (task for task in situation.tasks if task.is_active and task.job_iteration == iteration)
    return next(map(slot_key, active), None)


def _has_earlier_run(situation: Situation) -> bool:
    """Return whether a task of an earlier iteration has not ended, because every task of the current iteration waits
    for it.
    """
    iteration = jobs.iteration_of(situation.service)
    return any(task.is_active and task.job_iteration != iteration for task in situation.tasks)


def _before_end(steps: Sequence[Step], situation: Situation) -> Sequence[Step]:
    """Return a job's ``steps`` without those for the end of its time to live, which depend on all tasks."""
    spec = situation.service.spec
    if JOB_TTL not in spec.labels or not all(isinstance(step, Recheck | RemoveService) for step in steps):
        return steps
    labels = {name: value for name, value in spec.labels.items() if name != JOB_TTL}
    service = replace(situation.service, spec=replace(spec, labels=labels))
    return jobs.next_steps(replace(situation, service=service))


def _deciding_nodes(situation: Situation) -> SlicedWork[tuple[list[Step], Sequence[Slot]]]:
    """Return the steps for a global service on the situation's nodes, and the slots that an update applies to."""
    service = situation.service
    every = group_by_node(situation.tasks)
    slots = _on_active_nodes(every, situation)
    paused = {node_id: slot for node_id, slot in every.items() if node_id not in slots}
    present = [task for task in situation.tasks if not situation.keeps_slot(task)]
    changes = global_services.reconcile(
        service, present, situation.nodes(), situation.seen, keeps_unfit=situation.keeps_unfit
    )
    return (yield from _deciding_slots(changes, slots, paused, situation))


def _deciding_slots(
    changes: Iterable[Step], slots: Mapping[Any, Slot], paused: Mapping[Any, Slot], situation: Situation
) -> SlicedWork[tuple[list[Step], Sequence[Slot]]]:
    """Return the steps for slots, including ``changes`` to their number, and the slots that an update applies to.

    Args:
        paused: More slots, on nodes that take no new tasks.
    """
    yield
    keeps_old = is_undecided(situation.service)
    steps = [_refilled(step, slots, situation) for step in changes]
    # The update then starts the new tasks, in addition.
    steps = [replace(step, is_old=keeps_old) if isinstance(step, FillSlot) else step for step in steps]
    changed = set(map(_slot_of, steps))
    kept = {key: slot for key, slot in slots.items() if key not in changed}
    yield
    for number, slot in enumerate(kept.values()):
        steps += restart_steps(slot, situation)
        steps += evacuation_steps(slot, situation)
        if number % STEP == 0:
            yield
    # This includes paused nodes whose task has just ended and is now retired, because its end may be a failure of the
    # update.
    updatable = _updatable({**kept, **paused}, situation)
    kept |= {key: slot for key, slot in paused.items() if key not in changed}
    changed.update(map(_slot_of, steps))
    updates = yield from update_steps(updatable, situation)
    if any(isinstance(step, FillSlot) and not step.is_old for step in steps):
        # The update is judged by these tasks as well, once they exist.
        updates = [
            step for step in updates if not (isinstance(step, SetUpdateStatus) and step.state in ENDED)
        ]
    # The update gives such a slot a successor, so its running task need not leave for good, which a budget may forbid.
    filled = {_slot_of(step) for step in updates if isinstance(step, FillSlot)} & set(kept)
    steps = [step for step in steps if not (isinstance(step, RetireTask) and _slot_of(step) in filled)]
    changed = set(map(_slot_of, steps))
    steps += [step for step in updates if _slot_of(step) is None or _slot_of(step) not in changed]
    changed.update(map(_slot_of, steps))
    yield
    for number, (key, slot) in enumerate(kept.items()):
        if key not in changed:
            steps += start_steps(slot, situation)
        if number % STEP == 0:
            yield
    return steps, updatable


def _refilled(step: Step, slots: Mapping[Any, Slot], situation: Situation) -> Step:
    if not isinstance(step, FillSlot):
        return step
    return refill(step, slots.get(step.slot or step.node_id, ()), situation)


def _slots(situation: Situation) -> SlicedWork[tuple[dict[int, Slot], Collection[int]]]:
    """Return the slots of a replicated service that need a decision, and the numbers of the other slots."""
    tasks = situation.tasks
    converged = yield from converged_slots(situation)
    if converged:
        others = yield from grouping_by_slot([task for task in tasks if task.slot not in converged])
        has_surplus = len(converged) + len(others) > situation.service.spec.replicas
        if not has_surplus and not any(is_outdated(slot, situation) for slot in others.values()):
            return others, converged
    return (yield from grouping_by_slot(tasks)), ()


def _updatable(slots: Mapping[Any, Slot], situation: Situation) -> list[Slot]:
    """Return the slots that an update applies to.

    For a global service these are on nodes that may run its tasks.  On a node that takes no new tasks, a new task that
    exists already replaces the old one, but the update starts with no other slot.
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
    """Return whether the node has a task of the current spec.  Its last such task counts as well if it ended by itself,
    because that may be a failure of the update.

    A task that was not assigned before the pause waits for the end of the pause.
    """
    version = situation.service.spec_version
    last = history(slot)[-1:]
    return any(
        task.status.state >= TaskState.ASSIGNED and not is_dirty(task, situation) for task in wanted(slot)
    ) or any(task.ended_by_itself and task.spec_version == version for task in last)


def _on_active_nodes(slots: Mapping[NodeId, Slot], situation: Situation) -> dict[NodeId, Slot]:
    """Return the slots on nodes that take new tasks.  A paused node gets no restarts and no new updates."""
    active = {}
    for node_id, slot in slots.items():
        node = situation.node(node_id)
        if node is not None and global_services.takes_new_tasks(node):
            active[node_id] = slot
    return active


def _slot_of(step: Step) -> int | NodeId | None:
    """Return the slot of a change (its number, or a global service's node), or None if it is not about one slot."""
    match step:
        case FillSlot(_, slot, node_id):
            return slot or node_id
        case RetireTask(task) | ReplaceTask(task) | StartTask(task):
            return task.slot or task.node_id
    return None
