"""Decides the next steps that bring consensus members and certificates to the roles in the specs.  Pure.

A promotion starts with the certificate.  The node is requested to renew it, receives a manager's certificate, and
starts its manager process, which requests admission (``joining``).  A demotion starts with the consensus.  Leadership
is transferred, the member is removed if the rest keeps a quorum, and only then the node gets a worker's certificate.
Members change one at a time: the next step is decided once the last one has taken effect.

Source: swarmkit, manager/role_manager.go (reconcileRole).
"""

from collections.abc import Collection, Iterable
from typing import TypeAlias

import msgspec

from skep.model.node import Node, NodeRole
from skep.model.values.ids import NodeId
from skep.store.etcd.membership import RaftMember


class Promote(msgspec.Struct, frozen=True):
    """Have the node renew its certificate as a manager."""

    node_id: NodeId


class TransferLeadership(msgspec.Struct, frozen=True):
    """Transfer leadership to another member, because this leader will be removed."""

    to: RaftMember


class Withdraw(msgspec.Struct, frozen=True):
    """Remove a member from the consensus."""

    member: RaftMember


class Keep(msgspec.Struct, frozen=True):
    """Keep a member that should be removed until the rest has a quorum without it."""

    member: RaftMember


class Demote(msgspec.Struct, frozen=True):
    """Have a node that has left the consensus renew its certificate as a worker."""

    node_id: NodeId


Step: TypeAlias = Promote | TransferLeadership | Withdraw | Keep | Demote


def next_steps(
    nodes: Iterable[Node],
    members: Iterable[RaftMember],
    reachable: Collection[str],
    own: NodeId,
    unreadable: Collection[str] = (),
) -> list[Step]:
    """Return the steps that bring members and certificates closer to the specs.  Empty if they match.

    Args:
        members: All members.  Learners are removed like others, which costs no quorum.
        reachable: Names of members with a working link, including this one.
        unreadable: Ids of nodes whose role is unreadable.  They are left as they are.
    """
    nodes, members = tuple(node for node in nodes if node.id not in unreadable), tuple(members)
    wanted = {str(node.id) for node in nodes if node.spec.role is NodeRole.MANAGER}
    names = {member.name for member in members}
    steps: list[Step] = []
    for node in nodes:
        role = node.certificate.role if node.certificate is not None else None
        if node.spec.role is NodeRole.MANAGER and role is NodeRole.WORKER:
            steps.append(Promote(node.id))
        elif node.spec.role is NodeRole.WORKER and node.id not in names and _has_been_manager(node):
            steps.append(Demote(node.id))
    leaving = [member for member in members if member.name not in wanted and member.name not in unreadable]
    return [*steps, *_next_withdrawal(leaving, members, wanted, reachable, own)]


def _has_been_manager(node: Node) -> bool:
    is_certified = node.certificate is not None and node.certificate.role is NodeRole.MANAGER
    return is_certified or node.manager_status is not None


def _next_withdrawal(
    leaving: list[RaftMember],
    members: tuple[RaftMember, ...],
    wanted: Collection[str],
    reachable: Collection[str],
    own: NodeId,
) -> list[Step]:
    """Return the next removal.  The leader itself is removed last."""
    voters = {member.name for member in members if not member.is_learner}
    held: list[Step] = []
    for member in sorted(leaving, key=lambda one: (one.name == own, one)):
        if not keeps_quorum(voters, reachable, member.name):
            held.append(Keep(member))
        elif member.name != own:
            return [Withdraw(member)]
        else:
            successor = _successor(members, wanted, reachable, own)
            return [TransferLeadership(successor)] if successor is not None else [Keep(member)]
    return held[:1]


def _successor(
    members: Iterable[RaftMember], wanted: Collection[str], reachable: Collection[str], own: NodeId
) -> RaftMember | None:
    """Return the next leader: a reachable voter, preferably one whose role stays."""
    able = [
        member
        for member in members
        if not member.is_learner and member.name != own and member.name in reachable
    ]
    return min(able, key=lambda one: (one.name not in wanted, one), default=None)


LEARNING_S = 60.0
"""Seconds after which a learner that has not caught up is removed, because no other manager can be added meanwhile."""


class Learners:
    """Tracks for how long this leader has observed each learner, by its own clock."""

    def __init__(self) -> None:
        self._since: dict[int, float] = {}

    def overdue(self, members: Iterable[RaftMember], now: float) -> list[RaftMember]:
        """Return the learners observed for ``LEARNING_S`` at ``now`` (monotonic seconds)."""
        learners = [member for member in members if member.is_learner]
        self._since = {member.id: self._since.get(member.id, now) for member in learners}
        return [member for member in learners if now - self._since[member.id] >= LEARNING_S]


def quorum(voters: int) -> int:
    """Return how many of ``voters`` must agree, which is more than half.

    ====== ====== =========
    voters quorum tolerated
    ====== ====== =========
    1      1      0
    2      2      0
    3      2      1
    4      3      1
    5      3      2
    6      4      2
    7      4      3
    ====== ====== =========

    An even number of voters tolerates no more failures than the next smaller odd number.
    """
    return voters // 2 + 1


def keeps_quorum(voters: Collection[str], reachable: Collection[str], leaving: str) -> bool:
    """Whether the remaining voters still have a quorum once ``leaving`` has no vote.

    Source: swarmkit, manager/state/raft/raft.go (CanRemoveMember).
    """
    staying = set(voters) - {leaving}
    return bool(staying) and len(staying & set(reachable)) >= quorum(len(staying))
