"""Decides, for ``node_loop``, which nodes that left or were lost are removed from the cluster.

Docker never removes a node by itself, so short-lived machines leave nodes behind.  A cluster may set a time after which
a down worker is removed.  Exceptions:

* Managers are never removed, nor workers that are becoming or recently were managers, because a quorum counts them.
* Nothing is removed while half of all nodes or more are not ready, or while replacement is frozen.  So many nodes are
  not lost for good, but have no power or network.
* A node stays if its removal would lose something: volumes, data, or tasks bound to it (``kept_nodes``).  Only a user
  removes such a node.
* This leader must have seen the node down for that time, or at least for an hour, while most nodes were ready.  So
  after a power loss, the nodes that start last have that time to return, whatever the clocks show.
"""

from collections.abc import Callable, Iterable, Sequence

from skep.model.node import Node, NodeRole, NodeState
from skep.model.values.ids import NodeId
from skep.model.values.times import SECOND_NS, unix_ns

OBSERVED_S_MAX = 3600.0
"""Maximum seconds for which a leader must have seen a node down.  The node's own record covers longer times."""
AT_ONCE = 50
"""Maximum nodes removed together."""


def due_at(node: Node, observed_s: float, now_ns: int, after_s: float) -> float:
    """Return in how many seconds a node has been down for long enough.  0 or less means now.

    Args:
        observed_s: Seconds for which this leader has seen it down without a disruption (``is_disrupted``).
    """
    recorded_s = (now_ns - unix_ns(node.silent_since)) / SECOND_NS if node.silent_since else 0.0
    missing_s = after_s - max(observed_s, recorded_s)
    return max(missing_s, min(after_s, OBSERVED_S_MAX) - observed_s)


def is_disrupted(nodes: Sequence[Node], *, is_frozen: bool) -> bool:
    """Return whether rather power or network than nodes are lost.  Then no node is removed, and no time counts."""
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
    """Return the nodes to remove now, in order of id, at most ``AT_ONCE``.

    Args:
        after_s: The cluster's setting, or None to remove no node.
        is_kept: Whether something would be lost with a node.
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
    """Return whether the node is down and has no part in the managers' quorum."""
    return (
        node.status.state is NodeState.DOWN
        and node.spec.role is NodeRole.WORKER
        and node.manager_status is None
    )
