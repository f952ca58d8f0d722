"""The problems of a service: why each of its slots that is not in its desired state is not.  Pure."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from msgspec.structs import replace

from skep.manager.diagnosis.reasons import (
    CauseKind,
    SlotId,
    TaskProblem,
    hostname,
    is_stable,
    name_of,
    problem_of,
    problem_of_end,
    slot_of,
)
from skep.manager.orchestrator.jobs import is_done
from skep.manager.orchestrator.slots import is_present, is_unusable
from skep.model.node import Node
from skep.model.service import Service
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId


def problems_of(
    service: Service,
    tasks: Iterable[Task],
    nodes: Mapping[NodeId, Node],
    *,
    wanted: int,
    now_ns: int,
    every: Iterable[Task] = (),
) -> list[TaskProblem]:
    """Return the problem of each slot that is not in its desired state, the most important first.

    Args:
        tasks: All tasks of the service, ended ones included.  For a job, the tasks of its current run.
        wanted: Desired number of tasks that run at the same time.
        now_ns: Unix time.  A task in a crash loop is a problem until it has run long enough.
        every: All tasks of a job.  A task that waited for its restart when a user retried the run replaces a task that
            no longer counts.
    """
    before: dict[SlotId, list[Task]] = defaultdict(list)
    for task in every:
        before[slot_of(task)].append(task)
    slots: dict[SlotId, list[Task]] = defaultdict(list)
    for task in tasks:
        slots[slot_of(task)].append(task)
    found: list[TaskProblem] = []
    left: list[Task] = []
    active = 0
    for slot in slots.values():
        slot.sort(key=lambda task: (task.created_at, task.id))
        current = [task for task in slot if task.is_active]
        active += bool(current)
        if not current and (
            _ended_in_failure(service, slot) or _was_stopped_for_good(service, slot[-1], nodes)
        ):
            left.append(slot[-1])
        behind = [
            task
            for task in current
            if not (task.status.state is TaskState.RUNNING and is_stable(task, now_ns))
        ]
        found += [
            problem_of(
                task, before[slot_of(task)] or slot, nodes, name_of(task, service, nodes), service.spec
            )
            for task in behind
        ]
    if active < wanted or service.job_status is not None:
        found += [_problem_of_last(task, nodes, name_of(task, service, nodes)) for task in left]
    return sorted(found, key=lambda one: one.rank)


def _ended_in_failure(service: Service, slot: Sequence[Task]) -> bool:
    """Return whether the last task of ``slot`` failed and has no successor.

    ``slot`` has the oldest task first, and no active task.
    """
    last = slot[-1]
    if service.job_status is not None:
        return last.ended_in_failure and not is_done(slot)
    has_ended = last.ended_by_itself or last.ended_in_failure
    return is_present(last, service) and has_ended and not last.is_done


def _was_stopped_for_good(service: Service, task: Task, nodes: Mapping[NodeId, Node]) -> bool:
    """Return whether the last task of a slot was stopped for good.

    A lost node does not report the end of its tasks, or reports a failure once it is back.  A node that takes no tasks
    needs none of a global service.
    """
    if service.job_status is not None or not task.was_stopped_for_good:
        return False
    is_away = service.spec.mode.global_ is not None and is_unusable(nodes.get(task.node_id))
    return is_present(task, service) and not is_away


def _problem_of_last(task: Task, nodes: Mapping[NodeId, Node], name: str) -> TaskProblem:
    """Return the problem of a slot whose last ``task`` failed, or was stopped for good."""
    found = problem_of_end(task, nodes, name)
    if task.ended_by_itself or task.ended_in_failure:
        return found
    where, kind = hostname(nodes.get(task.node_id), task), CauseKind.NODE_LOST
    why = task.stop_cause.words(where) if task.stop_cause is not None else f"its task on {where} was stopped"
    return replace(found, kind=kind.value, weight=kind.weight, reason=why, failures=0, exit_code=None)
