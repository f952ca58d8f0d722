"""From wished roles to members of the consensus and certificates.  Pure.

A promotion begins with the certificate: the node is asked to renew it, gets one of a manager, starts its manager
process, and that asks to be let in (``joining``).  A demotion begins with the consensus: leadership moves away, the
member is removed if the rest keeps a quorum, and only then the node gets a worker's certificate.  One member at a
time: the next step is judged by what has become of the last one.

Source: swarmkit, manager/role_manager.go (reconcileRole).
"""

from collections.abc import Collection, Iterable
from typing import TypeAlias

import msgspec

from skep.manager.membership.quorum import keeps_quorum
from skep.model.ids import NodeId
from skep.model.node import Node, NodeRole
from skep.store.etcd.membership import RaftMember


class Promote(msgspec.Struct, frozen=True):
    """Have the node renew its certificate, as a manager's."""

    node_id: NodeId


class HandOver(msgspec.Struct, frozen=True):
    """This leader is to go: another member takes over first."""

    to: RaftMember


class Withdraw(msgspec.Struct, frozen=True):
    """Remove a member from the consensus."""

    member: RaftMember


class Hold(msgspec.Struct, frozen=True):
    """A member is to go, but those that stay would have no quorum: it stays until they do."""

    member: RaftMember


class Demote(msgspec.Struct, frozen=True):
    """The node is no member any more: have it renew its certificate, as a worker's."""

    node_id: NodeId


Step: TypeAlias = Promote | HandOver | Withdraw | Hold | Demote


def next_steps(
    nodes: Iterable[Node],
    members: Iterable[RaftMember],
    reachable: Collection[str],
    own: NodeId,
    unreadable: Collection[str] = (),
) -> list[Step]:
    """What brings members and certificates nearer to the wished roles; ``[]``: they agree.

    Args:
        members: learners too; they are removed like others, and their going costs no quorum.
        reachable: names of members that were heard just now, the own one too.
        unreadable: ids of nodes whose wished role is not known, as it cannot be read: they stay what they are.
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
    """The others first: the leader sees them off and goes last."""
    voters = {member.name for member in members if not member.is_learner}
    held: list[Step] = []
    for member in sorted(leaving, key=lambda one: (one.name == own, one)):
        if not keeps_quorum(voters, reachable, member.name):
            held.append(Hold(member))
        elif member.name != own:
            return [Withdraw(member)]
        else:
            heir = _heir(members, wanted, reachable, own)
            return [HandOver(heir)] if heir is not None else [Hold(member)]
    return held[:1]


def _heir(
    members: Iterable[RaftMember], wanted: Collection[str], reachable: Collection[str], own: NodeId
) -> RaftMember | None:
    """Who leads next: a voter that was heard, best one that stays."""
    able = [
        member
        for member in members
        if not member.is_learner and member.name != own and member.name in reachable
    ]
    return min(able, key=lambda one: (one.name not in wanted, one), default=None)


LEARNING_S = 60.0
"""A learner that has not caught up by then is removed: as long as it is there nobody else can come in."""


class Learners:
    """How long each learner has been seen learning, on the leader's own clock."""

    def __init__(self) -> None:
        self._since: dict[int, float] = {}

    def overdue(self, members: Iterable[RaftMember], now: float) -> list[RaftMember]:
        """Learners seen for ``LEARNING_S`` at ``now`` (monotonic seconds)."""
        learners = [member for member in members if member.is_learner]
        self._since = {member.id: self._since.get(member.id, now) for member in learners}
        return [member for member in learners if now - self._since[member.id] >= LEARNING_S]
