"""Limit on a service's tasks that may be taken away now, by drains, updates, preemption and changed nodes together.

The budget is not stored.  It follows from the desired and observed states of the service's tasks, so a task that one
action has taken away counts against every other action.  The orchestrator is the only writer of desired states, and
decides about all tasks of a service at once.

Actions that a user asks for (scaling down, `drain --now`) and failures do not wait for the budget, but count.
"""

from collections.abc import Callable, Iterable

import msgspec
from msgspec.structs import replace

from skep.model.node import Node, NodeState
from skep.model.options.labels import MIN_AVAILABLE, min_available
from skep.model.options.overlap import why_stop_first
from skep.model.service import Service, UpdateConfig, UpdateFailureAction, UpdateOrder, UpdateState
from skep.model.staging.updates import stages_of
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId

ROLLBACKS = (UpdateState.ROLLBACK_STARTED, UpdateState.ROLLBACK_PAUSED)
_DEFAULTS = UpdateConfig(parallelism=1)


class DisruptionBudget(msgspec.Struct, frozen=True):
    """The disruption budget of a service at one moment."""

    available: int
    """Number of slots with an available task."""
    minimum: int
    """Number of slots that must stay available."""
    source: str
    """Origin of ``minimum``, in words."""

    @property
    def spare(self) -> int:
        """Number of available tasks that may be taken away now."""
        return max(self.available - self.minimum, 0)

    @property
    def reason(self) -> str:
        """Reason why no task may be taken away now, or nothing."""
        if self.spare:
            return ""
        noun = "task is" if self.available == 1 else "tasks are"
        return f"{self.available} {noun} available, and {self.minimum} must stay available ({self.source})"


def is_available(task: Task, node: Node | None) -> bool:
    """Return whether ``task`` serves: it is desired to run, and its ``node`` is up and reports that it runs."""
    return (
        task.desired_state is TaskState.RUNNING
        and task.status.state is TaskState.RUNNING
        and not task.is_failing
        and task.preemption is None
        and node is not None
        and node.status.state is not NodeState.DOWN
    )


def required(service: Service) -> int | None:
    """Return how many tasks the service's label keeps available, or None without such a label."""
    if service.spec.mode.name != "replicated":
        return None
    return min_available(service.spec.labels, service.spec.replicas)


def keeps_all(service: Service) -> bool:
    """Return whether the label keeps all tasks, so that updates start new tasks before they stop old ones.

    Stop-first would have no task that it may stop.  Tasks that write data stop first all the same (``within_budget``).
    """
    minimum = required(service) or 0
    return minimum > 0 and minimum >= service.spec.replicas and not why_stop_first(service.spec)


def rollout_config(service: Service) -> UpdateConfig:
    """Return the settings of the current or next update, or of the rollback during one.

    Updates of a service with steps start first, also the ones that have no steps.
    """
    status, spec = service.update_status, service.spec
    is_rollback = status is not None and status.state in ROLLBACKS
    config = (spec.rollback_config if is_rollback else spec.update_config) or _DEFAULTS
    if not is_rollback and stages_of(spec.labels):
        return replace(config, order=UpdateOrder.START_FIRST, failure_action=UpdateFailureAction.ROLLBACK)
    return replace(config, order=UpdateOrder.START_FIRST) if keeps_all(service) else config


def starts_first(service: Service) -> bool:
    """Return whether the current or next update, or the rollback during one, starts new tasks before it stops old
    ones.
    """
    return rollout_config(service).order is UpdateOrder.START_FIRST


def budget_of(
    service: Service, tasks: Iterable[Task], node: Callable[[NodeId], Node | None]
) -> DisruptionBudget:
    """Return the disruption budget of a replicated service.

    Without the label, as many tasks may be away as an update stops at a time.

    Args:
        tasks: All tasks of the service.
        node: Returns a node, or None if it was removed.
    """
    available = len({task.slot for task in tasks if is_available(task, node(task.node_id))})
    replicas, minimum = service.spec.replicas, required(service)
    if minimum is not None:
        return DisruptionBudget(available, minimum, MIN_AVAILABLE)
    parallelism = (service.spec.update_config or _DEFAULTS).parallelism
    return DisruptionBudget(
        available, max(replicas - parallelism, 0) if parallelism else 0, "update parallelism"
    )
