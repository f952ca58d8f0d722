"""Simulated operators: machines join and leave, nodes are removed, promoted and demoted, concurrently with faults.

The managers' part is production code.  The steps of nodes (renew the certificate, join, resign before leaving) are
simulated, and call the functions of the managers' request handlers directly.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from itertools import count
from typing import TypeVar

from msgspec.structs import replace

from sim.cluster import SimulatedCluster
from sim.etcd.client import PEER_PORT
from sim.initial_state import a_manager, a_worker, address_of
from sim.users.users import Users
from sim.world.certificates import Certificate, describe, issue
from sim.world.committed import Change
from sim.world.manager import SimulatedManager
from skep.errors import FailedPrecondition, PermissionDenied, SkepError, Unavailable
from skep.manager.ca.rotation import ROTATE
from skep.manager.control.nodes import remove_node
from skep.manager.membership.service import announce_manager
from skep.model.node import Node, NodeRole
from skep.model.values.ids import NodeId
from skep.store.etcd.errors import NoMember
from skep.store.etcd.peers import peer_url
from skep.store.interface import Transaction, Updated, View

T = TypeVar("T")

MANAGERS_MAX, WORKERS_MAX, WORKERS_MIN = 5, 6, 2
RETRY_S = 0.2
RESIGNED_S = 5.0
"""Time limit for a leaving manager's member to be removed."""
GIVEN_UP_S = 20.0
"""Time after which a refused demotion is given up."""


