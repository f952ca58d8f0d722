"""What a manager says of itself: ``ManagerStatus`` of its own node object.

Each manager writes that it is there and whether it leads; the leader writes which of the others are unreachable, and
takes the mark of the leader from whoever led before (``membership.roll_call``).
"""

import asyncio
from random import Random

import structlog
from msgspec.structs import replace

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.first import wait_first
from skep.errors import SkepError
from skep.model.ids import NodeId
from skep.model.node import ManagerStatus, Node, NodeRole, Reachability
from skep.store.interface import Store, Term, Transaction
from skep.store.level import LEVEL

log = structlog.get_logger(__name__)

FIRST_RETRY_S, LONGEST_RETRY_S = 0.5, 5.0


class Presence:
    """Keeps this manager's own status true.

    ``addr``, ``peer_addr``: ``ip:port`` where others reach it, and its etcd.
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
        """This manager leads in ``term``; None: it does not."""
        self._term = term
        self._changed.set()

    async def run(self) -> None:
        """Write until cancelled: once at the start, then whenever leadership changes, however often that takes."""
        backoff = Backoff(FIRST_RETRY_S, LONGEST_RETRY_S, chance=self._random.random)
        while True:
            self._changed.clear()
            term = self._term
            try:
                await (term or self._store).update(
                    show_presence, self._node_id, self._addr, self._peer_addr, leads=term is not None
                )
            except SkepError as error:
                log.debug("presence not shown yet", reason=str(error))
                await wait_first(backoff.sleep(self._clock), self._changed.wait())
            else:
                backoff.reset()
                await self._changed.wait()


def show_presence(tx: Transaction, node_id: NodeId, addr: str, peer_addr: str = "", *, leads: bool) -> None:
    """Show the manager ``node_id`` at ``addr``, its etcd at ``peer_addr``, and whether it leads; nobody else does then.

    A node that was removed stays removed, one that was demoted no manager.  Whether a manager that was unreachable
    is heard again is said by the leader.
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
    is_heard = leads or before is None or before.reachability is Reachability.UNKNOWN
    reachability = Reachability.REACHABLE if is_heard or before is None else before.reachability
    status = ManagerStatus(
        leader=leads, reachability=reachability, addr=addr, level=LEVEL, peer_addr=peer_addr
    )
    if before != status:
        tx.put(replace(node, manager_status=status))
