"""Why a task has no node yet: every node of the cluster, and all that speaks against it, in detail.

The loop counts refusals by filter, which is cheap enough for every decision; this asks all filters about one task when
a user wants to know.  It needs nothing but a view, so every manager can answer.
"""

from skep.manager.scheduler.accounting import Account, Accounting, holds_resources
from skep.manager.scheduler.filters import filters_for
from skep.manager.scheduler.requirements import Requirements, host_ports
from skep.model.encoding import ApiObject, always
from skep.model.ids import NodeId
from skep.model.service import ServiceSpec
from skep.model.task import Task


class NodeVerdict(ApiObject):
    """What one node says to a task.  Without ``refusals`` it could take it."""

    node_id: NodeId
    hostname: str = always("")
    refusals: tuple[str, ...] = always(())


def verdict(wish: Requirements, account: Account, copies: int) -> NodeVerdict:
    """Everything that speaks against this node, not only the first thing."""
    refusals = tuple(
        filter.detail(wish, account, copies)
        for filter in filters_for(wish)
        if not filter.passes(wish, account, copies)
    )
    node = account.node
    return NodeVerdict(node_id=node.id, hostname=node.description.hostname, refusals=refusals)


def book(accounting: Accounting, task: Task, spec: ServiceSpec | None) -> None:
    """Count what ``task``, which was made from ``spec``, holds."""
    if holds_resources(task):
        accounting.add(task, host_ports(spec))
