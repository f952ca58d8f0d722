"""Carries out the steps of role changes: certificates, votes and leadership."""

from typing import assert_never

import structlog
from msgspec.structs import replace

from skep.aio.clock import Clock
from skep.manager.membership.consensus import Consensus
from skep.manager.membership.roles import Demote, Keep, Promote, Step, TransferLeadership, Withdraw
from skep.manager.nodes.revocation import revoke
from skep.model.node import Node, NodeRole
from skep.model.values.ids import NodeId
from skep.store.etcd.membership import RaftMember
from skep.store.interface import Term, Transaction

log = structlog.get_logger(__name__)


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
