"""Transactions that write reachability.  The owner of a session writes failing paths, and the leader writes which nodes
to avoid.
"""

import msgspec
from msgspec.structs import replace

from skep.model.node import CutOff, FailingPath, Node
from skep.model.values.ids import NodeId
from skep.store.interface import Transaction

WRITTEN_MAX = 64
"""Largest number of failing paths that are written for a node, containers' traffic first.  Each takes 100 bytes."""


class PathRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The failing paths that a node reported in this session."""

    node_id: NodeId
    session_id: str
    failing: tuple[FailingPath, ...]


class Avoidance(msgspec.Struct, frozen=True, kw_only=True):
    """Reasons to avoid a node.  Empty to end the avoidance."""

    node_id: NodeId
    cut_off: tuple[CutOff, ...]


def record_paths(tx: Transaction, record: PathRecord) -> bool:
    """Write the failing paths.  Returns False if another session has replaced this one in the meantime."""
    node = tx.rely_on(Node, record.node_id, "session")
    if node is None or node.session is None or node.session.session_id != record.session_id:
        return False
    if node.failing_paths != record.failing:
        tx.put(replace(node, failing_paths=record.failing))
    return True


def record_avoidance(tx: Transaction, avoidance: Avoidance) -> None:
    """Write the reasons, if the node still exists."""
    node = tx.lookup(Node, avoidance.node_id)
    if node is not None and node.cut_off != avoidance.cut_off:
        tx.put(replace(node, cut_off=avoidance.cut_off))
