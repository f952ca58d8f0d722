"""Which nodes that left or were lost remove themselves from the cluster: the decision of ``node_loop``.

Docker never removes a node by itself, so those of machines that come and go pile up.  A cluster may set a time after
which a worker that is down is removed.  Exceptions:

* managers, and workers that are becoming managers or were ones a moment ago, are never removed: a quorum counts them;
* nothing is removed unless more than half of all nodes are ready, and while replacement is frozen: so many nodes are
  not lost for good, their power or network is;
* nor is a node whose removal would lose something: volumes, data, or tasks that stay there (``kept_nodes``).  Only a
  user removes it;
* this leader has seen the node down for as long, or at least for an hour, since most nodes are ready: after a power
  loss the nodes that start last have that time to come back, whatever the clocks say.
"""

from collections.abc import Callable, Iterable, Sequence

from skep.model.ids import NodeId
from skep.model.node import Node, NodeRole, NodeState
from skep.model.times import SECOND_NS, unix_ns

OBSERVED_S_MAX = 3600.0
"""A leader need not see longer than this that a node is down; before that, the node's own record counts."""
AT_ONCE = 50
"""Nodes that are removed together."""


def due_at(node: Node, observed_s: float, now_ns: int, after_s: float) -> float:
    """In how many seconds a node that is down has been so for long enough; 0 or less: now.

    ``observed_s``: for how long this leader has seen it down, and no disruption (``is_disrupted``).
    """
    recorded_s = (now_ns - unix_ns(node.silent_since)) / SECOND_NS if node.silent_since else 0.0
    missing_s = after_s - max(observed_s, recorded_s)
    return max(missing_s, min(after_s, OBSERVED_S_MAX) - observed_s)


def is_disrupted(nodes: Sequence[Node], *, is_frozen: bool) -> bool:
    """Whether the power or the network is lost, not the nodes: then none is removed, and no time counts."""
    return is_frozen or 2 * sum(node.status.state is NodeState.READY for node in nodes) <= len(nodes)


def removable(
    nodes: Iterable[Node],
    *,
    after_s: float | None,
    observed_s: Callable[[Node], float],
    now_ns: int,
    is_kept: Callable[[Node], bool],
    is_frozen: bool = False,
) -> list[NodeId]:
    """The nodes to remove now, in order of id, at most ``AT_ONCE``.

    Args:
        after_s: the cluster's setting; None: it removes none.
        is_kept: whether something would be lost with a node.
    """
    known = sorted(nodes, key=lambda node: node.id)
    if after_s is None or is_disrupted(known, is_frozen=is_frozen):
        return []
    due = (
        node.id
        for node in known
        if is_lost_worker(node) and due_at(node, observed_s(node), now_ns, after_s) <= 0 and not is_kept(node)
    )
    return [id for id, _ in zip(due, range(AT_ONCE), strict=False)]


def is_lost_worker(node: Node) -> bool:
    """Whether it is down and has nothing of a manager."""
    return (
        node.status.state is NodeState.DOWN
        and node.spec.role is NodeRole.WORKER
        and node.manager_status is None
    )
