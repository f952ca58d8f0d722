"""Which managers answer: written by the leader, from what it hears of the others on the link.  Pure."""

from collections.abc import Collection, Iterable

import msgspec
from msgspec.structs import replace

from skep.model.ids import NodeId
from skep.model.node import Node, Reachability
from skep.store.interface import Transaction


class Mark(msgspec.Struct, frozen=True):
    """What to write of one manager."""

    node_id: NodeId
    reachability: Reachability


def roll_call(
    nodes: Iterable[Node], silent: Collection[NodeId], heard: Collection[NodeId], own: NodeId
) -> list[Mark]:
    """What has changed: managers that fell silent, and those that are heard again.

    A manager that is just coming in says itself when it is there; one that a leader who has just started did not hear
    yet is as it was.
    """
    marks = []
    for node in nodes:
        status = node.manager_status
        if status is None or node.id == own:
            continue
        if node.id in silent and status.reachability is Reachability.REACHABLE:
            marks.append(Mark(node.id, Reachability.UNREACHABLE))
        elif node.id in heard and status.reachability is Reachability.UNREACHABLE:
            marks.append(Mark(node.id, Reachability.REACHABLE))
    return marks


def write_mark(tx: Transaction, mark: Mark) -> None:
    """Write what was judged of one manager; one that is none any more stays so."""
    node = tx.lookup(Node, mark.node_id)
    if node is not None and node.manager_status is not None:
        status = replace(node.manager_status, reachability=mark.reachability)
        tx.put(replace(node, manager_status=status))
