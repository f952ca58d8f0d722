"""Tasks that no node of the cluster can take, whichever other tasks end.

Waiting alone does not help such a task.  An operator has to change the service, a node's labels or the cluster.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final

from skep.model.needs import Needs, capacity_of, kind_and_amount
from skep.model.node import Node
from skep.model.node_reports.node_refusals import NodeRefusal, node_refusals_in
from skep.model.options.constraints import is_satisfied
from skep.model.options.labels import PROGRESS_DEADLINE
from skep.model.service import ServiceSpec
from skep.model.task import Task, TaskState

UNPLACEABLE_S: Final = 10.0
"""Seconds for which an update waits for a node although no node can take its task.  A node that has just joined has
reported its size and labels by then."""

_FIXED: Final = frozenset(
    {
        NodeRefusal.CONSTRAINTS,
        NodeRefusal.PLATFORM,
        NodeRefusal.PLUGIN,
        NodeRefusal.RIGHTS,
        NodeRefusal.DEVICE,
    }
)
"""Refusals that only an operator can resolve."""
_CHECKED: Final = frozenset({NodeRefusal.NOT_READY, NodeRefusal.RESOURCES})
"""Refusals of nodes that may take the task later, unless they are too small or do not meet its constraints."""


def fails_early(task: Task, spec: ServiceSpec, needs: Needs, nodes: Callable[[], Iterable[Node]]) -> bool:
    """Return whether an update waits for ``task`` for ``UNPLACEABLE_S`` only.

    A deadline that the service sets itself always counts, so that a service can wait for nodes that will join.

    Args:
        spec: The service's present spec.
        needs: Needs of the spec that the task was made from.
        nodes: Returns at least the nodes that the task may run on.
    """
    return PROGRESS_DEADLINE not in spec.labels and is_unplaceable(task, needs, nodes)


def is_unplaceable(task: Task, needs: Needs, nodes: Callable[[], Iterable[Node]]) -> bool:
    """Return whether the scheduler refused ``task``, and no node can take it later without an operator's action.

    A down or drained node counts if it meets the constraints and is large enough, because it may come back.  A task of
    a global service can run on its own node only.

    Args:
        needs: Needs of the spec that the task was made from.
        nodes: Returns at least the nodes that the task may run on.
    """
    if task.status.state is not TaskState.PENDING:
        return False
    refusals = node_refusals_in(task.status.err)
    if not refusals or refusals - _FIXED - _CHECKED:
        return False
    if not refusals & _CHECKED:
        return True
    constraints = task.spec.placement.constraints if task.spec.placement is not None else ()
    return not any(
        is_satisfied(constraints, node) and is_large_enough(node, needs)
        for node in nodes()
        if task.node_id in ("", node.id)
    )


def is_large_enough(node: Node, needs: Needs) -> bool:
    """Return whether ``node`` has the resources of ``needs`` when it runs no tasks."""
    has = capacity_of(node)
    offered: Counter[str] = Counter()
    for one in has.generic_resources:
        kind, amount = kind_and_amount(one)
        offered[kind] += amount
    return (
        needs.nano_cpus <= has.nano_cpus
        and needs.memory_bytes <= has.memory_bytes
        and all(amount <= offered[kind] for kind, amount in map(kind_and_amount, needs.generic))
    )
