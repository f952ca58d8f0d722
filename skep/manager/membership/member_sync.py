"""Decides which managers the leader marks as reachable or unreachable, from the state of its links.  Pure."""

from collections.abc import Collection, Iterable

import msgspec
from msgspec.structs import replace

from skep.model.node import Node, Reachability
from skep.model.values.ids import NodeId
from skep.store.interface import Transaction


class ReachabilityChange(msgspec.Struct, frozen=True):
    """A change of one manager's reachability."""

    node_id: NodeId
    reachability: Reachability


def reachability_changes(
    nodes: Iterable[Node], silent: Collection[NodeId], responding: Collection[NodeId], own: NodeId
) -> list[ReachabilityChange]:
    """Return the managers whose reachability changed since it was written.

    A joining manager writes its own status.  A manager to which a new leader has no link yet keeps its status.
    """
    changes = []
    for node in nodes:
        status = node.manager_status
        if status is None or node.id == own:
            continue
        if node.id in silent and status.reachability is Reachability.REACHABLE:
            changes.append(ReachabilityChange(node.id, Reachability.UNREACHABLE))
        elif node.id in responding and status.reachability is Reachability.UNREACHABLE:
            changes.append(ReachabilityChange(node.id, Reachability.REACHABLE))
    return changes


def write_reachability(tx: Transaction, change: ReachabilityChange) -> None:
    """Write the reachability of a manager, unless it was demoted."""
    node = tx.lookup(Node, change.node_id)
    if node is not None and node.manager_status is not None:
        status = replace(node.manager_status, reachability=change.reachability)
        tx.put(replace(node, manager_status=status))
