"""The slots of a service as its update sees them: old and new tasks, and the attempt that decides about each slot."""

from collections.abc import Iterable, Iterator
from itertools import takewhile

import msgspec

from skep.manager.orchestrator.changes import RetireTask
from skep.manager.orchestrator.decision_inputs import Situation
from skep.manager.orchestrator.replacement.outdated_tasks import is_dirty, is_old_one
from skep.manager.orchestrator.replacement.restart import is_held
from skep.manager.orchestrator.slots import Slot, age, history, last_of, wanted
from skep.model.service import UpdateConfig
from skep.model.task import Task, TaskState
from skep.model.values.times import SECOND_NS

DEFAULT_MONITOR_S = 5.0
"""Monitor time of an update config without one.  Docker documents the same default."""


class SlotView(msgspec.Struct, frozen=True):
    """A slot from the update's point of view."""

    slot: Slot
    current: Slot
    """Wanted tasks made from the current spec."""
    outdated: Slot
    """Wanted tasks (or the last one, ended for good) made from an older, different spec."""
    serving: Slot
    """Outdated tasks that run, or that may run because their status is unreadable."""
    lead: Task | None
    """The attempt of the current version that decides about success or failure (``_leads``)."""
    first: Task | None
    """The lead, or an earlier attempt whose run a new leader has not observed.  Used by ``_Rollout._settled_at``
    only.
    """
    started: Task | None
    """The task that the update started the slot with: the lead, or a task of an earlier version with the same task spec
    (``_started``)."""
    held: Slot
    """Wanted tasks that wait for their start time (``is_held``)."""

    @property
    def serves(self) -> bool:
        """Whether a wanted task of the slot runs or may run."""
        return bool(self.serving) or any(map(serves, self.current))

    @property
    def stops(self) -> bool:
        """Whether a task of the slot is stopping, or would have to be stopped."""
        return any(task.is_assigned for task in self.slot)


def monitor_s(config: UpdateConfig) -> float:
    """Return how many seconds a lead is monitored."""
    return config.monitor / SECOND_NS if config.monitor else DEFAULT_MONITOR_S


def is_outdated(slot: Slot, situation: Situation) -> bool:
    """Return whether an update would replace a task in the slot."""
    past = history(slot)
    return bool(_outdated(wanted(past), past, situation))


def _outdated(kept: Slot, past: Slot, situation: Situation) -> Slot:
    """Return the outdated tasks among a slot's wanted tasks, or its last task in ``past`` if none is wanted."""
    if len(kept) == 1:
        return kept if is_dirty(kept[0], situation) else ()
    last = last_of(past) if not kept else None
    return tuple([task for task in (kept if last is None else (last,)) if is_dirty(task, situation)])


def view_of(slot: Slot, situation: Situation) -> SlotView:
    # This runs for every slot of a service in every decision, so the usual case of one task has no loop.
    past = history(slot)
    kept = wanted(past)
    outdated = _outdated(kept, past, situation)
    current = kept if not outdated else tuple([task for task in kept if task not in outdated])
    serving = tuple([task for task in outdated if _may_serve(task, situation)]) if outdated else ()
    first, lead = _leads(past, situation, is_given_up=bool(outdated) and not current)
    started = lead or _started(past, current, situation)
    held = tuple([task for task in kept if is_held(task, slot, situation)])
    return SlotView(slot, current, outdated, serving, lead, first, started, held)


def retired(tasks: Iterable[Task]) -> Iterator[RetireTask]:
    """Retire the tasks that are not retired yet."""
    return (RetireTask(task) for task in tasks if task.desired_state <= TaskState.RUNNING)


def serves(task: Task) -> bool:
    return task.desired_state <= TaskState.RUNNING and task.status.state is TaskState.RUNNING


def _may_serve(task: Task, situation: Situation) -> bool:
    """Return whether an old task runs or has an unreadable status, because an unreadable value must not stop a task
    (decision 21).
    """
    if serves(task):
        return True
    return task.is_wanted and task.is_assigned and situation.has_unknown_status(task)


def _leads(past: Slot, situation: Situation, *, is_given_up: bool) -> tuple[Task | None, Task | None]:
    """Return the first attempt at the current version, and the first attempt that counts.

    A task that was stopped before it ran is not an attempt, and its slot is still out of service.  A task whose run a
    new leader has not observed, or that ended before the update was resumed, counts neither as success nor as failure.
    The next attempt does.

    Args:
        is_given_up: Whether the slot has only old tasks.  Then a last attempt that stopped before it ran is not a lead,
            since nothing takes its place: the old task was taken for a current one while its spec was unreadable.
    """
    made = [task for task in past if task.spec_version == situation.service.spec_version]
    if not made:
        return None, None
    first: Task | None = None
    for task in made[:-1]:
        if not _says_something(task, situation):
            continue
        first = first or task
        is_unseen = task.ended_by_itself and situation.seen.is_unseen(
            task, monitor_s(situation.rollout_config)
        )
        if not (is_unseen or situation.is_tolerated(task)):
            return first, task
    if is_given_up and made[-1].status.state.is_terminal and not _says_something(made[-1], situation):
        return first, None
    return first or made[-1], made[-1]


def _says_something(task: Task, situation: Situation) -> bool:
    """Return whether the task may still run, has run or ended by itself, and was not stopped before it ran."""
    return task.is_wanted or task.ended_by_itself or situation.seen.running(task) is not None


def _started(past: Slot, current: Slot, situation: Situation) -> Task | None:
    """Return the first matching task of the last attempts, in a slot without a lead.

    Labels that change in the middle of an update make a new version with the same task spec.  A slot that the earlier
    version has started with still counts against ``parallelism``.  The attempts after the first do not count, as
    after a lead.  A matching task that was stopped belongs to an earlier update: its replacement may be missing from
    the history.  The old tasks of a staged update do not count either.
    """
    if not current:
        return None

    def is_attempt(task: Task) -> bool:
        return task in current or (task.ended_by_itself and not is_dirty(task, situation))

    row = takewhile(is_attempt, (task for task in reversed(past) if not is_old_one(task, situation)))
    return min(row, key=age, default=None)
