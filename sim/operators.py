"""What operators do: machines join and leave, nodes are removed, promoted and demoted, beside every fault.

What a node does by itself (renew its certificate, ask to be let in, resign before it leaves) is done here in its place,
by the functions that managers answer with; what managers do about it is the production's.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from itertools import count
from typing import TypeVar

from msgspec.structs import replace

from sim.cluster import SimulatedCluster
from sim.etcd.client import PEER_PORT
from sim.initial_state import a_manager, a_worker, address_of
from sim.manager import SimulatedManager
from sim.users import Users
from skep.errors import FailedPrecondition, PermissionDenied, SkepError, Unavailable
from skep.manager.control.nodes import remove_node
from skep.manager.membership.service import announce_manager
from skep.model.ids import NodeId
from skep.model.node import Node, NodeRole
from skep.store.etcd.errors import NoMember
from skep.store.etcd.peers import peer_url
from skep.store.interface import Transaction

T = TypeVar("T")

MANAGERS_MAX, WORKERS_MAX, WORKERS_MIN = 5, 6, 2
RETRY_S = 0.2
RESIGNED_S = 5.0
"""How long a manager that leaves waits for its vote to be gone."""
GIVEN_UP_S = 20.0
"""When an operator gives up a demotion that is refused."""


class Operators:
    """All of one cluster."""

    def __init__(self, cluster: SimulatedCluster, users: Users, well: Callable[[], Sequence[NodeId]]) -> None:
        """``well``: machines without a fault of their own."""
        self._cluster = cluster
        self._users = users
        self._well = well
        self._random = cluster.random
        self._numbers = count(100)
        self._deeds: tuple[Callable[[], Coroutine[None, None, None] | None], ...] = (
            *(self._worker_joins, self._worker_leaves, self._worker_is_removed),
            *(self._manager_joins, self._promotion, self._demotion, self._manager_leaves),
            *(self._upgrade, self._upgrade),
        )
        self._busy: set[asyncio.Task[None]] = set()
        cluster.renew = self._renew

    def act(self) -> None:
        """Somebody begins something, if it is possible now."""
        deed = self._random.choice(self._deeds)
        if (work := deed()) is not None:
            self._begin(work, deed.__name__)

    @property
    def under_way(self) -> list[str]:
        """What was begun and has not ended."""
        return sorted(task.get_name() for task in self._busy)

    # -- workers ---------------------------------------------------------------------------------------------------

    def _worker_joins(self) -> Coroutine[None, None, None] | None:
        if len(self._cluster.workers) >= WORKERS_MAX:
            return None
        return self.join_worker(NodeId(f"w{next(self._numbers)}"))

    async def join_worker(self, id: NodeId) -> None:
        self._tell(f"{id} joins")
        await self._written(lambda tx: tx.lookup(Node, id) or tx.put(a_worker(id)))
        node, (other, *_) = self._cluster.add_node(id), self._cluster.nodes.values()
        node.broken_images, node.hanging_images = other.broken_images, other.hanging_images
        node.ending_images = other.ending_images
        self._cluster.start_node(id)
        self._cluster.workers = (*self._cluster.workers, id)

    def _worker_leaves(self) -> Coroutine[None, None, None] | None:
        id = self._chosen(self._plain_workers())
        return self.leave_worker(id) if id is not None else None

    async def leave_worker(self, id: NodeId) -> None:
        """``swarm leave`` there, and ``node rm`` as soon as it counts as down."""
        self._tell(f"{id} leaves")
        await self._end_node(id)
        await self._removed(id, force=False)

    def _worker_is_removed(self) -> Coroutine[None, None, None] | None:
        id = self._chosen(self._plain_workers())
        return self.remove_worker(id) if id is not None else None

    async def remove_worker(self, id: NodeId) -> None:
        """``node rm --force`` while it runs, and ``swarm leave`` there when somebody thinks of it."""
        self._cluster.disturbances += 1
        self._cluster.workers = tuple(one for one in self._cluster.workers if one != id)
        self._tell(f"{id} is removed by force")
        await self._removed(id, force=True)
        await asyncio.sleep(self._random.choice((0.1, 3.0)))
        self._tell(f"{id} leaves, as it was removed")
        await self._end_node(id)
        self._cluster.disturbances -= 1
        self._cluster.disturb()

    async def _end_node(self, id: NodeId) -> None:
        self._cluster.workers = tuple(one for one in self._cluster.workers if one != id)
        await self._cluster.end_node(id)

    async def _removed(self, id: NodeId, *, force: bool) -> None:
        def removed(tx: Transaction) -> None:
            if tx.lookup(Node, id) is not None:
                remove_node(tx, id, force=force, now_ns=self._now_ns())

        await self._written(removed)

    # -- managers --------------------------------------------------------------------------------------------------

    def _manager_joins(self) -> Coroutine[None, None, None] | None:
        if self._has_managers_enough():
            return None
        return self.join_manager(NodeId(f"m{next(self._numbers)}"))

    async def join_manager(self, id: NodeId) -> None:
        self._tell(f"{id} joins as a manager")
        self._cluster.changing.add(id)
        await self._written(lambda tx: tx.lookup(Node, id) or tx.put(a_manager(id)))
        self._cluster.add_machine(id)
        await self._come_in(id)
        self._cluster.changing.discard(id)

    def _promotion(self) -> Coroutine[None, None, None] | None:
        id = None if self._has_managers_enough() else self._chosen(self._plain_workers(), least=0)
        return self.promote(id) if id is not None else None

    async def promote(self, id: NodeId) -> None:
        """``node promote``; it is a manager when it has renewed its certificate and got its vote."""
        self._tell(f"promote {id}")
        if await self._users.set_role(id, NodeRole.MANAGER):
            await _until(lambda: id in self._cluster.managers)
        self._cluster.changing.discard(id)

    def _demotion(self) -> Coroutine[None, None, None] | None:
        id = self._chosen(self._cluster.managers, least=1) if self._keeps_managers() else None
        return self.demote(id) if id is not None else None

    async def demote(self, id: NodeId) -> None:
        """``node demote``; the machine of one that was never a worker leaves then."""
        self._tell(f"demote {id}")
        if await self._demoted(id):
            await self._end_manager(id)
        self._cluster.changing.discard(id)

    def _manager_leaves(self) -> Coroutine[None, None, None] | None:
        managers = [id for id in self._cluster.managers if id not in self._cluster.nodes]
        is_spare = len(self._cluster.managers) > 2 and self._keeps_managers()
        id = self._chosen(managers, least=0) if is_spare else None
        return self.leave_manager(id) if id is not None else None

    async def leave_manager(self, id: NodeId) -> None:
        """``swarm leave --force`` there: it resigns, and goes also where that is refused.  Others remove it then."""
        self._tell(f"{id} leaves, which is a manager")
        try:
            async with asyncio.timeout(RESIGNED_S):
                await self._users.resign(id)
                await _until(lambda: id not in self._cluster.raft.members)
        except (SkepError, TimeoutError) as error:
            self._tell(f"{id} has not resigned: {error}")
        await self._stop_manager(id)
        while not await self._demoted(id):
            pass
        await self._removed(id, force=True)
        self._cluster.changing.discard(id)

    def _upgrade(self) -> Coroutine[None, None, None] | None:
        older = [id for id in self._cluster.managers if id not in self._cluster.newer]
        id = self._chosen(older, least=0) if self._keeps_managers() else None
        return self.upgrade(id) if id is not None else None

    async def upgrade(self, id: NodeId) -> None:
        """A manager is of a newer version from now on, beside others that are not."""
        self._tell(f"upgrade {id}")
        await self._cluster.end_manager(id)
        await asyncio.sleep(self._random.choice((0.2, 1.5)))
        self._cluster.newer.add(id)
        self._cluster.start_manager(id)
        self._cluster.changing.discard(id)

    async def _demoted(self, id: NodeId) -> bool:
        """Gives whether it is a manager no more: the others may not do without it, for now."""
        until = self._cluster.loop.time() + GIVEN_UP_S
        while not await self._users.set_role(id, NodeRole.WORKER):
            if self._cluster.loop.time() > until:
                return False
            await asyncio.sleep(RETRY_S)
        await _until(lambda: id not in self._cluster.raft.members)
        return True

    async def _end_manager(self, id: NodeId) -> None:
        if id in self._cluster.nodes:
            # It stays as a worker, and ends the manager when its certificate says so.
            await _until(lambda: id not in self._cluster.managers)
            return
        await self._stop_manager(id)
        await self._removed(id, force=True)

    async def _stop_manager(self, id: NodeId) -> None:
        self._cluster.managers = tuple(one for one in self._cluster.managers if one != id)
        await self._cluster.end_manager(id)

    # -- what nodes do by themselves -------------------------------------------------------------------------------

    def _renew(self, id: NodeId) -> None:
        """A node is asked to renew its certificate."""
        if not any(task.get_name() == f"renew {id}" for task in self._busy):
            self._begin(self._renewed(id), f"renew {id}")

    async def _renewed(self, id: NodeId) -> None:
        def issued(tx: Transaction) -> NodeRole | None:
            node = tx.lookup(Node, id)
            if node is None or node.certificate is None:
                return None
            # Also where an earlier attempt of unknown outcome has been made already.
            tx.put(replace(node, certificate=replace(node.certificate, state="issued")))
            return node.certificate.role

        role = await self._written(issued)
        if role is NodeRole.MANAGER and id not in self._cluster.managers:
            await self._come_in(id)
        elif role is NodeRole.WORKER and id in self._cluster.managers:
            await self._stop_manager(id)

    async def _come_in(self, id: NodeId) -> None:
        """Be let in and get a vote, as ``membership.joining`` does; or give up, as it is to be no manager."""
        raft = self._cluster.raft
        while True:
            try:
                manager = self._asked()
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
                self._tell(f"{id} is not let in: {error}")
                return
            except SkepError:
                pass
            else:
                self._cluster.managers = (*self._cluster.managers, id)
                self._cluster.start_manager(id)
                self._tell(f"{id} is a manager")
                return
            await asyncio.sleep(RETRY_S)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _begin(self, deed: Coroutine[None, None, None], name: str) -> None:
        task = self._cluster.loop.create_task(deed, name=name)
        self._busy.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._busy.discard(task)
        if not task.cancelled():
            task.result()

    def _chosen(self, candidates: Sequence[NodeId], *, least: int = WORKERS_MIN) -> NodeId | None:
        """One of ``candidates`` that is well, for which something begins, if more than ``least`` are there."""
        well = [id for id in self._well() if id in candidates]
        if not well or len(candidates) <= least:
            return None
        id = self._random.choice(well)
        self._cluster.changing.add(id)
        return id

    def _plain_workers(self) -> Sequence[NodeId]:
        return [id for id in self._cluster.workers if id not in self._cluster.managers]

    def _keeps_managers(self) -> bool:
        """Whether none goes at present: operators who take two at once may end the cluster."""
        return not any(id in self._cluster.changing for id in self._cluster.managers)

    def _has_managers_enough(self) -> bool:
        coming = [id for id in self._cluster.changing if id not in self._cluster.managers]
        return len(self._cluster.managers) + len(coming) >= MANAGERS_MAX

    def _asked(self) -> SimulatedManager:
        """Raises: Unavailable: no manager is there."""
        there = [one for one in self._cluster.running_managers.values() if one.store is not None]
        if not there:
            raise Unavailable("no manager serves")
        return self._random.choice(there)

    async def _once(self, body: Callable[[Transaction], T]) -> T:
        store = self._asked().store
        assert store is not None
        await store.barrier()
        return await store.update(body)

    async def _written(self, body: Callable[[Transaction], T]) -> T:
        """What ``body`` gives, once some manager has written it: whatever is refused now may be taken later."""
        while True:
            try:
                return await self._once(body)
            except SkepError:
                await asyncio.sleep(RETRY_S)

    def _tell(self, text: str) -> None:
        self._cluster.disturb()
        self._cluster.trace.add(f"operator: {text}")

    def _now_ns(self) -> int:
        return self._cluster.clocks[self._cluster.managers[0]].now_ns()


async def _until(condition: Callable[[], bool]) -> None:
    """Look now and then."""
    for _ in iter(condition, True):
        await asyncio.sleep(RETRY_S)
