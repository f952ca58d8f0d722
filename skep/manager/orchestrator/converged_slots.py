"""Finds the converged slots of a service quickly, because they need no decision.

At nearly every decision, nearly every slot of a large service is converged.  That means that exactly one of its tasks
is desired to run, runs on a usable node, and matches the service's spec.  The slot's other tasks are history, which
does not matter meanwhile.  Only two rules concern such a slot: the removal of surplus slots, and an update, which
compares all slots.
"""

from skep.aio.time_slices import STEP, SlicedWork
from skep.manager.orchestrator.decision_inputs import Situation
from skep.manager.orchestrator.replacement.enforcement import violates_constraints
from skep.manager.orchestrator.replacement.outdated_tasks import is_same
from skep.model.service import UNDER_WAY
from skep.model.task import Task, TaskState
from skep.model.values.meta import Version

_RUNNING = TaskState.RUNNING


def converged_slots(situation: Situation) -> SlicedWork[set[int]]:
    """Return the numbers of a replicated service's converged slots.  Empty while an update is in progress.

    A decision without these slots has the same result as a decision with them, unless there are more slots than
    replicas or another slot is outdated.
    """
    status = situation.service.update_status
    if status is not None and status.state in UNDER_WAY:
        return set()
    converged: set[int] = set()
    unconverged: set[int] = set()
    same: dict[Version, bool] = {}
    sound = situation.sound_nodes
    for number, task in enumerate(situation.tasks):
        if number % STEP == 0:
            yield
        if task.node_id not in sound:
            situation.is_sound(task.node_id)  # This checks all tasks of the node once and caches the result.
            yield
        slot = task.slot
        if (
            task.desired_state is _RUNNING
            and task.status.state is _RUNNING
            and slot not in converged
            and task.preemption is None
            and task.relocation is None
            and sound.get(task.node_id)
            and not any(situation.is_drained(one.id) for one in task.volumes)
            and _is_in_place(task, situation)
            and _is_same(task, situation, same)
        ):
            converged.add(slot)
        elif task.is_wanted:
            unconverged.add(slot)
    return converged - unconverged


def _is_in_place(task: Task, situation: Situation) -> bool:
    placement = task.spec.placement
    if placement is None or not placement.constraints:
        return True
    node = situation.node_of(task)
    return node is not None and not violates_constraints(task, node)


def _is_same(task: Task, situation: Situation, same: dict[Version, bool]) -> bool:
    version = task.spec_version
    if version == situation.service.spec_version:
        return True
    if version is None:
        return is_same(task, situation)
    if version not in same:
        same[version] = is_same(task, situation)
    return same[version]
