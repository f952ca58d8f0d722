"""The progress of an update: its step, what it waits for, and the deadline.

Everything is read from the objects.  The deadline is that of the decision (``orchestrator.update``) on the clock that
wrote the task; a new leader may extend it once by its full length.
"""

from collections.abc import Callable, Iterable, Mapping

from skep.manager.orchestrator.update import step_seconds_max
from skep.model.encoding import ApiObject, always
from skep.model.ids import NodeId
from skep.model.node import Node
from skep.model.service import UNDER_WAY, Service
from skep.model.task import Task, TaskState
from skep.model.times import SECOND_NS, Timestamp, timestamp, unix_ns


class UpdateExplanation(ApiObject):
    """Of an update, or a rollback, that is under way."""

    deadline: Timestamp | None = None
    """When the update fails without progress; None: it waits for time to pass."""
    step: str = always("")
    waiting_for: str = always("")


def explain_update(
    service: Service,
    tasks: Iterable[Task],
    *,
    is_new: Callable[[Task], bool],
    nodes: Mapping[NodeId, Node],
    summary: Callable[[Task, Node | None], str],
) -> UpdateExplanation | None:
    """The progress of the update of ``service``; None: there is none.

    Args:
        is_new: whether a task matches the present spec.
        summary: one sentence about a task.
    """
    if service.update_status is None or service.update_status.state not in UNDER_WAY:
        return None
    wanted = [task for task in tasks if task.is_wanted]
    new = [task for task in wanted if is_new(task)]
    slots = set(map(_slot, wanted))
    done = {_slot(task) for task in new if task.status.state is TaskState.RUNNING}
    step = f"{len(done)} of {len(slots)} tasks are new"
    leads = [task for task in new if task.status.state is not TaskState.RUNNING]
    if not leads:
        is_last = len(done) == len(slots)
        words = "the monitor time of the last step" if is_last else "the delay before the next step"
        return UpdateExplanation(step=step, waiting_for=words)
    first = min(leads, key=lambda task: (task.created_at, task.id))
    return UpdateExplanation(
        step=step,
        waiting_for=f"task {first.id}: {summary(first, nodes.get(first.node_id))}",
        deadline=timestamp(unix_ns(first.created_at) + round(step_seconds_max(service.spec) * SECOND_NS)),
    )


def _slot(task: Task) -> tuple[int, NodeId]:
    """A global service's tasks have their node as slot."""
    return task.slot, NodeId("") if task.slot else task.node_id
