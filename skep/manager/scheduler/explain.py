"""Why a task has no node yet: every node of the cluster, with all reasons against it.

The loop counts refusals by filter, which is cheap enough for every decision; this applies all filters to one task
on request.  It needs only a view, so every manager can serve the request.
"""

from skep.manager.scheduler.accounting import Account, Accounting, holds_resources, usage_in
from skep.manager.scheduler.filters import filters_for
from skep.manager.scheduler.requirements import Requirements
from skep.model.encoding import ApiObject, always
from skep.model.ids import NodeId
from skep.model.task import Task
from skep.store.interface import View


class NodeVerdict(ApiObject):
    """The filters' result for one node and one task.  Without ``refusals`` the node could run it."""

    node_id: NodeId
    hostname: str = always("")
    refusals: tuple[str, ...] = always(())


def verdict(requirements: Requirements, account: Account, copies: int) -> NodeVerdict:
    """All reasons against this node, not only the first."""
    refusals = tuple(
        filter.detail(requirements, account, copies)
        for filter in filters_for(requirements)
        if not filter.passes(requirements, account, copies)
    )
    node = account.node
    return NodeVerdict(node_id=node.id, hostname=node.description.hostname, refusals=refusals)


def reserve_for(accounting: Accounting, task: Task, view: View) -> None:
    """Reserve what ``task`` has."""
    if holds_resources(task):
        accounting.reserve(task.id, task.node_id, usage_in(view, task))
