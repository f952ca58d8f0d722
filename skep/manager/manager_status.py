"""Writes ``ManagerStatus`` of this manager's own node object.

Each manager writes its addresses and whether it leads.  The leader writes which of the others are unreachable, and
clears ``leader`` of the previous one (``membership.member_sync``).
"""

import asyncio
from random import Random

import structlog
from msgspec.structs import replace

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.race import wait_first
from skep.errors import SkepError
from skep.model.node import ManagerStatus, Node, NodeRole, Reachability
from skep.model.values.ids import NodeId
from skep.store.interface import Store, Term, Transaction
from skep.store.level import LEVEL

log = structlog.get_logger(__name__)

FIRST_RETRY_S, LONGEST_RETRY_S = 0.5, 5.0
"""Delays in seconds before the status is written again."""


class ManagerStatusWriter:
    """Keeps this manager's own status up to date.

    ``addr`` and ``peer_addr`` are ``ip:port`` where others reach its gRPC server and its etcd.
    """

    def __init__(
        self, store: Store, node_id: NodeId, addr: str, peer_addr: str, clock: Clock, random: Random
    ) -> None:
        self._store = store
        self._node_id = node_id
        self._addr = addr
        self._peer_addr = peer_addr
        self._clock = clock
        self._random = random
        self._term: Term | None = None
        self._changed = asyncio.Event()

    def lead(self, term: Term | None) -> None:
        """Record the term in which this manager leads, or None if it does not lead."""
        self._term = term
        self._changed.set()

    async def run(self) -> None:
        """Write at the start and whenever leadership changes, with retries, until cancelled."""
        backoff = Backoff(FIRST_RETRY_S, LONGEST_RETRY_S, rng=self._random.random)
        while True:
            self._changed.clear()
            term = self._term
            try:
                await (term or self._store).update(
                    write_manager_status, self._node_id, self._addr, self._peer_addr, leads=term is not None
                )
            except SkepError as error:
                log.debug("manager status not written, will retry", reason=str(error))
                await wait_first(backoff.sleep(self._clock), self._changed.wait())
            else:
                backoff.reset()
                await self._changed.wait()


def write_manager_status(
    tx: Transaction, node_id: NodeId, addr: str, peer_addr: str = "", *, leads: bool
) -> None:
    """Write the status of manager ``node_id``.  If it leads, clear ``leader`` of all others.

    It does not restore a removed node or the status of a demoted one.  Only the leader may mark an unreachable manager
    as reachable again.

    Args:
        addr: ``ip:port`` of its gRPC server.
        peer_addr: ``ip:port`` of its etcd.
    """
    node = tx.lookup(Node, node_id)
    if node is None:
        return
    if leads:
        for other in tx.find(Node):
            if other.id != node_id and other.manager_status is not None and other.manager_status.leader:
                tx.put(replace(other, manager_status=replace(other.manager_status, leader=False)))
    before = node.manager_status
    if before is None and node.spec.role is not NodeRole.MANAGER:
        return
    is_reachable = leads or before is None or before.reachability is Reachability.UNKNOWN
    reachability = Reachability.REACHABLE if is_reachable or before is None else before.reachability
    status = ManagerStatus(
        leader=leads, reachability=reachability, addr=addr, level=LEVEL, peer_addr=peer_addr
    )
    if before != status:
        tx.put(replace(node, manager_status=status))
