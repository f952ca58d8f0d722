"""What is written of ways between nodes: what fails, by the owner of a session; who is avoided, by the leader."""

import msgspec
from msgspec.structs import replace

from skep.model.ids import NodeId
from skep.model.node import CutOff, FailingPath, Node
from skep.store.interface import Transaction

WRITTEN_MAX = 64
"""Failing paths written of one node, those that carry containers' packets first; each takes 100 bytes."""


class PathRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a node fails to reach, as it said in this session."""

    node_id: NodeId
    session_id: str
    failing: tuple[FailingPath, ...]


class Judgement(msgspec.Struct, frozen=True, kw_only=True):
    """What the leader says of a node."""

    node_id: NodeId
    cut_off: tuple[CutOff, ...]


def record_paths(tx: Transaction, record: PathRecord) -> bool:
    """Write it; gives False when another session speaks for the node meanwhile."""
    node = tx.rely_on(Node, record.node_id, "session")
    if node is None or node.session is None or node.session.session_id != record.session_id:
        return False
    if node.failing_paths != record.failing:
        tx.put(replace(node, failing_paths=record.failing))
    return True


def record_judgement(tx: Transaction, judgement: Judgement) -> None:
    """Write it, if the node is still there."""
    node = tx.lookup(Node, judgement.node_id)
    if node is not None and node.cut_off != judgement.cut_off:
        tx.put(replace(node, cut_off=judgement.cut_off))
