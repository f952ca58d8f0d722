"""Moves the running tasks of a drained node: each stops only when its replacement runs on another node.

The tasks of a service with ``skep.min-available`` also move in this way if their node no longer meets their constraints
or has become too small for them.  So do tasks that move for an even spread, to the node that was chosen for them.

The replacement is a second wanted task in the slot, as in a start-first update, whatever the service's update order.
If no node takes it, or it fails, the old task stays.  A task of an older spec is replaced by the update, in its turn,
also while the update is paused (``update``).  If the drain is undone, the update's rules keep the older task and remove
the surplus one.  ``Situation.moves_start_first`` decides which tasks move in this way.

A new task of a staged update moves at once, because the slot's old task serves meanwhile.

Difference from swarmkit: swarmkit stops the old task first.  The node's label ``skep.drain-now`` restores that.
"""

from collections.abc import Iterator

from skep.manager.orchestrator.changes import FillSlot, ReplaceTask, RetireTask, Step
from skep.manager.orchestrator.decision_inputs import Situation
from skep.manager.orchestrator.replacement.outdated_tasks import is_dirty
from skep.manager.orchestrator.replacement.restart import cause_of, failures_in_a_row, should_restart
from skep.manager.orchestrator.slots import Slot, history, wanted
from skep.model.node import Availability
from skep.model.staging.updates import is_undecided
from skep.model.task import Task
from skep.model.values.ids import NodeId


def evacuation_steps(slot: Slot, situation: Situation) -> Iterator[Step]:
    """Start a replacement for the slot's running task that must leave its node, or retire that task once replaced.

    ``restart_steps`` replaces the other tasks of the slot, such as a replacement that failed.
    """
    current = wanted(slot)
    leaving = [task for task in current if situation.moves_start_first(task)]
    if not leaving:
        return
    others = [task for task in current if task not in leaving]
    serving = [
        task for task in others if situation.is_known_to_run(task) and not situation.is_misplaced(task)
    ]
    for old in leaving:
        heirs = (one for one in serving if is_dirty(old, situation) or not is_dirty(one, situation))
        if (heir := next(heirs, None)) is not None:
            yield RetireTask(old, successor=heir.id, cause=cause_of(old, situation))
    *surplus, last = sorted(leaving, key=lambda old: not is_dirty(old, situation))
    for old in surplus:
        yield RetireTask(old, successor=last.id, cause=cause_of(old, situation))
    if is_dirty(last, situation):
        return  # the update replaces it, with as many slots at a time as it may
    if any(
        one.status.state.is_terminal or situation.is_misplaced(one) or not is_dirty(one, situation)
        for one in others
    ):
        return  # it is the replacement, or gets one
    youngest = history(slot)[-1]
    # An attempt at another spec is not the replacement.
    is_replacement = youngest.ended_by_itself and not is_dirty(youngest, situation)
    if is_replacement and not should_restart(youngest, slot, situation.seen):
        return  # the replacement failed for good
    nodes = ((old.id, situation.node_of(old)) for old in leaving)
    fill = FillSlot(
        situation.service,
        last.slot,
        node_id=_target(last, situation),
        failures=failures_in_a_row(last, situation),
        alongside=tuple(
            id for id, node in nodes if node is not None and node.spec.availability is not Availability.DRAIN
        ),
    )
    if serving and is_undecided(situation.service):
        # The old task serves, so the new one need not run until its replacement does.
        yield ReplaceTask(last, fill, cause_of(last, situation))
        return
    yield ReplaceTask(others.pop(), fill) if others else fill
    yield from map(RetireTask, others)


def _target(task: Task, situation: Situation) -> NodeId:
    """Return the node that was chosen for the successor of a task, or an empty id if the scheduler chooses one."""
    node = situation.node_of(task)
    is_drained = node is not None and node.spec.availability is Availability.DRAIN
    if task.relocation is None or is_drained or not situation.is_relocating(task):
        return NodeId("")
    return task.relocation.target
