"""Changes of managers by the leader: roles, certificates and votes, reachability, and the level of the stored data.

The level is raised when every manager has supported it for a while.
"""

from collections.abc import Collection, Iterable
from typing import assert_never

import msgspec
import structlog
from msgspec.structs import replace

from skep.aio.clock import Clock
from skep.manager.membership.consensus import Consensus
from skep.manager.membership.roles import Demote, Keep, Promote, Step, TransferLeadership, Withdraw
from skep.manager.nodes.revocation import revoke
from skep.model.node import Node, NodeRole, NodeState, Reachability
from skep.model.values.ids import NodeId
from skep.store.etcd.membership import RaftMember
from skep.store.interface import Term, Transaction, View
from skep.store.level import LOWEST

log = structlog.get_logger(__name__)

SOUND_S = 30.0
"""Seconds for which every manager's node must be ready before the level is raised, which cannot be undone.

They are two heartbeat grace periods (15 s), so a node that starts and fails at once still returns to its former
version."""


WITHOUT_CONTACT_S = 5.0
"""Seconds of pings from a manager without contact to a quorum until it counts as unreachable.

A new leader first needs the others' next check for a quorum and their next ping, about a second each.
"""


class RoleChanges:
    """Writes roles to certificates, and removes members.  Leader only."""

    def __init__(self, term: Term, consensus: Consensus, clock: Clock) -> None:
        self._term = term
        self._consensus = consensus
        self._clock = clock

    async def apply(self, step: Step) -> None:
        """Carry out a step."""
        match step:
            case Promote(node_id):
                await self._term.update(set_certificate_role, node_id, NodeRole.MANAGER, self._clock.now_ns())
                log.info("node promoted", node=node_id)
            case Demote(node_id):
                await self._term.update(set_certificate_role, node_id, NodeRole.WORKER, self._clock.now_ns())
                log.info("node demoted", node=node_id)
            case TransferLeadership(to):
                log.info("leadership transferred: this node is being demoted", to=to.name)
                await self._consensus.move_leader(to)
            case Withdraw(member):
                await self.withdraw(member)
            case Keep():
                pass
            case _:
                assert_never(step)

    async def withdraw(self, member: RaftMember) -> None:
        """Remove a member.  The write before it is fenced by the term, which the removal is not."""
        await self._term.update(clear_manager_status, NodeId(member.name))
        await self._consensus.remove(member)


def set_certificate_role(tx: Transaction, node_id: NodeId, role: NodeRole, now_ns: int) -> None:
    """Have the node renew its certificate in ``role``, unless its spec has changed meanwhile.

    A demoted manager's certificates are revoked at once.
    """
    node = tx.lookup(Node, node_id)
    if node is None or node.certificate is None or node.spec.role is not role:
        return
    if role is NodeRole.WORKER:
        revoke(tx, node, now_ns, is_removed=False)
        node = replace(node, manager_status=None)
    certificate = node.certificate
    if certificate is not None and certificate.role is not role:
        node = replace(node, certificate=replace(certificate, role=role, state="rotate"))
    tx.put(node)


def clear_manager_status(tx: Transaction, node_id: NodeId) -> None:
    """Remove the node's manager status."""
    node = tx.lookup(Node, node_id)
    if node is not None and node.manager_status is not None:
        tx.put(replace(node, manager_status=None))


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


class LostContact:
    """Observes for how long other managers have been neither silent nor reachable.

    Such a manager's process answers pings, but its store has stopped, for example because its disk is full, or this
    leader has no link to it.  Its vote does not count, so the leader marks it unreachable, as in Docker.

    A joining manager answers no pings until it serves.  After that, it has as much time until the leader reaches it.
    """

    def __init__(self) -> None:
        self._since: dict[NodeId, float] = {}
        """When each of these managers was first seen so, in monotonic seconds."""
        self._new: frozenset[NodeId] = frozenset()
        """Managers that joined under this leader and that it has not reached yet."""

    def changes(
        self,
        nodes: Collection[Node],
        silent: Collection[NodeId],
        reachable: Collection[NodeId],
        own: NodeId,
        now: float,
    ) -> list[ReachabilityChange]:
        """Return the managers whose reachability changed since it was written.  ``now``: monotonic seconds."""
        statuses = {node.id: node.manager_status for node in nodes if node.manager_status is not None}
        joining = {id for id, status in statuses.items() if status.reachability is Reachability.UNKNOWN}
        self._new = frozenset({*self._new, *joining} & statuses.keys() - reachable)
        ids = statuses.keys() - joining - {own, *reachable}
        self._since = {id: self._since.get(id, now) for id in ids}
        lost = {id for id, since in self._since.items() if now - since >= WITHOUT_CONTACT_S}
        return reachability_changes(nodes, {*silent} - self._new | lost, reachable, own)


def write_reachability(tx: Transaction, change: ReachabilityChange) -> None:
    """Write the reachability of a manager, unless it was demoted."""
    node = tx.lookup(Node, change.node_id)
    if node is not None and node.manager_status is not None:
        status = replace(node.manager_status, reachability=change.reachability)
        tx.put(replace(node, manager_status=status))


class LevelRise:
    """Observes for how long all managers' nodes have been ready."""

    def __init__(self) -> None:
        self._sound_since: float | None = None
        """When all managers' nodes were first seen ready, in monotonic seconds, or None while one is not."""

    def due(self, view: View, now: float) -> int | None:
        """Return the level that the data can be raised to at ``now`` (monotonic seconds), or None."""
        level = usable_level(view.find(Node))
        if level is None:
            self._sound_since = None
            return None
        self._sound_since = now if self._sound_since is None else self._sound_since
        is_known = not view.unreadable(Node) and not any(
            "manager" in one for one in view.damaged(Node).values()
        )
        is_due = level > view.level and is_known and now - self._sound_since >= SOUND_S
        return level if is_due else None


def lowest_level(nodes: Iterable[Node]) -> int:
    """Return the newest level that every manager supports."""
    levels = (max(node.manager_status.level, LOWEST) for node in nodes if node.manager_status is not None)
    return min(levels, default=LOWEST)


def usable_level(nodes: Iterable[Node]) -> int | None:
    """Return the newest level that every manager supports, or None while a manager's node is not ready.

    A manager process reports its level before its node is known to be ready.  A node that does not start gets its
    former version again (``skep upgrade``), which does not start on a higher level.
    """
    managers = [node for node in nodes if node.manager_status is not None]
    if any(node.status.state is not NodeState.READY for node in managers):
        return None
    return lowest_level(managers)


def write_level(tx: Transaction) -> None:
    """Raise the level of the stored data to the newest that every manager supports, if all their nodes are ready."""
    if (level := usable_level(tx.find(Node))) is not None:
        tx.raise_level(level)
