"""A rule on restart policies: an ended task is replaced exactly if its policy allows that."""

from collections.abc import Iterable
from itertools import pairwise
from math import inf

import msgspec

from sim.world.committed import Change
from skep.model.service import RestartCondition, RestartPolicy, Service
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId
from skep.model.values.meta import Version
from skep.model.values.times import SECOND_NS
from skep.store.interface import Created, Deleted, Updated, View

SLACK_S = 5.0
"""A leader may see changes this much later than they were committed, which shifts the restart window."""


class _Begun(msgspec.Struct):
    """One task of a slot, kept after its deletion."""

    task: Task
    created_at: float
    term: int
    ended_at: float = inf
    retired_at: float = inf


class RestartPolicies:
    """Restarts of the tasks of one slot and spec version follow the restart policy.

    Each commit is checked.  A task that may not be restarted has no successor, and at most ``max_attempts`` tasks
    follow tasks that ended by themselves (within the window, and within one leader's term).  Moves are not counted.
    ``is_given_up`` checks at rest that no restart is missing.  Jobs are not checked.
    """

    def __init__(self) -> None:
        self._slots: dict[str, list[_Begun]] = {}
        self._retired: dict[str, Version | None] = {}
        """Spec version of the task that was retired last in a slot, until the next one is created there."""

    def __call__(self, change: Change, view: View) -> Iterable[str]:
        for event in change.events:
            match event:
                case Created(Task() as task) if task.job_iteration is None:
                    slot = self._slots.setdefault(_slot_of(task), [])
                    before = [one for one in slot if one.task.spec_version == task.spec_version]
                    # A restored snapshot has tasks that have ended.
                    ended_at = change.time_s if task.status.state.is_terminal else inf
                    retired_at = -inf if task.was_surplus else change.time_s
                    retired_at = inf if task.is_wanted else retired_at
                    slot.append(_Begun(task, change.time_s, change.term, ended_at, retired_at))
                    service = view.lookup(Service, task.service_id)
                    is_same = service is not None and service.spec_version == task.spec_version
                    retired = self._retired.pop(_slot_of(task), task.spec_version)
                    is_first = retired != task.spec_version or _replaces_another_version(task, change)
                    if before and is_same and not is_first:
                        yield from self._surplus(before, task, change)
                case Updated(Task() as old, Task() as task) if task.job_iteration is None:
                    if old.is_wanted and not task.is_wanted:
                        self._retired[_slot_of(task)] = task.spec_version
                    for one in self._slots.get(_slot_of(task), ()):
                        if one.task.id == task.id:
                            one.task = task
                            if old.is_wanted and not task.is_wanted:
                                one.retired_at = change.time_s
                            if task.status.state.is_terminal and not old.status.state.is_terminal:
                                one.ended_at = change.time_s
                case Deleted(Service() as service):
                    for key in [key for key in self._slots if key.startswith(f"{service.id}/")]:
                        del self._slots[key]
                        self._retired.pop(key, None)

    def is_given_up(self, service: Service, key: int | NodeId) -> bool:
        """Return whether the last task of a slot ended and its policy allows no further restart."""
        slot = self._slots.get(f"{service.id}/{key}", [])
        if not slot:
            return False
        last = _last(slot)
        if not last.task.status.state.is_terminal:
            return False
        policy = last.task.spec.restart_policy or RestartPolicy()
        if _is_final(policy, last.task):
            return True
        if not policy.max_attempts:
            return False
        window_s = (policy.window or 0) / SECOND_NS or inf
        if not last.task.ended_by_itself:
            return False
        same = _attempts(
            [one for one in slot[: slot.index(last) + 1] if one.task.spec_version == last.task.spec_version]
        )
        return sum(one.created_at > last.ended_at - window_s - SLACK_S for one in same) >= policy.max_attempts

    def given_up(self, service: Service) -> int:
        """Return the number of slots that are given up."""
        keys = [key.removeprefix(f"{service.id}/") for key in self._slots if key.startswith(f"{service.id}/")]
        return sum(self.is_given_up(service, NodeId(key)) for key in keys)

    def _surplus(self, before: list[_Begun], task: Task, change: Change) -> Iterable[str]:
        last = _last(before)
        before = before[: before.index(last) + 1]
        policy = last.task.spec.restart_policy or RestartPolicy()
        if last.task.ended_by_itself and _is_final(policy, last.task):
            yield (
                f"task {task.id} follows {last.task.id}, which ended as {last.task.status.state.value}, "
                f"and is to be restarted {policy.condition and policy.condition.value}"
            )
        if not policy.max_attempts or not last.task.ended_by_itself:
            return
        window_s = (policy.window or 0) / SECOND_NS or inf
        if window_s < inf:
            since = last.ended_at - window_s + SLACK_S
            counted = [one for one in _attempts(before) if one.created_at > since and one.term == change.term]
        else:
            counted = _attempts(before)
        if len(counted) >= policy.max_attempts:
            yield f"task {task.id} is restart {len(counted) + 1} of its slot, of {policy.max_attempts}"


def _last(slot: list[_Begun]) -> _Begun:
    """Return the youngest task, or an older task if that ran on after it.

    An older task runs on when a drain is undone or an update rolled back.  A task that is done replaces it.
    """
    longest = -inf
    last = slot[-1]
    for one in slot:
        if one.task.is_done or one.retired_at >= longest:
            last = one
        longest = max(longest, one.retired_at)
    return last


def _attempts(made: list[_Begun]) -> list[_Begun]:
    """Return the tasks of one version whose predecessor ended by itself."""
    return [one for before, one in pairwise(made) if before.task.ended_by_itself]


def _replaces_another_version(task: Task, change: Change) -> bool:
    """Return whether the task replaces, in one commit, a task of another version that lost its node.

    The slot has given up earlier attempts at the task's own version.  SwarmKit does not count such a task as a restart
    either.
    """
    return any(
        old.is_wanted and not new.is_wanted and new.spec_version != task.spec_version
        for event in change.events
        if isinstance(event, Updated)
        and isinstance(old := event.old, Task)
        and isinstance(new := event.new, Task)
        and _slot_of(new) == _slot_of(task)
    )


def _is_final(policy: RestartPolicy, task: Task) -> bool:
    """Return whether the policy forbids a restart of this ended task."""
    match policy.condition:
        case RestartCondition.NONE:
            return True
        case RestartCondition.ON_FAILURE:
            return task.status.state is TaskState.COMPLETE
    return False


def _slot_of(task: Task) -> str:
    return f"{task.service_id}/{task.slot or task.node_id}"