class Operators:
    """The operators of one cluster."""

    def __init__(
        self, cluster: SimulatedCluster, users: Users, healthy: Callable[[], Sequence[NodeId]]
    ) -> None:
        """``healthy``: returns the machines without an active fault."""
        self._cluster = cluster
        self._users = users
        self._healthy = healthy
        self._random = cluster.random
        self._numbers = count(100)
        self._actions: tuple[Callable[[], Coroutine[None, None, None] | None], ...] = (
            *(self._worker_joins, self._worker_leaves, self._worker_is_removed),
            *(self._manager_joins, self._promotion, self._demotion, self._manager_leaves),
            *(self._upgrade, self._upgrade),
        )
        self._busy: set[asyncio.Task[None]] = set()
        cluster.renew = self._renew
        cluster.committed.watchers.append(self._renew_managers)

    def act(self) -> None:
        """Begin a random operation, if one is possible now."""
        action = self._random.choice(self._actions)
        if (work := action()) is not None:
            self._begin(work, action.__name__)

    @property
    def under_way(self) -> list[str]:
        """Return the operations in progress."""
        return sorted(task.get_name() for task in self._busy)

    # -- workers ---------------------------------------------------------------------------------------------------

    def _worker_joins(self) -> Coroutine[None, None, None] | None:
        if len(self._cluster.workers) >= WORKERS_MAX:
            return None
        return self.join_worker(NodeId(f"w{next(self._numbers)}"))

    async def join_worker(self, id: NodeId) -> None:
        self._log(f"{id} joins")

        def joined(tx: Transaction) -> Certificate | None:
            if tx.lookup(Node, id) is None:
                tx.put(a_worker(id))
            return issue(tx)

        self._take(id, await self._write(joined))
        node, (other, *_) = self._cluster.add_node(id), self._cluster.nodes.values()
        node.broken_images, node.hanging_images = other.broken_images, other.hanging_images
        node.ending_images, node.sick_images = other.ending_images, other.sick_images
        self._cluster.start_node(id)
        self._cluster.workers = (*self._cluster.workers, id)

    def _worker_leaves(self) -> Coroutine[None, None, None] | None:
        id = self._choose(self._plain_workers())
        return self.leave_worker(id) if id is not None else None

    async def leave_worker(self, id: NodeId) -> None:
        """Leave the cluster with ``swarm leave`` on the node, and ``node rm`` once it is down."""
        self._log(f"{id} leaves")
        await self._end_node(id)
        await self._remove(id, force=False)

    def _worker_is_removed(self) -> Coroutine[None, None, None] | None:
        id = self._choose(self._plain_workers())
        return self.remove_worker(id) if id is not None else None

    async def remove_worker(self, id: NodeId) -> None:
        """Remove a running node with ``node rm --force``, and run ``swarm leave`` on it later."""
        self._cluster.disturbances += 1
        self._cluster.workers = tuple(one for one in self._cluster.workers if one != id)
        self._log(f"{id} is removed by force")
        await self._remove(id, force=True)
        await asyncio.sleep(self._random.choice((0.1, 3.0)))
        self._log(f"{id} leaves, as it was removed")
        await self._end_node(id)
        self._cluster.disturbances -= 1
        self._cluster.disturb()

    async def _end_node(self, id: NodeId) -> None:
        self._cluster.workers = tuple(one for one in self._cluster.workers if one != id)
        await self._cluster.end_node(id)

    async def _remove(self, id: NodeId, *, force: bool) -> None:
        def removed(tx: Transaction) -> None:
            if tx.lookup(Node, id) is not None:
                remove_node(tx, id, force=force, now_ns=self._now_ns())

        self._cluster.removals.add(id)
        await self._write(removed)

    # -- managers --------------------------------------------------------------------------------------------------

    def _manager_joins(self) -> Coroutine[None, None, None] | None:
        if self._has_managers_enough():
            return None
        return self.join_manager(NodeId(f"m{next(self._numbers)}"))

    async def join_manager(self, id: NodeId) -> None:
        self._log(f"{id} joins as a manager")
        self._cluster.changing.add(id)

        def joined(tx: Transaction) -> Certificate | None:
            if tx.lookup(Node, id) is None:
                tx.put(a_manager(id))
            return self._issued(tx, id)

        self._take(id, await self._write(joined))
        self._cluster.add_machine(id)
        await self._come_in(id)
        self._cluster.changing.discard(id)

    def _promotion(self) -> Coroutine[None, None, None] | None:
        id = None if self._has_managers_enough() else self._choose(self._plain_workers(), least=0)
        return self.promote(id) if id is not None else None

    async def promote(self, id: NodeId) -> None:
        """Promote a node with ``node promote``.  Complete when it has renewed its certificate and its member is a
        voter.
        """
        self._log(f"promote {id}")
        if await self._promote(id):
            await _until(lambda: id in self._cluster.managers)
        self._cluster.changing.discard(id)

    def _demotion(self) -> Coroutine[None, None, None] | None:
        id = self._choose(self._cluster.managers, least=1) if self._keeps_managers() else None
        return self.demote(id) if id is not None else None

    async def demote(self, id: NodeId) -> None:
        """Demote a manager with ``node demote``.  A machine without a worker leaves afterwards."""
        self._log(f"demote {id}")
        if await self._demote(id):
            await self._end_manager(id)
        self._cluster.changing.discard(id)

    def _manager_leaves(self) -> Coroutine[None, None, None] | None:
        managers = [id for id in self._cluster.managers if id not in self._cluster.nodes]
        is_spare = len(self._cluster.managers) > 2 and self._keeps_managers() and not self._has_left_voters()
        id = self._choose(managers, least=0) if is_spare else None
        return self.leave_manager(id) if id is not None else None

    async def leave_manager(self, id: NodeId) -> None:
        """Remove a manager with ``swarm leave --force``.  It resigns, and leaves even if that is refused."""
        self._log(f"manager {id} leaves")
        try:
            async with asyncio.timeout(RESIGNED_S):
                await self._users.resign(id)
                await _until(lambda: id not in self._cluster.raft.members)
        except (SkepError, TimeoutError) as error:
            self._log(f"{id} has not resigned: {error}")
        await self._stop_manager(id)
        while not await self._demote(id):
            pass
        await self._remove(id, force=True)
        self._cluster.changing.discard(id)

    def _upgrade(self) -> Coroutine[None, None, None] | None:
        older = [id for id in self._cluster.managers if id not in self._cluster.newer]
        id = self._choose(older, least=0) if self._keeps_managers() else None
        return self.upgrade(id) if id is not None else None

    async def upgrade(self, id: NodeId) -> None:
        """Restart a manager with a newer version than the others have."""
        self._log(f"upgrade {id}")
        await self._cluster.end_manager(id)
        await asyncio.sleep(self._random.choice((0.2, 1.5)))
        self._cluster.newer.add(id)
        self._cluster.start_manager(id)
        self._cluster.changing.discard(id)

    async def _promote(self, id: NodeId) -> bool:
        """Request a promotion.  Return False if it is refused.

        An attempt of unknown outcome may be committed at any later time, so the operator repeats it until the node's
        desired role is manager.  Managers refuse a node for good once they know that it is behind NAT.
        """
        until, may_be_committed = self._cluster.loop.time() + GIVEN_UP_S, False
        while not (is_done := await self._users.set_role(id, NodeRole.MANAGER)):
            may_be_committed |= is_done is None
            is_final = id in self._cluster.network.outside and self._cluster.loop.time() > until
            if not may_be_committed or (is_done is False and is_final):
                return False
            await asyncio.sleep(RETRY_S)
        return True

    async def _demote(self, id: NodeId) -> bool:
        """Request a demotion.  Return False if it is refused for ``GIVEN_UP_S`` because the others would lose their
        quorum.

        An attempt of unknown outcome may be committed at any later time, as in ``_promote``.
        """
        until, may_be_committed = self._cluster.loop.time() + GIVEN_UP_S, False
        while not (is_done := await self._users.set_role(id, NodeRole.WORKER)):
            may_be_committed |= is_done is None
            if not may_be_committed and self._cluster.loop.time() > until:
                return False
            await asyncio.sleep(RETRY_S)
        await _until(lambda: id not in self._cluster.raft.members)
        return True

    async def _end_manager(self, id: NodeId) -> None:
        if id in self._cluster.nodes:
            # The node stays as a worker, and ends its manager after the renewal of its certificate.
            await _until(lambda: id not in self._cluster.managers)
            return
        await self._stop_manager(id)
        await self._remove(id, force=True)

    async def _stop_manager(self, id: NodeId) -> None:
        self._cluster.managers = tuple(one for one in self._cluster.managers if one != id)
        await self._cluster.end_manager(id)

    # -- steps of nodes --------------------------------------------------------------------------------------------

    def _renew(self, id: NodeId) -> None:
        """Renew the certificate of a node, unless a renewal is in progress."""
        if not any(task.get_name() == f"renew {id}" for task in self._busy):
            self._begin(self._renewed_until_issued(id), f"renew {id}")

    def _renew_managers(self, change: Change, _: View) -> None:
        """Renew certificates of machines with only a manager, which have no agent that receives the request."""
        for event in change.events:
            match event:
                case Updated(_, Node(id=id) as node) if id not in self._cluster.nodes and _is_to_renew(node):
                    if id in self._cluster.managers:
                        self._cluster.loop.call_soon(self._renew, id)

    async def _renewed_until_issued(self, id: NodeId) -> None:
        """Renew the certificate, and again if another renewal was requested meanwhile."""
        await self._issue_certificate(id)
        while (node := self._cluster.view.lookup(Node, id)) is not None and _is_to_renew(node):
            await asyncio.sleep(RETRY_S)
            await self._issue_certificate(id)

    def _issued(self, tx: Transaction, id: NodeId) -> Certificate | None:
        certificate = issue(tx)
        if certificate is not None and id not in self._cluster.nodes:
            describe(tx, id, certificate)
        return certificate

    def _take(self, id: NodeId, certificate: Certificate | None) -> None:
        if certificate is not None:
            self._cluster.certificates.take(id, certificate)

    async def _issue_certificate(self, id: NodeId) -> None:
        def issued(tx: Transaction) -> tuple[NodeRole | None, Certificate | None]:
            node = tx.lookup(Node, id)
            if node is None or node.certificate is None:
                return None, None
            # Idempotent: an earlier attempt of unknown outcome may have been committed.
            tx.put(replace(node, certificate=replace(node.certificate, state="issued")))
            return node.certificate.role, self._issued(tx, id)

        role, certificate = await self._write(issued)
        self._take(id, certificate)
        if id not in self._cluster.nodes:
            return  # the operator that changes the role of such a machine starts and ends its manager
        if role is NodeRole.MANAGER and id not in self._cluster.managers:
            await self._come_in(id)
        elif role is NodeRole.WORKER and id in self._cluster.managers:
            await self._stop_manager(id)

    async def _come_in(self, id: NodeId) -> None:
        """Join the managers and become a voter, as in ``membership.joining``.  Stop if refused."""
        raft = self._cluster.raft
        while True:
            try:
                manager = self._any_manager()
                assert manager.store is not None
                await manager.store.update(announce_manager, id, address_of(id))
                if id not in raft.members:
                    await manager.members.add(id, peer_url(id, PEER_PORT))
                if not raft.members[id].is_running:
                    raft.start(id)
                await manager.members.promote(id)
            except NoMember:
                pass
            except (FailedPrecondition, PermissionDenied) as error:
                self._log(f"{id} cannot join: {error}")
                return
            except SkepError:
                pass
            else:
                self._cluster.managers = (*self._cluster.managers, id)
                self._cluster.start_manager(id)
                self._log(f"{id} is a manager")
                return
            await asyncio.sleep(RETRY_S)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _begin(self, action: Coroutine[None, None, None], name: str) -> None:
        task = self._cluster.loop.create_task(action, name=name)
        self._busy.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._busy.discard(task)
        if not task.cancelled():
            task.result()

    def _choose(self, candidates: Sequence[NodeId], *, least: int = WORKERS_MIN) -> NodeId | None:
        """Return a healthy machine of ``candidates`` and mark it as changing.  None if there are only ``least`` or
        fewer.
        """
        healthy = [id for id in self._healthy() if id in candidates]
        if not healthy or len(candidates) <= least:
            return None
        id = self._random.choice(healthy)
        self._cluster.changing.add(id)
        return id

    def _plain_workers(self) -> Sequence[NodeId]:
        return [id for id in self._cluster.workers if id not in self._cluster.managers]

    def _keeps_managers(self) -> bool:
        """Return whether no manager is changing.  Removing two at once may lose the quorum."""
        return not any(id in self._cluster.changing for id in self._cluster.managers)

    def _has_left_voters(self) -> bool:
        """Return whether a manager that left still has a vote.  If another manager left then, the others might lose
        their quorum.
        """
        return any(
            member.is_voter and member.id not in self._cluster.managers
            for member in self._cluster.raft.members.values()
        )

    def _has_managers_enough(self) -> bool:
        coming = [id for id in self._cluster.changing if id not in self._cluster.managers]
        return len(self._cluster.managers) + len(coming) >= MANAGERS_MAX

    def _any_manager(self) -> SimulatedManager:
        """Return a random manager that serves.  Raises: Unavailable: no manager serves."""
        there = [one for one in self._cluster.running_managers.values() if one.store is not None]
        if not there:
            raise Unavailable("no manager serves")
        return self._random.choice(there)

    async def _once(self, body: Callable[[Transaction], T]) -> T:
        store = self._any_manager().store
        assert store is not None
        await store.barrier()
        return await store.update(body)

    async def _write(self, body: Callable[[Transaction], T]) -> T:
        """Commit ``body`` through any manager and return its result.  Refused attempts are retried."""
        while True:
            try:
                return await self._once(body)
            except SkepError:
                await asyncio.sleep(RETRY_S)

    def _log(self, text: str) -> None:
        self._cluster.disturb()
        self._cluster.trace.add(f"operator: {text}")

    def _now_ns(self) -> int:
        return self._cluster.clocks[self._cluster.managers[0]].now_ns()


def _is_to_renew(node: Node) -> bool:
    return node.certificate is not None and node.certificate.state == ROTATE


async def _until(condition: Callable[[], bool]) -> None:
    """Wait until ``condition`` is true, testing it at intervals."""
    for _ in iter(condition, True):
        await asyncio.sleep(RETRY_S)
